"""The images that a list names: a Parquet file, or text (`text_table`).

A list has `path` (relative to the list, an absolute path or a URI; the key is `path` as written)
and may have `label`, `split`, `source` and columns of its own, which are carried along. What it has
no column for is read from the folders of a path below the list. Of files in a store it may have
`size_bytes` and `etag`: reading checks them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cifake_ray.config import StoreConfig
from cifake_ray.core.labels import PathLabels, make_class_names, parse_label, parse_split
from cifake_ray.core.schema import MANIFEST_FIELDS, SCORE_FIELDS, SHARD_FIELDS
from cifake_ray.errors import ImageError, UsageError
from cifake_ray.storage.io.paths import AnyPath, explain_errors
from cifake_ray.storage.s3.prefetch import read_objects
from cifake_ray.storage.sources.allowed_paths import is_uri, make_allowed_paths
from cifake_ray.storage.sources.folder import read_local_files
from cifake_ray.storage.sources.fsspec_prefix import read_fsspec_files
from cifake_ray.storage.sources.parquet import open_parquet
from cifake_ray.storage.sources.source import (
    KEEP_ALL,
    LISTING_BATCH_ROWS,
    KeyFilter,
    Listing,
    batch_rows,
    make_label_reader,
)
from cifake_ray.storage.sources.text_table import open_text_table

RESERVED_COLUMNS = {field.name for field in [*MANIFEST_FIELDS, *SHARD_FIELDS, *SCORE_FIELDS]}
Stamp = tuple[int | None, int | None, str | None]  # size_bytes, mtime_ns, etag


def quote_etag(etag: object) -> str | None:
    """Return an etag in quotes, as S3 lists it and If-Match needs it; None when empty."""
    text = "" if etag is None else str(etag).strip()
    if not text:
        return None
    return text if text.endswith('"') else f'"{text}"'


def parse_size(value: object) -> int | None:
    """Return a number of bytes; None when empty. UsageError for anything else."""
    if value in (None, ""):
        return None
    text = str(value).strip()
    if not (text.isascii() and text.isdigit()):
        raise UsageError(f"size_bytes {value!r} is no number of bytes")
    return int(text)


def stamp_local(path: str) -> Stamp:
    """Return size and time of a local file; None when unknown: reading it reports the error."""
    try:
        status = os.stat(path)
    except OSError:
        return None, None, None
    return status.st_size, status.st_mtime_ns, None


@dataclass(frozen=True)
class ListFileSource:
    """A list file. The columns named here are renamed to path, label and source."""

    path: AnyPath
    path_column: str = "path"
    label_column: str = "label"
    source_column: str = "source"
    key_filter: KeyFilter = KEEP_ALL
    allow_prefix: tuple[str, ...] = ()
    store: StoreConfig = StoreConfig()  # noqa: RUF009 - frozen
    class_names: dict[str, int] = field(default_factory=make_class_names)  # of folders

    def list_images(self) -> Listing:
        listing = Listing(iter(()))
        listing.batches = self._list_batches(listing)
        return listing

    def _list_batches(self, listing: Listing) -> Iterator[pa.RecordBatch]:
        names, types, lines = self._open()
        known = [self.path_column, self.label_column, "split", self.source_column]
        known += ["size_bytes", "etag"]
        positions = [names.index(name) if name in names else None for name in known]
        unused = {"label", "source"}.intersection(names).difference(known)  # options name others
        if unused:
            listing.notes.append(f"left out columns: {', '.join(sorted(unused))}")
        extra = [i for i, name in enumerate(names) if name not in {*known, *unused}]
        for i in extra:
            if names[i] in RESERVED_COLUMNS:
                raise UsageError(
                    f"{self.path}: the column {names[i]!r} has a name that the output uses;"
                    " rename it"
                )
        fields = [*MANIFEST_FIELDS, *(pa.field(names[i], types[i]) for i in extra)]
        rows = self._make_rows(lines, positions, extra, listing.left_out)
        yield from batch_rows(rows, pa.schema(fields))

    def _make_rows(
        self,
        lines: Iterable[tuple[int, Sequence[object]]],
        positions: list[int | None],
        extra: list[int],
        left_out: Counter[str],
    ) -> Iterator[Sequence[Any]]:
        allowed = make_allowed_paths(self.path, self.allow_prefix)
        read_labels = make_label_reader(self.class_names)
        has_label, has_split, has_source = (p is not None for p in positions[1:4])
        for line_number, values in lines:
            path, label, split, source, size_bytes, etag = (
                None if p is None else values[p] for p in positions
            )
            if not isinstance(path, str) or not path:
                raise UsageError(f"{self.path}, line {line_number}: no path; give one or delete it")
            if not self.key_filter.keeps(path):
                left_out["excluded"] += 1
                continue
            try:
                location = allowed.locate(path)
                below = allowed.find_below(location)
                known = read_labels(below.rpartition("/")[0]) if below else PathLabels()
                facts = (
                    parse_label(label) if has_label else known.label,
                    parse_split(split) if has_split else known.split,
                    source or None if has_source else known.source,
                )
                listed = (parse_size(size_bytes), None, quote_etag(etag))
                stamp = listed if is_uri(location) else stamp_local(location)
            except ValueError as error:
                raise UsageError(f"{self.path}, line {line_number}: {error}") from error
            yield path, location, None, *stamp, *facts, None, *(values[i] for i in extra)

    def _open(self) -> tuple[list[str], list[pa.DataType], Iterator[tuple[int, Sequence[object]]]]:
        """Return column names, column types, and (line number, values) for each row."""
        suffix = self.path.suffix.lower()
        lines: Iterator[tuple[int, Sequence[object]]]
        if suffix == ".parquet":
            table = open_parquet(self.path)
            names, types = table.schema_arrow.names, table.schema_arrow.types
            if self.path_column not in names:
                raise UsageError(
                    f"{self.path}: no column {self.path_column!r}, only {', '.join(names)};"
                    " name it with --path-column"
                )
            lines = self._iterate_parquet(table)
        else:
            names, lines = open_text_table(self.path, self.path_column, self.label_column)
            types = [pa.string()] * len(names)
        if len(set(names)) != len(names):
            raise UsageError(f"{self.path}: two columns have the same name; rename one")
        return names, types, lines

    def _iterate_parquet(self, table: pq.ParquetFile) -> Iterator[tuple[int, Sequence[object]]]:
        number = 0
        with explain_errors(self.path):
            for batch in table.iter_batches(LISTING_BATCH_ROWS):
                for values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                    number += 1
                    yield number, values
        table.close(force=True)

    def read_images(self, rows: pa.Table) -> Iterator[bytes | ImageError]:
        readers: dict[str, Callable[..., Iterator[bytes | ImageError]]] = {
            "local": read_local_files,
            "s3": partial(read_objects, self.store),
            "fsspec": partial(read_fsspec_files, self.store),
        }
        rows = rows.select(["location", "size_bytes", "mtime_ns", "etag"])
        kinds = [_find_kind(location) for location in rows.column("location").to_pylist()]
        images = {}  # each kind is read ahead by itself
        for kind in set(kinds):
            chosen = rows.filter(pa.array([its_kind == kind for its_kind in kinds]))
            locations, sizes, mtimes_ns, etags = (column.to_pylist() for column in chosen.columns)
            images[kind] = readers[kind](locations, sizes, mtimes_ns if kind == "local" else etags)
        for kind in kinds:
            yield next(images[kind])


def _find_kind(location: str) -> str:
    if location.startswith("s3://"):
        return "s3"
    return "fsspec" if is_uri(location) else "local"
