"""The images that a .csv, .txt or .parquet list names.

A list has `path` (relative to the list, an absolute path or a URI; the key is
`path` as written) and may have `label`, `split`, `source` and columns of its own, which are carried
along. Of files in a store it may tell `size_bytes` and `etag`: reading checks them.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from cifake_ray.config import StoreConfig
from cifake_ray.core.labels import parse_label, parse_split
from cifake_ray.core.schema import MANIFEST_FIELDS, SCORE_FIELDS, SHARD_FIELDS
from cifake_ray.errors import ImageError, UsageError
from cifake_ray.storage.io.files import open_file
from cifake_ray.storage.io.paths import AnyPath, explain_errors
from cifake_ray.storage.s3.prefetch import read_objects
from cifake_ray.storage.sources.allowed_paths import is_uri, make_allowed_paths
from cifake_ray.storage.sources.folder import read_local_file
from cifake_ray.storage.sources.fsspec_prefix import read_fsspec_files
from cifake_ray.storage.sources.parquet import open_parquet
from cifake_ray.storage.sources.source import (
    KEEP_ALL,
    LISTING_BATCH_ROWS,
    KeyFilter,
    Listing,
    RowBuffer,
)

RESERVED_COLUMNS = {field.name for field in [*MANIFEST_FIELDS, *SHARD_FIELDS, *SCORE_FIELDS]}
Stamp = tuple[int | None, int | None, str | None]  # size_bytes, mtime_ns, etag


def quote_etag(etag: object) -> str | None:
    """An etag as a listing of S3 gives it and If-Match wants it: in quotes; None when empty."""
    text = "" if etag is None else str(etag).strip()
    if not text:
        return None
    return text if text.endswith('"') else f'"{text}"'


def parse_size(value: object) -> int | None:
    """A number of bytes; empty means unknown. UsageError for anything else."""
    if value in (None, ""):
        return None
    text = str(value).strip()
    if not (text.isascii() and text.isdigit()):
        raise UsageError(f"size_bytes {value!r} is no number of bytes")
    return int(text)


def read_listed_objects(
    store: StoreConfig,
    locations: Sequence[str],
    sizes: Sequence[int | None],
    etags: Sequence[str | None],
) -> Iterator[bytes | ImageError]:
    """As `read_objects`, but a size that was told without an etag is checked too."""
    images = read_objects(store, locations, sizes, etags)
    for image, size_bytes in zip(images, sizes, strict=True):
        if isinstance(image, bytes) and size_bytes not in (None, len(image)):
            yield ImageError("changed", f"{len(image)} bytes; the list says {size_bytes}")
        else:
            yield image


def stamp_local(path: str) -> Stamp:
    """Size and time of a local file; nothing when it cannot be told: reading gives the error."""
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

    def list_images(self) -> Listing:
        listing = Listing(iter(()))
        listing.batches = self._list_batches(listing)
        return listing

    def _list_batches(self, listing: Listing) -> Iterator[pa.RecordBatch]:
        allowed = make_allowed_paths(self.path, self.allow_prefix)
        names, types, lines = self._open()
        known = [self.path_column, self.label_column, "split", self.source_column]
        known += ["size_bytes", "etag"]
        positions = [names.index(name) if name in names else None for name in known]
        extra = [i for i, name in enumerate(names) if name not in known]
        for i in extra:
            if names[i] in RESERVED_COLUMNS:
                raise UsageError(
                    f"{self.path}: the column {names[i]!r} has a name that the output uses;"
                    " rename it"
                )
        fields = [*MANIFEST_FIELDS, *(pa.field(names[i], types[i]) for i in extra)]
        rows = RowBuffer(pa.schema(fields))
        for line_number, values in lines:
            path, label, split, source, size_bytes, etag = (
                None if p is None else values[p] for p in positions
            )
            if not isinstance(path, str) or not path:
                raise UsageError(f"{self.path}, line {line_number}: no path; give one or delete it")
            if not self.key_filter.keeps(path):
                listing.left_out["excluded"] += 1
                continue
            try:
                facts = (parse_label(label), parse_split(split), source or None)
                location = allowed.locate(path)
                told = (parse_size(size_bytes), None, quote_etag(etag))
                stamp = told if is_uri(location) else stamp_local(location)
            except ValueError as error:
                raise UsageError(f"{self.path}, line {line_number}: {error}") from error
            rows.append(path, location, None, *stamp, *facts, None, *(values[i] for i in extra))
            if len(rows) >= LISTING_BATCH_ROWS:
                yield rows.drain()
        if len(rows):
            yield rows.drain()

    def _open(self) -> tuple[list[str], list[pa.DataType], Iterator[tuple[int, Sequence[object]]]]:
        """Column names, column types, and (line number, values) for each row."""
        suffix = self.path.suffix.lower()
        if suffix == ".parquet":
            table = open_parquet(self.path)
            names, types = table.schema_arrow.names, table.schema_arrow.types
            lines = self._iterate_parquet(table)
        elif suffix == ".txt":
            names, types, lines = [self.path_column], [pa.string()], self._iterate_text()
        else:
            rows = self._iterate_csv()
            names = list(next(rows, (1, []))[1])
            types, lines = [pa.string()] * len(names), rows
        if self.path_column not in names:
            raise UsageError(
                f"{self.path}: no column {self.path_column!r}, only {', '.join(names) or 'none'};"
                " name it with --path-column"
            )
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

    def _iterate_text(self) -> Iterator[tuple[int, Sequence[str]]]:
        for number, line in enumerate(self._read_lines("\n"), 1):
            if path := line.rstrip("\n").removesuffix("\r"):
                yield number, (path,)

    def _iterate_csv(self) -> Iterator[tuple[int, Sequence[str]]]:
        reader = csv.reader(self._read_lines(""), strict=True)
        num_columns = None
        try:
            for values in reader:
                if not values:
                    continue
                num_columns = num_columns or len(values)
                if len(values) != num_columns:
                    raise UsageError(
                        f"{self.path}, line {reader.line_num}: {len(values)} values for"
                        f" {num_columns} columns; quote values that hold a comma"
                    )
                yield reader.line_num, values
        except csv.Error as error:
            raise UsageError(f"{self.path}, line {reader.line_num}: {error}") from error

    def _read_lines(self, newline: str) -> Iterator[str]:
        """Lines with their ends, whatever `newline` says they are."""
        try:
            with (
                explain_errors(self.path),
                open_file(self.path) as file,
                io.TextIOWrapper(file, encoding="utf-8-sig", newline=newline) as text,
            ):
                yield from text
        except UnicodeDecodeError as error:
            raise UsageError(f"{self.path}: not UTF-8 ({error}); save the list as UTF-8") from error

    def read_images(self, rows: pa.Table) -> Iterator[bytes | ImageError]:
        columns = ("location", "size_bytes", "mtime_ns", "etag")
        facts = list(zip(*(rows.column(name).to_pylist() for name in columns), strict=True))
        kinds = [_find_kind(location) for location, *_ in facts]
        readers = {}  # files in stores are fetched ahead, each kind apart; local ones in their turn
        for kind, read in (("s3", read_listed_objects), ("store", read_fsspec_files)):
            chosen = [fact for fact, its_kind in zip(facts, kinds, strict=True) if its_kind == kind]
            if chosen:
                locations, sizes, _, etags = zip(*chosen, strict=True)
                readers[kind] = read(self.store, locations, sizes, etags)
        for kind, (location, size_bytes, mtime_ns, _) in zip(kinds, facts, strict=True):
            if kind == "local":
                yield read_local_file(location, size_bytes, mtime_ns)
            else:
                yield next(readers[kind])


def _find_kind(location: str) -> str:
    if location.startswith("s3://"):
        return "s3"
    return "store" if is_uri(location) else "local"
