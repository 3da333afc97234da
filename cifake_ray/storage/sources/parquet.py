"""The images of Parquet files with an `image` column: our shards, or any Hugging Face data set.

Files keep their order and rows stay in their file, so that reads are sequential:
one output shard covers neighbouring row groups of one file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cifake_ray.core.imaging.decode import MAX_IMAGE_BYTES
from cifake_ray.core.labels import SPLIT_NAMES, parse_split, read_class_label
from cifake_ray.core.schema import ERROR_FIELDS, MANIFEST_FIELDS, SCORE_FIELDS, SHARD_FIELDS
from cifake_ray.errors import ImageError, StorageError, UsageError
from cifake_ray.storage.io.files import exists, find_files, is_file, open_ranges
from cifake_ray.storage.io.paths import AnyPath, explain_errors
from cifake_ray.storage.sources.source import (
    KEEP_ALL,
    MAX_SHARD_BYTES,
    MIN_SHARD_ROWS,
    KeyFilter,
    Listing,
)

PIECE_ROWS = 16  # images of at most MAX_IMAGE_BYTES
OUTPUT_NAMES = {field.name for field in SCORE_FIELDS}


def find_tables(root: AnyPath) -> list[AnyPath]:
    """Return the Parquet files of convert's output, its `shards/`, any folder, or one file."""
    if is_file(root):
        return [root]
    folder = root / "shards" if exists(root / "_run.json") else root
    paths = [
        folder / name
        for name in find_files(folder)
        if name.endswith(".parquet") and not name.rpartition("/")[2].startswith((".", "_"))
    ]
    if not paths:
        raise StorageError(f"{folder}: no Parquet files; give the output of convert")
    return sorted(paths)


def open_parquet(path: AnyPath) -> pq.ParquetFile:
    """Open any Parquet file; from a store, only what is read is fetched. StorageError otherwise."""
    with explain_errors(path):
        try:
            # pyarrow opens local files itself; from a store it merges ranges into few reads.
            file = path if isinstance(path, Path) else open_ranges(path)
            return pq.ParquetFile(file, pre_buffer=True, page_checksum_verification=True)
        except (FileNotFoundError, PermissionError):
            raise
        except (OSError, pa.ArrowInvalid) as error:
            raise StorageError(
                f"{path}: not a readable Parquet file ({error}); `cifake-ray repair` redoes a"
                " damaged shard"
            ) from error


