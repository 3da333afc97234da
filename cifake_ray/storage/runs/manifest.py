"""Write and read the manifest: the frozen listing, every key once, dealt to shards.

Keys are dealt in the order of a hash of the key, so that every shard is a random sample of
one split. The listing is sorted through unnamed temporary files, one for each range of the hash, so
memory is that of a 64th of the keys and a kill leaves nothing behind.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import IO

import numpy as np
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
from cifake_ray.errors import NothingToDo, StorageError, UsageError
from cifake_ray.storage.io.files import make_folder, open_ranges, write_bytes
from cifake_ray.storage.io.paths import AnyPath, explain_errors, is_from_s3fs
from cifake_ray.storage.io.records import PARQUET_ERRORS, check_columns
from cifake_ray.storage.sources.source import (
    MAX_SHARD_BYTES,
    MAX_SHARD_ROWS,
    MIN_SHARD_ROWS,
    Listing,
)

FILE_NAME = re.compile(r"[0-9a-f]{8}-\d{5}\.parquet")
NUM_RANGES = 64  # temporary files while sorting; memory is one of them
SHARDS_PER_FILE = 256


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
        """Raise ValueError for files that `write_manifest` does not write."""
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


def hash_key(key: str) -> int:
    """Return the uint64 by which keys are dealt; it must never change."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")


class HashSorter:
    """Sort batches of rows by the hash of their key, on disk."""

    def __init__(self) -> None:
        self.streams: dict[int, tuple[IO[bytes], pa.ipc.RecordBatchStreamWriter]] = {}  # by range
        self.num_rows = 0
        self.size_bytes = 0

    def add(self, batch: pa.RecordBatch) -> None:
        keys = batch.column("key").to_pylist()
        hashes = np.fromiter(map(hash_key, keys), np.uint64, len(keys))
        # The hash is first and has no name: a list may use any name for its columns.
        schema = batch.schema.insert(0, pa.field("", pa.uint64()))
        batch = pa.RecordBatch.from_arrays([pa.array(hashes), *batch.columns], schema=schema)
        ranges = (hashes >> np.uint64(58)).astype(np.intp)  # the upper 6 bits: NUM_RANGES
        order = np.argsort(ranges, kind="stable")
        bounds = np.searchsorted(ranges[order], np.arange(NUM_RANGES + 1))
        for index in range(NUM_RANGES):
            rows = order[bounds[index] : bounds[index + 1]]
            if len(rows):
                if index not in self.streams:
                    file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the sorter
                    self.streams[index] = file, pa.ipc.new_stream(file, batch.schema)
                self.streams[index][1].write_batch(batch.take(pa.array(rows)))
        self.num_rows += batch.num_rows
        self.size_bytes += int(np.nansum(batch.column("size_bytes").to_numpy(False)))

    def drain(self, key_column: str | None) -> Iterator[pa.Table]:
        """Yield tables in the order of the hash. UsageError when a key is listed twice."""
        for table in self.drain_all():
            check_unique(table, key_column)
            yield table

    def drain_all(self) -> Iterator[pa.Table]:
        """Yield tables in the order of the hash; all rows of a key are in one of them."""
        for index in sorted(self.streams):
            file, writer = self.streams[index]
            writer.close()
            file.seek(0)
            table = pa.ipc.open_stream(file).read_all()
            file.close()
            keys = pa.table({"hash": table.column(0), "key": table.column("key")})
            order = [("hash", "ascending"), ("key", "ascending")]
            yield table.remove_column(0).take(pc.sort_indices(keys, sort_keys=order))

    def close(self) -> None:
        """Close the files, also those of a listing that broke off."""
        for file, _ in self.streams.values():
            file.close()


def check_unique(table: pa.Table, key_column: str | None) -> None:
    """Raise UsageError when neighbours in a sorted table have the same key."""
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


def _deal_rows(tables: Iterable[pa.Table], shard_rows: int) -> Iterator[pa.Table]:
    """Regroup tables of any size into tables of `shard_rows` of one split; the last are smaller.

    So a reader that knows files but not rows, such as `load_dataset`, can tell the splits apart.
    Splits of other names are dealt together: a column of that name may hold anything.
    """
    waiting: dict[str | None, pa.Table] = {}
    for table in tables:
        split_of = table.column("split")
        known = pc.if_else(
            pc.is_in(split_of, pa.array(SPLITS)), split_of, pa.scalar(None, "string")
        )
        for split in known.unique().to_pylist():
            rows = table.filter(pc.is_null(known) if split is None else pc.equal(known, split))
            rows = pa.concat_tables([waiting[split], rows]) if split in waiting else rows
            whole = rows.num_rows - rows.num_rows % shard_rows
            for start in range(0, whole, shard_rows):
                yield rows.slice(start, shard_rows)
            waiting[split] = rows.slice(whole)
    yield from (rows for rows in waiting.values() if rows.num_rows)


def _deal_listing(listing: Listing, shard_rows: int | None) -> Iterator[pa.Table]:
    with closing(HashSorter()) as sorter:
        if listing.keeps_order:
            for batch in listing.batches:
                sorter.add(batch.select(["key", "size_bytes"]))
                yield pa.Table.from_batches([batch])
            for _ in sorter.drain(listing.key_column):  # raises for a key that is listed twice
                pass
            return
        for batch in listing.batches:
            sorter.add(batch)
        rows = shard_rows or choose_shard_rows(sorter.num_rows, sorter.size_bytes)
        for shard in _deal_rows(sorter.drain(listing.key_column), rows):
            yield shard.sort_by("key")


def write_manifest(
    folder: AnyPath, run_id: str, listing: Listing, shard_rows: int | None, first: int = 0
) -> Manifest:
    """List the source and write `folder/<run_id>-00000.parquet` and so on, one row group a shard.

    `first` is the number of the first shard.
    NothingToDo when the source holds no file; UsageError when a key is listed twice.
    """
    make_folder(folder, parents=False)
    files: list[ManifestFile] = []
    num_rows = size_bytes = 0
    shards = _deal_listing(listing, shard_rows)
    pending = next(shards, None)
    if pending is None:
        raise NothingToDo(listing.explain_empty())
    while pending is not None:
        name = f"{run_id}-{len(files):05d}.parquet"
        first_shard = first + sum(file.num_shards for file in files)
        num_shards = 0
        schema = pending.schema.with_metadata({b"schema_version": str(SCHEMA_VERSION).encode()})
        sink = pa.BufferOutputStream()
        with pq.ParquetWriter(sink, schema, compression="zstd", write_page_checksum=True) as writer:
            while pending is not None and num_shards < SHARDS_PER_FILE:
                writer.write_table(pending, row_group_size=max(pending.num_rows, 1))
                num_rows += pending.num_rows
                size_bytes += int(np.nansum(pending.column("size_bytes").to_numpy()))
                num_shards += 1
                pending = next(shards, None)
        data = sink.getvalue().to_pybytes()
        write_bytes(folder / name, data)
        files.append(ManifestFile(name, first_shard, num_shards, hashlib.sha256(data).hexdigest()))
    return Manifest(tuple(files), num_rows, size_bytes)


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
