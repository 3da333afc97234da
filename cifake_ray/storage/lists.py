"""The images that a .csv, .txt or .parquet list names.

Floor: storage. A list has `path` (relative to the list, or absolute; the key is `path` as
written) and may have `label`, `split`, `source` and columns of its own, which are carried along.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cifake_ray.core.labels import parse_label, parse_split
from cifake_ray.core.schema import MANIFEST_FIELDS, SCORE_FIELDS, SHARD_FIELDS
from cifake_ray.errors import ImageError, StorageError
from cifake_ray.storage.folders import read_file
from cifake_ray.storage.listing import KEEP_ALL, LISTING_BATCH_ROWS, KeyFilter, Listing, RowBuffer
from cifake_ray.storage.places import resolve_path

RESERVED_COLUMNS = {field.name for field in [*MANIFEST_FIELDS, *SHARD_FIELDS, *SCORE_FIELDS]}


@dataclass(frozen=True)
class ListSource:
    """A list file. The columns named here are renamed to path, label and source."""

    path: Path
    path_column: str = "path"
    label_column: str = "label"
    source_column: str = "source"
    key_filter: KeyFilter = KEEP_ALL

    def list_images(self) -> Listing:
        listing = Listing(iter(()))
        listing.batches = self._list_batches(listing)
        return listing

    def _list_batches(self, listing: Listing) -> Iterator[pa.RecordBatch]:
        names, types, lines = self._open()
        known = [self.path_column, self.label_column, "split", self.source_column]
        positions = [names.index(name) if name in names else None for name in known]
        extra = [i for i, name in enumerate(names) if name not in known]
        for i in extra:
            if names[i] in RESERVED_COLUMNS:
                raise ValueError(
                    f"{self.path}: the column {names[i]!r} has a name that the output uses;"
                    " rename it"
                )
        fields = [*MANIFEST_FIELDS, *(pa.field(names[i], types[i]) for i in extra)]
        rows = RowBuffer(pa.schema(fields))
        for line_number, values in lines:
            path, label, split, source = (None if p is None else values[p] for p in positions)
            if not isinstance(path, str) or not path:
                raise ValueError(f"{self.path}, line {line_number}: no path; give one or delete it")
            if not self.key_filter.keeps(path):
                listing.left_out["excluded"] += 1
                continue
            try:
                facts = (parse_label(label), parse_split(split), source or None)
                location = str(self._locate(path))
                status = os.stat(location)
                stamp: tuple[int | None, int | None] = (status.st_size, status.st_mtime_ns)
            except ValueError as error:
                raise ValueError(f"{self.path}, line {line_number}: {error}") from error
            except OSError:
                stamp = (None, None)  # reading gives the error
            rows.append(
                path, location, None, *stamp, None, *facts, None, *(values[i] for i in extra)
            )
            if len(rows) >= LISTING_BATCH_ROWS:
                yield rows.drain()
        if len(rows):
            yield rows.drain()

    def _locate(self, path: str) -> Path:
        return resolve_path(path) if "://" in path else self.path.parent / path

    def _open(self) -> tuple[list[str], list[pa.DataType], Iterator[tuple[int, Sequence[object]]]]:
        """Column names, column types, and (line number, values) for each row."""
        suffix = self.path.suffix.lower()
        if suffix == ".parquet":
            try:
                table = pq.ParquetFile(self.path)
            except (OSError, pa.ArrowInvalid) as error:
                raise StorageError(f"{self.path}: not a readable Parquet file ({error})") from error
            names, types = table.schema_arrow.names, table.schema_arrow.types
            lines = self._iterate_parquet(table)
        elif suffix == ".txt":
            names, types, lines = [self.path_column], [pa.string()], self._iterate_text()
        else:
            rows = self._iterate_csv()
            names = list(next(rows, (1, []))[1])
            types, lines = [pa.string()] * len(names), rows
        if self.path_column not in names:
            raise ValueError(
                f"{self.path}: no column {self.path_column!r}, only {', '.join(names) or 'none'};"
                " name it with --path-column"
            )
        if len(set(names)) != len(names):
            raise ValueError(f"{self.path}: two columns have the same name; rename one")
        return names, types, lines

    def _iterate_parquet(self, table: pq.ParquetFile) -> Iterator[tuple[int, Sequence[object]]]:
        number = 0
        for batch in table.iter_batches(LISTING_BATCH_ROWS):
            for values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                number += 1
                yield number, values

    def _iterate_text(self) -> Iterator[tuple[int, Sequence[str]]]:
        try:
            with open(self.path, encoding="utf-8-sig", newline="\n") as file:
                for number, line in enumerate(file, 1):
                    if path := line.rstrip("\n").removesuffix("\r"):
                        yield number, (path,)
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: not UTF-8 ({error}); save the list as UTF-8") from error

    def _iterate_csv(self) -> Iterator[tuple[int, Sequence[str]]]:
        try:
            with open(self.path, encoding="utf-8-sig", newline="") as file:
                reader = csv.reader(file, strict=True)
                num_columns = None
                for values in reader:
                    if not values:
                        continue
                    num_columns = num_columns or len(values)
                    if len(values) != num_columns:
                        raise ValueError(
                            f"{self.path}, line {reader.line_num}: {len(values)} values for"
                            f" {num_columns} columns; quote values that hold a comma"
                        )
                    yield reader.line_num, values
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: not UTF-8 ({error}); save the list as UTF-8") from error
        except csv.Error as error:
            raise ValueError(f"{self.path}, line {reader.line_num}: {error}") from error

    def read_images(self, rows: pa.Table) -> Iterator[bytes | ImageError]:
        columns = ("location", "size_bytes", "mtime_ns")
        for location, size_bytes, mtime_ns in zip(
            *(rows.column(name).to_pylist() for name in columns), strict=True
        ):
            yield read_file(location, size_bytes, mtime_ns)