@contextmanager
def use_table(path: AnyPath) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file with an `image` column, and close it at the end of the block.

    StorageError for any other file.
    """
    table = open_parquet(path)
    try:
        if "image" not in table.schema_arrow.names:
            raise StorageError(f"{path}: no column `image`; give the output of convert")
        yield table
    finally:
        table.close(force=True)


def read_columns(
    table: pq.ParquetFile, path: AnyPath, groups: list[int], columns: list[str]
) -> pa.Table:
    """Read some columns of some row groups. StorageError when the file is damaged."""
    with explain_errors(path):
        try:
            return table.read_row_groups(groups, columns=columns)
        except pa.ArrowNotImplementedError:  # more than 2 GiB of images: Arrow reads only pieces
            pieces = table.iter_batches(PIECE_ROWS, row_groups=groups, columns=columns)
            return pa.Table.from_batches(pieces)
        except (FileNotFoundError, PermissionError):
            raise
        except (OSError, pa.ArrowInvalid) as error:
            raise StorageError(
                f"{path}: damaged ({error}); `cifake-ray repair` redoes it"
            ) from error


def read_row_group(path: AnyPath, number: int, columns: list[str]) -> pa.Table:
    """Read some columns of one row group of a file with images, and close the file."""
    with use_table(path) as table:
        return read_columns(table, path, [number], columns)


def name_table(path: AnyPath, root: AnyPath) -> str:
    """Return the path of a file below the root; its name when it is the root itself."""
    if path == root:
        return path.name
    if isinstance(path, Path):
        return path.relative_to(str(root)).as_posix()
    return str(path).removeprefix(str(root).rstrip("/") + "/")


def read_label_names(schema: pa.Schema) -> list[str] | None:
    """Return class names in the order of their numbers, if a Hugging Face footer has them."""
    footer = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    label = footer.get("info", {}).get("features", {}).get("label", {})
    names: list[str] | None = label.get("names")
    return names


def find_splits(root: AnyPath) -> set[str]:
    """Return the splits that occur in Parquet files with images."""
    splits = set()
    for path in find_tables(root):
        with use_table(path) as table:
            if "split" in table.schema_arrow.names:
                groups = list(range(table.num_row_groups))
                found = read_columns(table, path, groups, ["split"]).column("split").unique()
                splits |= {split for value in found.to_pylist() if (split := parse_split(value))}
            elif split := SPLIT_NAMES.get(path.stem.split("-")[0].lower()):
                splits.add(split)
    return splits


class _HeldGroup(NamedTuple):
    """A row group in memory."""

    location: str
    first_row: int
    table: pa.Table

    def covers(self, location: str, row: int) -> bool:
        return location == self.location and 0 <= row - self.first_row < self.table.num_rows


@dataclass
class ParquetSource:
    """Parquet files with images inside."""

    root: AnyPath
    split: str | None = None  # only rows of this split
    labelled: bool = False  # only rows with a label
    key_filter: KeyFilter = KEEP_ALL
    min_shard_rows: int | None = None
    _held: _HeldGroup | None = field(default=None, init=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the row group in memory: the process that unpickles this reads its own."""
        return {**self.__dict__, "_held": None}

    def list_images(self) -> Listing:
        listing = Listing(iter(()), keeps_order=True)
        listing.batches = self._list_batches(listing)
        return listing

    def _list_batches(self, listing: Listing) -> Iterator[pa.RecordBatch]:
        paths = find_tables(self.root)
        carried = {f.name for f in MANIFEST_FIELDS + SHARD_FIELDS}
        fields: list[pa.Field] = []
        for path in paths:
            with use_table(path) as table:
                extra = [f for f in table.schema_arrow if f.name not in carried]
                if clash := [f.name for f in extra if f.name in OUTPUT_NAMES]:
                    raise UsageError(
                        f"{path}: the output uses the column name {clash[0]!r}; rename it"
                    )
                if path == paths[0]:
                    fields = [*MANIFEST_FIELDS, *extra]
                elif extra != fields[len(MANIFEST_FIELDS) :]:
                    raise StorageError(f"{path}: other columns than {paths[0]}; score them apart")
                for groups in self._group_rows(table):
                    batch = self._read_rows(path, table, groups, pa.schema(fields))
                    kept = self._select(batch)
                    listing.left_out["excluded"] += batch.num_rows - kept.num_rows
                    if kept.num_rows:
                        yield kept

    def _group_rows(self, table: pq.ParquetFile) -> Iterator[list[int]]:
        """Yield neighbouring row groups, together at least a shard by their rows or their bytes."""
        groups: list[int] = []
        num_rows = size_bytes = 0
        for group in range(table.num_row_groups):
            groups.append(group)
            num_rows += table.metadata.row_group(group).num_rows
            size_bytes += table.metadata.row_group(group).total_byte_size
            if num_rows >= (self.min_shard_rows or MIN_SHARD_ROWS) or size_bytes >= MAX_SHARD_BYTES:
                yield groups
                groups, num_rows, size_bytes = [], 0, 0
        if groups:
            yield groups

    def _read_rows(
        self, path: AnyPath, table: pq.ParquetFile, groups: list[int], schema: pa.Schema
    ) -> pa.RecordBatch:
        names = [n for n in schema.names if n in table.schema_arrow.names]
        rows = read_columns(table, path, groups, names)
        start = sum(table.metadata.row_group(g).num_rows for g in range(groups[0]))
        indices = range(start, start + rows.num_rows)
        name = name_table(path, self.root)
        columns: dict[str, Any] = {n: rows.column(n).combine_chunks() for n in names}
        if "key" not in columns:
            columns["key"] = [f"{name}#{index}" for index in indices]
        columns["location"] = [name] * rows.num_rows
        columns["row"] = list(indices)
        if "label" in columns:
            class_names = read_label_names(table.schema_arrow)
            try:
                columns["label"] = [
                    read_class_label(v, class_names) for v in columns["label"].to_pylist()
                ]
            except ValueError as error:
                raise UsageError(f"{path}: {error}") from error
        if "split" in columns:
            columns["split"] = [parse_split(v) for v in columns["split"].to_pylist()]
        else:  # the layout of the Hugging Face hub: train-00000-of-00002.parquet
            columns["split"] = [SPLIT_NAMES.get(path.stem.split("-")[0].lower())] * rows.num_rows
        arrays = [
            pa.nulls(rows.num_rows, f.type)
            if f.name not in columns
            else columns[f.name].cast(f.type)
            if isinstance(columns[f.name], pa.Array)
            else pa.array(columns[f.name], f.type)
            for f in schema
        ]
        return pa.RecordBatch.from_arrays(arrays, schema=schema)

    def _select(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        if self.split is not None:
            batch = batch.filter(pc.equal(batch.column("split"), self.split))
        if self.labelled:
            batch = batch.filter(pc.is_valid(batch.column("label")))
        if self.key_filter != KEEP_ALL:
            keep = [self.key_filter.keeps(key) for key in batch.column("key").to_pylist()]
            batch = batch.filter(pa.array(keep, pa.bool_()))
        return batch

    def read_images(self, rows: pa.Table) -> Iterator[bytes | ImageError]:
        opened = None
        with ExitStack() as stack:  # one file is open, and only while this is read
            for location, row in zip(
                rows.column("location").to_pylist(), rows.column("row").to_pylist(), strict=True
            ):
                held = self._held
                if held is None or not held.covers(location, row):
                    if location != opened:
                        stack.close()
                        is_root = location == self.root.name and is_file(self.root)
                        path = self.root if is_root else self.root / location
                        table, opened = stack.enter_context(use_table(path)), location
                    held = self._held = _read_group_of(table, path, location, row)
                values, offset = held.table, row - held.first_row
                yield _check_image(**{n: values[n][offset].as_py() for n in values.column_names})


def _read_group_of(table: pq.ParquetFile, path: AnyPath, location: str, row: int) -> _HeldGroup:
    """Read the row group that holds a row of the file."""
    counts = [table.metadata.row_group(g).num_rows for g in range(table.num_row_groups)]
    ends = np.cumsum(counts)
    number = int(np.searchsorted(ends, row, side="right"))
    names = table.schema_arrow.names
    columns = ["image", *(f.name for f in ERROR_FIELDS if f.name in names)]
    group = read_columns(table, path, [number], columns)
    return _HeldGroup(location, int(ends[number]) - group.num_rows, group)


def _check_image(
    image: Any, error: str | None = None, error_detail: str | None = None
) -> bytes | ImageError:
    data: bytes | None = image["bytes"] if isinstance(image, dict) else image
    if error:
        return ImageError(error, error_detail or "")
    if data is None:
        return ImageError("not_found", "the row holds no image bytes")
    if len(data) > MAX_IMAGE_BYTES:
        return ImageError("too_large", f"{len(data)} bytes; the limit is {MAX_IMAGE_BYTES}")
    return data
