"""The images that a list names: a Parquet file, or text (`text_table`).

A list has `path` (relative to the list, an absolute path or a URI; the key is `path` as written)
and may have `label`, `split`, `source` and columns of its own, which are carried along. What it has
no column for is read from the folders of a path below the list. Of files in a store it may have
`size_bytes` and `etag`: reading checks them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa

from cifake_ray.config import StoreConfig
from cifake_ray.core.labels import (
    LabelReader,
    PathLabels,
    read_file_path,
)
from cifake_ray.core.schema import MANIFEST_FIELDS
from cifake_ray.errors import ImageError, StorageError, UsageError
from cifake_ray.storage.io.files import is_file
from cifake_ray.storage.io.paths import AnyPath
from cifake_ray.storage.s3.prefetch import read_objects
from cifake_ray.storage.sources.allowed_paths import is_uri, make_allowed_paths
from cifake_ray.storage.sources.columns import (
    MEASURED_COLUMNS,
    ColumnChoice,
    check_text,
    describe_left_out,
    describe_unlabelled,
    find_split_column,
    make_split_reader,
)
from cifake_ray.storage.sources.folder import read_local_files
from cifake_ray.storage.sources.fsspec_prefix import read_fsspec_files
from cifake_ray.storage.sources.open_list import Lines, ListPart, OpenedList, open_list
from cifake_ray.storage.sources.parquet import find_tables, locate_table, name_table
from cifake_ray.storage.sources.source import (
    KEEP_ALL,
    KeyFilter,
    Listing,
    Part,
    batch_rows,
    check_locations,
    make_label_reader,
)
from cifake_ray.storage.sources.table_stamps import explain_change
from cifake_ray.storage.sources.text_table import TextLayout

MAX_PATH_CHARS = 4096  # PATH_MAX; more is an image as text
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

    path: AnyPath  # a file, or a folder of Parquet files
    choice: ColumnChoice = field(default_factory=ColumnChoice)
    needs_labels: bool = False  # a label column of which nothing is understood is an error
    key_filter: KeyFilter = KEEP_ALL
    allow_prefix: tuple[str, ...] = ()
    store: StoreConfig = StoreConfig()  # noqa: RUF009 - frozen
    # Of texts, by name and stamp; workers that list parts get them with the source.
    _layouts: dict[ListPart, TextLayout] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def path_column(self) -> str:
        return self.choice.image or self.choice.path

    def list_images(
        self, parts: Sequence[Part] | None = None, max_rows: int | None = None
    ) -> Listing:
        """List the images, or those of `parts`: lists, row groups, or lines from a place on.

        A text that is compressed, or an array of JSON, is one part.
        """
        labels = LabelReader(self.choice.label, self.choice.class_names)
        listing = Listing(iter(()), key_column=self.path_column, labels=labels)
        listing.conclude = self._conclude
        listing.find_table = partial(locate_table, self.path)
        listing.batches = self._list_batches(listing, labels, parts, max_rows)
        return listing

    def _conclude(self, listing: Listing) -> None:
        assert listing.labels is not None
        if self.needs_labels:
            remedy = f"--drop-columns {self.choice.label} converts without labels"
            listing.labels.check(self.path, remedy)
        if listing.labels.counts:
            listing.notes.append(listing.labels.describe())

    def _list_batches(
        self,
        listing: Listing,
        labels: LabelReader,
        parts: Sequence[Part] | None,
        max_rows: int | None,
    ) -> Iterator[pa.RecordBatch]:
        given = None if parts is None else [tuple(part) for part in parts]
        first, num_rows = None, 0

        def is_full() -> bool:
            return max_rows is not None and num_rows >= max_rows

        paths = [self.path] if is_file(self.path) else find_tables(self.path)
        named = {name_table(path, self.path): path for path in paths}
        if missing := {part[0] for part in given or ()} - named.keys():
            raise explain_change(self.path / min(missing))
        for name, path in named.items():
            wanted = [(name,)] if given is None else [part for part in given if part[0] == name]
            if first is not None and (is_full() or not wanted):
                listing.left += wanted
                continue
            opened = open_list(path, name, self.path_column, self.choice, wanted, self._layouts)
            listing.stamps[name] = opened.stamp
            known = [self.path_column, self.choice.label, "split", self.choice.source]
            known += ["size_bytes", "etag"]
            columns = {n: i for i, n in enumerate(opened.names) if n not in self.choice.drop}
            others = [
                pa.field(name, opened.types[i]) for name, i in columns.items() if name not in known
            ]
            extra, left_out = self.choice.choose_extra(others, path, MEASURED_COLUMNS)
            for column in ("split", self.choice.source):
                if column in columns:
                    check_text(pa.field(column, opened.types[columns[column]]), path)
            if first is None:
                first = extra
                listing.notes += [describe_left_out(left_out)] if left_out else []
            elif extra != first:
                raise StorageError(
                    f"{path}: other columns than the list before it; score them apart"
                )
            split_column = find_split_column(columns)
            known[2] = split_column or "split"
            positions = [columns.get(name) for name in known]
            carried = [columns[f.name] for f in extra]
            read = make_split_reader(split_column)
            if self.needs_labels and self.choice.label not in (*columns, *self.choice.drop):
                listing.add_note(describe_unlabelled(self.choice.label, columns))
            left = dict.fromkeys(part for part in wanted if part != (name,))
            for part, lines in opened.parts:
                if is_full():
                    if part in left:
                        break
                    left[part] = None
                    continue
                left.pop(part, None)
                places = (positions, carried)
                rows = self._make_rows(opened, lines, places, labels, read, listing.left_out)
                for batch in batch_rows(rows, pa.schema([*MANIFEST_FIELDS, *extra])):
                    num_rows += batch.num_rows
                    yield batch
            listing.left += left
        if parts is None and not listing.left:
            self._conclude(listing)

    def _make_rows(
        self,
        opened: OpenedList,
        lines: Lines,
        places: tuple[list[int | None], list[int]],
        labels: LabelReader,
        read_split: Callable[[object], str | None],
        left_out: Counter[str],
    ) -> Iterator[Sequence[Any]]:
        positions, extra = places
        allowed = make_allowed_paths(opened.path, self.allow_prefix)
        read_labels = make_label_reader(dict(self.choice.class_names))
        has_label, has_split, has_source = (p is not None for p in positions[1:4])
        of_list = read_file_path(name_table(opened.path, self.path), self.choice.class_names)
        for line_number, values in lines:
            path, label, split, source, size_bytes, etag = (
                None if p is None else values[p] for p in positions
            )
            if isinstance(path, dict):  # the Hugging Face struct of bytes and path, without bytes
                path = path.get("path")
            if not isinstance(path, str) or not path:
                raise UsageError(
                    f"{opened.path}, line {line_number}: no path in the column"
                    f" {self.path_column!r}; give one or delete the line"
                )
            if len(path) > MAX_PATH_CHARS:
                raise UsageError(
                    f"{opened.path}, line {line_number}: {len(path):,} characters in the column"
                    f" {self.path_column!r} are no path; write images to files, or as bytes to"
                    " Parquet"
                )
            if not self.key_filter.keeps(path):
                left_out["excluded"] += 1
                continue
            try:
                location = allowed.locate(path)
                below = allowed.find_below(location)
                known = read_labels(below.rpartition("/")[0]) if below else PathLabels()
                known = known.join(of_list)
                listed = (parse_size(size_bytes), None, quote_etag(etag))
                stamp = listed if is_uri(location) else stamp_local(location)
            except ValueError as error:
                raise UsageError(f"{opened.path}, line {line_number}: {error}") from error
            facts = (
                labels.read(label, opened.label_names) if has_label else known.label,
                read_split(split) if has_split else known.split,
                (None if source in (None, "") else str(source)) if has_source else known.source,
            )
            yield path, location, None, *stamp, *facts, None, *(values[i] for i in extra)

    def read_images(self, rows: pa.Table) -> Iterator[bytes | ImageError]:
        readers: dict[str, Callable[..., Iterator[bytes | ImageError]]] = {
            "local": read_local_files,
            "s3": partial(read_objects, self.store),
            "fsspec": partial(read_fsspec_files, self.store),
        }
        place = self.path if is_file(self.path) else self.path / "list"
        allowed = make_allowed_paths(place, self.allow_prefix)
        check_locations(rows, allowed.allows)
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
