"""Hold listed rows in buckets of the hash of their key: in memory while few, then in files.

A piece of a file (`row_files`) is the rows of one bucket. So the rows of a bucket are one range of
bytes in each file, whatever number of files there is, and any process can sort a bucket without the
others.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cifake_ray.core.schema import SPLITS
from cifake_ray.errors import UsageError
from cifake_ray.storage.io.files import discard, list_folder
from cifake_ray.storage.io.paths import AnyPath
from cifake_ray.storage.io.records import check_columns
from cifake_ray.storage.runs.listed_shards import ListedShards
from cifake_ray.storage.runs.row_files import HASH, RowFile, write_pieces

FOLDER_PREFIX = ".listing-"  # of the folder of such files, beside those of the manifest
FOLDER_NAME = re.compile(re.escape(FOLDER_PREFIX) + "[0-9a-f]{8}")
NUM_BUCKETS = 256  # the upper 8 bits of the hash
MAX_HELD_ROWS = 500_000  # in memory; then they are written
MAX_HELD_BYTES = 256 * 2**20  # the same; far below the 2 GiB that an array of strings can have

_FIRST, _KEY = pa.field(HASH, pa.uint64()), pa.field("key", pa.string())


def hash_keys(keys: pa.Array) -> np.ndarray:
    """Return the hash by which each key is dealt, uint64[keys]; it must never change."""
    values = keys.cast(pa.binary()).to_pylist()
    hashes = b"".join([hashlib.blake2b(value, digest_size=8).digest() for value in values])
    return np.frombuffer(hashes, ">u8").astype(np.uint64)


def number_splits(column: pa.ChunkedArray) -> np.ndarray:
    """Return the place of each split in SPLITS; that of all others, and of none, is behind them."""
    places = pc.index_in(column, pa.array(SPLITS))
    numbers: np.ndarray = pc.fill_null(places, len(SPLITS)).to_numpy()
    return numbers


class HashRange(NamedTuple):
    """The buckets from `start` to before `stop`; of one that is too large, a part."""

    start: int
    stop: int
    part: int = 0
    num_parts: int = 1  # a power of two: each has the same next bits of the hash


@dataclass
class ListedRows:
    """Rows in buckets, and how many they are. The files lie in `folder`."""

    folder: AnyPath
    files: list[RowFile] = field(default_factory=list)
    # By bucket and split, see `number_splits`.
    counts: np.ndarray = field(
        default_factory=lambda: np.zeros((NUM_BUCKETS, len(SPLITS) + 1), np.int64)
    )
    size_bytes: int = 0  # of the images
    table_bytes: int = 0  # of the rows themselves in memory
    # Of a listing that keeps its order: its rows. Those here are then of their keys alone.
    shards: ListedShards | None = None
    held: pa.Table | None = None  # the rows that are in no file, in the order of their buckets
    _added: list[pa.RecordBatch] = field(default_factory=list)
    _num_added: int = 0

    @property
    def num_rows(self) -> int:
        return int(self.counts.sum())

    def add(self, batch: pa.RecordBatch) -> None:
        """Add rows with at least the columns key, size_bytes and split."""
        if self.shards is not None:
            self.shards.add(batch)
            batch = batch.select(["key", "size_bytes", "split"])
        hashes = hash_keys(batch.column("key"))
        np.add.at(self.counts, (_find_buckets(hashes), number_splits(batch.column("split"))), 1)
        self.size_bytes += int(np.nansum(batch.column("size_bytes").to_numpy(False)))
        self.table_bytes += batch.nbytes
        schema = batch.schema.insert(0, pa.field(HASH, pa.uint64()))
        arrays = [pa.array(hashes), *batch.columns]
        self._added.append(pa.RecordBatch.from_arrays(arrays, schema=schema))
        self._num_added += batch.num_rows
        if self._num_added >= self.max_rows:
            self.write()

    @property
    def max_rows(self) -> int:
        """Return how many rows are to be in memory at most."""
        mean_bytes = self.table_bytes // max(self.num_rows, 1)
        return min(MAX_HELD_ROWS, MAX_HELD_BYTES // max(mean_bytes, 1))

    def hold(self) -> None:
        """Put the rows that were added into the order of their buckets."""
        if self._added:
            table = pa.Table.from_batches(self._added)
            order = np.argsort(_find_buckets(table.column(0).to_numpy()), kind="stable")
            self.held = table.take(pa.array(order)).combine_chunks()
            self._added, self._num_added = [], 0

    def write(self) -> None:
        """Write the rows that are in memory to a file."""
        if self.shards is not None:
            self.shards.write()
        self.hold()
        if self.held is None:
            return
        bounds = _find_bounds(self.held)
        pieces = (self.held.slice(start, stop - start) for start, stop in pairwise(bounds))
        self.files.append(write_pieces(self.folder, pieces))
        self.held = None

    def read_sorted(self, start: int, stop: int, key_column: str | None) -> Iterator[pa.Table]:
        """Yield the rows of the buckets from `start` to before `stop` by hash and key.

        All rows of a hash are in one table. UsageError when a key is listed twice.
        """
        for some in divide_buckets(self.counts, self.max_rows, start, stop):
            if (table := self.read(some)) is not None:
                check_unique(table, key_column)
                yield table.remove_column(0)

    def read(self, some: HashRange) -> pa.Table | None:
        """Return the rows of a range by hash and key, with the hash; None if there are none."""
        tables = list(self._read_range(some))
        if not tables:
            return None
        table = pa.concat_tables(tables)
        hashes = table.column(0).to_numpy()
        order = np.argsort(hashes, kind="stable")
        if np.any(np.diff(hashes[order]) == 0):
            keys = pa.table({"hash": hashes, "key": table.column("key")})
            by = [("hash", "ascending"), ("key", "ascending")]
            order = pc.sort_indices(keys, sort_keys=by)
        return table.take(pa.array(order))

    def _read_range(self, some: HashRange) -> Iterator[pa.Table]:
        for table in self._read(some.start, some.stop):
            if some.num_parts > 1:
                following = table.column(0).to_numpy() << np.uint64(8)
                parts = following >> np.uint64(65 - some.num_parts.bit_length())
                table = table.filter(pa.array(parts == some.part))
            if table.num_rows:
                yield table

    def _read(self, start: int, stop: int) -> Iterator[pa.Table]:
        for file in self.files:
            yield from file.read(self.folder, start, stop, _check_schema)
        self.hold()
        if self.held is not None:
            bounds = _find_bounds(self.held)
            yield self.held.slice(bounds[start], bounds[stop] - bounds[start])


def divide_buckets(
    counts: np.ndarray, max_rows: int, start: int = 0, stop: int = NUM_BUCKETS
) -> Iterator[HashRange]:
    """Yield ranges with at most `max_rows` rows, about: some buckets, or a part of one."""
    num_rows, first = 0, start
    for bucket, count in enumerate(counts[start:stop].sum(axis=1).tolist(), start):
        if num_rows and num_rows + count > max_rows:
            yield from _divide_range(first, bucket, num_rows, max_rows)
            num_rows, first = 0, bucket
        num_rows += count
    yield from _divide_range(first, stop, num_rows, max_rows)


def _divide_range(start: int, stop: int, num_rows: int, max_rows: int) -> Iterator[HashRange]:
    num_parts = 1 << max(0, -(-num_rows // max_rows) - 1).bit_length()
    yield from (HashRange(start, stop, part, num_parts) for part in range(num_parts))


def check_unique(table: pa.Table, key_column: str | None) -> None:
    """Raise UsageError when a key is twice in a table in order of hash and key."""
    if not np.any(np.diff(table.column(0).to_numpy()) == 0):
        return
    keys = table.column("key").combine_chunks()
    twice = keys[1:].filter(pc.equal(keys[1:], keys[:-1])).unique()
    if len(twice):
        examples = ", ".join(repr(key) for key in twice[:3].to_pylist())
        raise UsageError(
            f"{len(twice)} or more keys"
            + (f" of the column {key_column!r}" if key_column else "")
            + f" are listed twice, such as {examples}; every key must be unique"
            + ("; --drop-columns key numbers the rows instead" if key_column == "key" else "")
        )


def remove_rows(folder: AnyPath) -> None:
    """Remove a folder of listed rows, as far as that is allowed; first the records that name them.

    So nothing of what a kill leaves names rows that are gone.
    """
    for path in sorted(list_folder(folder), key=lambda path: path.suffix != ".json"):
        discard(path)
    if isinstance(folder, Path):
        with suppress(OSError):
            folder.rmdir()


def _check_schema(schema: pa.Schema) -> None:
    check_columns([schema.field(0)], [_FIRST])
    check_columns(schema, [_KEY])


def _find_buckets(hashes: np.ndarray) -> np.ndarray:
    return (hashes >> np.uint64(56)).astype(np.uint8)


def _find_bounds(table: pa.Table) -> list[int]:
    """Return where each bucket begins in rows in the order of buckets, and the end."""
    buckets = _find_buckets(table.column(0).to_numpy())
    bounds: list[int] = np.searchsorted(buckets, np.arange(NUM_BUCKETS + 1)).tolist()
    return bounds
