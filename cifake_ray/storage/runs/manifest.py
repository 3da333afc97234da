"""Write and read the manifest: the frozen listing, every key once, dealt to shards.

A file of it is written whole by one process, from the rows of its shards alone, so any number of
workers write the same bytes.
"""

from __future__ import annotations

import hashlib
import re
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, pairwise

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cifake_ray.core.schema import (
    FAKE,
    IMAGE_ERRORS,
    MANIFEST_FIELDS,
    REAL,
    SCHEMA_VERSION,
    SPLITS,
)
from cifake_ray.errors import NothingToDo, StorageError
from cifake_ray.storage.io.files import open_ranges, write_bytes
from cifake_ray.storage.io.paths import AnyPath, explain_errors, is_from_s3fs
from cifake_ray.storage.io.records import PARQUET_ERRORS, check_columns
from cifake_ray.storage.runs.deal import Shard, deal_shards, plan_shards
from cifake_ray.storage.runs.list_parts import THIS_PROCESS, TaskPool
from cifake_ray.storage.runs.listed_rows import FOLDER_NAME, NUM_BUCKETS, ListedRows
from cifake_ray.storage.runs.listed_shards import ListedShards
from cifake_ray.storage.sources.source import (
    MAX_SHARD_BYTES,
    MAX_SHARD_ROWS,
    MIN_SHARD_ROWS,
    Listing,
)

FILE_NAME = re.compile(r"[0-9a-f]{8}-\d{5}\.parquet")
OWN_NAME = re.compile(rf"{FILE_NAME.pattern}|{FOLDER_NAME.pattern}")  # all in the folder
SHARDS_PER_FILE = 256
CHECKS = 32  # pieces of work that look for keys which are listed twice


@dataclass(frozen=True)
class ManifestFile:
    """One file of the manifest: its shards are its row groups, in order."""

    name: str
    first_shard: int
    num_shards: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    files: tuple[ManifestFile, ...]
    num_rows: int
    size_bytes: int

    def check(self) -> None:
        """Raise ValueError for files that `deal_manifest` does not write."""
        next_shard = 0
        for file in self.files:
            if not FILE_NAME.fullmatch(file.name):
                raise ValueError(f"{file.name!r} is no name of a manifest file")
            if file.first_shard != next_shard or not 1 <= file.num_shards <= SHARDS_PER_FILE:
                raise ValueError(f"{file.name} does not hold the shards from {next_shard} on")
            next_shard += file.num_shards
        if not 1 <= next_shard <= self.num_rows:
            raise ValueError(f"{next_shard} shards cannot hold {self.num_rows} rows")

    @property
    def num_shards(self) -> int:
        return sum(file.num_shards for file in self.files)

    def list_extents(self) -> list[tuple[ManifestFile, ...]]:
        """Return the files as they were at first and after each extension, the last are all."""
        starts = [file.name.partition("-")[0] for file in self.files]
        ends = [n for n in range(1, len(starts)) if starts[n] != starts[n - 1]]
        return [self.files[:end] for end in (*ends, len(starts))]


