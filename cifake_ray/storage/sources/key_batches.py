"""Rows of the manifest for the keys that a store lists, thousands at once.

Labels are read once for a folder, and clutter is looked for by folder and by suffix. Python sees
only the keys that may be left out and those that are not UTF-8.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cifake_ray.core.schema import LABEL_FIELDS, MANIFEST_FIELDS
from cifake_ray.storage.s3.page import Page
from cifake_ray.storage.sources.clutter import is_system_folder, may_be_clutter, partition_last
from cifake_ray.storage.sources.source import (
    LISTING_BATCH_ROWS,
    KeyFilter,
    Listing,
    escape_key,
    make_label_reader,
)


class KeyBatches:
    """Makes rows of keys below a prefix, and counts in a listing what is no row.

    `place` and the whole key are the location of a row; its key is what is behind `prefix`.
    """

    def __init__(
        self,
        place: str,
        prefix: str,
        class_names: dict[str, int],
        key_filter: KeyFilter,
        listing: Listing,
    ) -> None:
        self.place, self.prefix = place, prefix
        self.read_labels = make_label_reader(class_names)
        self.key_filter, self.listing = key_filter, listing

    def make_batches(self, pages: Iterable[Page]) -> Iterator[pa.RecordBatch]:
        """Yield batches of about LISTING_BATCH_ROWS, without those that would be empty."""
        for whole_keys, sizes, etags in _join_pages(pages):
            batch = self._make_batch(whole_keys, pa.array(sizes, pa.int64()), etags)
            if batch.num_rows:
                yield batch

    def _make_batch(
        self, whole_keys: list[str], size_bytes: pa.Array, etags: list[str | None]
    ) -> pa.RecordBatch:
        written, is_bad = _write_keys(whole_keys)
        keys = pc.utf8_slice_codeunits(written, len(self.prefix))
        folders, names = partition_last(keys, "/")
        folders = folders.dictionary_encode()
        is_marker = pc.and_(pc.ends_with(keys, "/"), pc.equal(size_bytes, 0))
        is_row = ~_make_mask(pc.or_(is_marker, pc.equal(keys, "")))
        if num_markers := int(np.count_nonzero(~is_row)):
            self.listing.left_out["folder marker"] += num_markers
        is_asked = is_bad | self._find_doubtful(folders, names)
        for place in np.flatnonzero(is_row & is_asked).tolist():
            key = whole_keys[place][len(self.prefix) :]
            if reason := self.key_filter.find_reason(key):
                self.listing.leave_out(key, reason)
                is_row[place] = False
        columns = {
            "key": keys,
            "location": pc.binary_join_element_wise(self.place, written, ""),
            "size_bytes": size_bytes,
            "etag": pa.array(etags, pa.string()),
            **self._make_labels(folders),
        }
        if is_bad.any():
            columns |= self._make_bad_columns(columns, whole_keys, is_bad)
        nothing = pa.nulls(len(keys))
        arrays = [columns.get(field.name, nothing).cast(field.type) for field in MANIFEST_FIELDS]
        batch = pa.RecordBatch.from_arrays(arrays, schema=pa.schema(MANIFEST_FIELDS))
        return batch if is_row.all() else batch.filter(pa.array(is_row))

    def _find_doubtful(self, folders: pa.DictionaryArray, names: pa.Array) -> np.ndarray:
        """Return which keys the filter must be asked about; it keeps all others."""
        if self.key_filter.include or self.key_filter.exclude:
            return np.ones(len(names), bool)
        is_system = [is_system_folder(folder) for folder in folders.dictionary.to_pylist()]
        mask: np.ndarray = np.array(is_system)[folders.indices.to_numpy()] | may_be_clutter(names)
        return mask

    def _make_labels(self, folders: pa.DictionaryArray) -> dict[str, pa.Array]:
        """Return label, split and source of each key."""
        labels = [self.read_labels(folder) for folder in folders.dictionary.to_pylist()]
        return {
            field.name: pa.array(values, field.type).take(folders.indices)
            for field, values in zip(LABEL_FIELDS, zip(*labels, strict=True), strict=True)
        }

    def _make_bad_columns(
        self, columns: dict[str, pa.Array], whole_keys: list[str], is_bad: np.ndarray
    ) -> dict[str, pa.Array]:
        """Return what differs where some keys are not UTF-8: they can be counted, but not read."""
        bad = pa.array(is_bad)
        labels = [
            self.read_labels(whole_keys[place][len(self.prefix) :].rpartition("/")[0]).label
            for place in np.flatnonzero(is_bad).tolist()
        ]
        nothing = pa.scalar(None, pa.string())
        return {
            "label": pc.replace_with_mask(columns["label"], bad, pa.array(labels, pa.int64())),
            "error": pc.if_else(bad, "bad_key", nothing),
            **{n: pc.if_else(bad, nothing, columns[n]) for n in ("location", "split", "source")},
        }


def _join_pages(
    pages: Iterable[Page],
) -> Iterator[tuple[list[str], list[int], list[str | None]]]:
    keys, sizes, etags = list[str](), list[int](), list[str | None]()
    for page in pages:
        keys += page.keys
        sizes += page.sizes
        etags += page.etags
        if len(keys) >= LISTING_BATCH_ROWS:
            yield keys, sizes, etags
            keys, sizes, etags = [], [], []
    if keys:
        yield keys, sizes, etags


def _write_keys(keys: list[str]) -> tuple[pa.Array, np.ndarray]:
    """Return keys as text, and which of them are escaped because they are not UTF-8."""
    try:
        return pa.array(keys, pa.string()), np.zeros(len(keys), bool)
    except UnicodeEncodeError:
        escaped = [escape_key(key) for key in keys]
        written = [key if e is None else e for key, e in zip(keys, escaped, strict=True)]
        return pa.array(written, pa.string()), np.array([e is not None for e in escaped])


def _make_mask(values: pa.Array) -> np.ndarray:
    mask: np.ndarray = values.to_numpy(zero_copy_only=False)
    return mask