def choose_shard_rows(num_rows: int, size_bytes: int) -> int:
    """Return the images per shard: N/1000 between bounds, and at most 256 MiB."""
    rows = min(max(num_rows // 1000, MIN_SHARD_ROWS), MAX_SHARD_ROWS)
    # Lists need not say sizes; then more rows could be more than memory holds.
    mean_bytes = size_bytes // max(num_rows, 1) or MAX_SHARD_BYTES // MIN_SHARD_ROWS
    return max(1, min(rows, MAX_SHARD_BYTES // mean_bytes))


def deal_manifest(
    folder: AnyPath,
    run_id: str,
    listing: Listing,
    rows: ListedRows,
    shard_rows: int | None,
    first: int = 0,
    workers: TaskPool = THIS_PROCESS,
) -> Manifest:
    """Write `folder/<run_id>-00000.parquet` and so on, one row group a shard.

    Workers write them if rows are in files. `first` is the number of the first shard. Shards of a
    listing that keeps its order stay as they are. NothingToDo when there are no rows; UsageError
    when a key is listed twice.
    """
    if not rows.num_rows:
        raise NothingToDo(listing.explain_empty())
    where: TaskPool = THIS_PROCESS
    if rows.files or (rows.shards is not None and rows.shards.files):
        rows.write()  # what is still in memory: other processes read it too
        where = workers
    if rows.shards is None:
        rows_per_shard = shard_rows or choose_shard_rows(rows.num_rows, rows.size_bytes)
        shards = plan_shards(rows.counts, rows_per_shard)
        num_shards = len(shards)
        write = _Dealer(folder, run_id, rows, shards, first, listing.key_column).write_file
    else:
        ranges = deque(pairwise(range(0, NUM_BUCKETS + 1, NUM_BUCKETS // CHECKS)))
        keys = replace(rows, shards=None)
        for _ in where.map_items(_KeyChecker(keys, listing.key_column).check_keys, ranges):
            pass
        num_shards = rows.shards.num_shards
        write = _Copier(folder, run_id, rows.shards, first).write_file
    numbers = deque(range(-(-num_shards // SHARDS_PER_FILE)))
    files = sorted(where.map_items(write, numbers), key=lambda file: file.first_shard)
    return Manifest(tuple(files), rows.num_rows, rows.size_bytes)


@dataclass(frozen=True)
class _Dealer:
    """Writes any file of a manifest: what a worker does."""

    folder: AnyPath
    run_id: str
    rows: ListedRows
    shards: list[Shard]
    first: int
    key_column: str | None

    def write_file(self, number: int) -> ManifestFile:
        start = number * SHARDS_PER_FILE
        shards = self.shards[start : start + SHARDS_PER_FILE]
        tables = deal_shards(self.rows, shards, self.key_column)
        name = f"{self.run_id}-{number:05d}.parquet"
        return _write_file(self.folder / name, self.first + start, tables)


@dataclass(frozen=True)
class _KeyChecker:
    """Looks for keys that are listed twice: what a worker does."""

    rows: ListedRows
    key_column: str | None

    def check_keys(self, buckets: tuple[int, int]) -> None:
        for _ in self.rows.read_sorted(*buckets, self.key_column):
            pass  # raises


@dataclass(frozen=True)
class _Copier:
    """Writes any file of a manifest from shards that were listed in order."""

    folder: AnyPath
    run_id: str
    shards: ListedShards
    first: int

    def write_file(self, number: int) -> ManifestFile:
        start = number * SHARDS_PER_FILE
        tables = self.shards.read(start, start + SHARDS_PER_FILE)
        name = f"{self.run_id}-{number:05d}.parquet"
        return _write_file(self.folder / name, self.first + start, tables)


def _write_file(path: AnyPath, first_shard: int, shards: Iterator[pa.Table]) -> ManifestFile:
    """Write shards as the row groups of a file."""
    sink, num_shards = pa.BufferOutputStream(), 0
    start = next(shards)
    schema = start.schema.with_metadata({b"schema_version": str(SCHEMA_VERSION).encode()})
    with pq.ParquetWriter(sink, schema, compression="zstd", write_page_checksum=True) as writer:
        for table in chain([start], shards):
            writer.write_table(table, row_group_size=table.num_rows)
            num_shards += 1
    data = sink.getvalue().to_pybytes()
    write_bytes(path, data)
    return ManifestFile(path.name, first_shard, num_shards, hashlib.sha256(data).hexdigest())


def find_shards_by_split(
    folder: AnyPath, files: Iterable[ManifestFile]
) -> dict[str | None, list[int]] | None:
    """Return the shards of each of SPLITS and of none, by the footers; None if a shard is neither.

    StorageError when the manifest is damaged.
    """
    shards: dict[str | None, list[int]] = {}
    for file in files:
        with _open_manifest(folder / file.name) as table:
            column = table.schema_arrow.get_field_index("split")
            for group in range(file.num_shards):
                counts = table.metadata.row_group(group)
                values = counts.column(column).statistics
                if values is None:
                    return None
                is_null = values.null_count == counts.num_rows
                is_mixed = not is_null and (values.null_count or values.min != values.max)
                split = None if is_null else values.min
                if is_mixed or split not in (*SPLITS, None):
                    return None
                shards.setdefault(split, []).append(file.first_shard + group)
    return shards


@contextmanager
def _open_manifest(path: AnyPath) -> Iterator[pq.ParquetFile]:
    with explain_errors(path):
        try:
            with open_ranges(path) as opened:
                yield pq.ParquetFile(opened, pre_buffer=True, page_checksum_verification=True)
        except PARQUET_ERRORS as error:
            if is_from_s3fs(error):  # the store has failed, which says nothing of the file
                raise
            raise StorageError(
                f"{path}: the manifest is damaged or missing ({error}); start again in a new folder"
            ) from error


def read_manifest_shard(folder: AnyPath, file: ManifestFile, shard: int) -> pa.Table:
    """Return the rows of one shard, in key order. StorageError when the manifest is damaged."""
    with _open_manifest(folder / file.name) as table:
        check_columns(table.schema_arrow, MANIFEST_FIELDS)
        rows = table.read_row_group(shard - file.first_shard)
        if rows.column("key").null_count:
            raise ValueError("a row without a key")
        for name, known in (("label", (REAL, FAKE)), ("error", IMAGE_ERRORS)):
            values = rows.column(name).drop_null()
            if pc.any(pc.invert(pc.is_in(values, pa.array(known, values.type)))).as_py():
                raise ValueError(f"the column {name} holds something else than {known}")
        return rows
