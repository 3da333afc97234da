"""Take only some of the images of a listing: the first ones, or a random sample."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from cifake_ray.config import BatchConfig
from cifake_ray.errors import UsageError
from cifake_ray.storage.sources.source import LISTING_BATCH_ROWS, MIN_SHARD_ROWS, Listing


def choose_rows(listing: Listing, config: BatchConfig) -> None:
    """Leave in a listing what `--limit` and `--sample` choose of it."""
    if config.limit is not None:
        limit_rows(listing, config.limit)
    if config.sample is not None:
        sample_rows(listing, config.sample, config.seed, config.shard_size)


def limit_rows(listing: Listing, num_rows: int) -> None:
    """End a listing after `num_rows` images."""

    def cut(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        num_read = 0
        for batch in batches:
            yield batch.slice(0, num_rows - num_read)
            num_read += batch.num_rows
            if num_read >= num_rows:
                _describe_labels(listing, num_read)
                return

    listing.change_batches(cut)


def _describe_labels(listing: Listing, num_read: int) -> None:
    """Say what the labels of the rows that were read are taken for.

    None that is understood is no error, as in a whole listing: those behind may be others.
    """
    try:
        listing.conclude(listing)
    except UsageError as error:
        listing.add_note(str(error))
    if listing.labels and listing.labels.counts:
        listing.add_note(f"--limit: labels are counted in the {num_read:,} rows that were read")


def sample_rows(listing: Listing, num_rows: int, seed: int, shard_rows: int | None) -> None:
    """Leave a random sample in a listing, in which each label keeps its share.

    Images with the smallest hashes of seed and key are taken, so the same images of a source make
    the same sample in whatever order they are listed. Memory holds a few times the sample.
    """

    def choose(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        strata: dict[int | None, _Stratum] = {}
        num_listed = 0
        for batch in batches:
            places = np.arange(num_listed, num_listed + batch.num_rows)
            num_listed += batch.num_rows
            hashes = np.array([_hash_key(seed, k) for k in batch.column("key").to_pylist()])
            labels = batch.column("label").to_pylist()
            for label in set(labels):
                rows = np.flatnonzero([other == label for other in labels])
                stratum = strata.setdefault(label, _Stratum(num_rows))
                stratum.add(batch.take(pa.array(rows)), hashes[rows], places[rows])
        if not strata:
            return
        shares = share_out(num_rows, [stratum.num_seen for stratum in strata.values()])
        for stratum, share in zip(strata.values(), shares, strict=True):
            stratum.keep(share)
        listing.left_out["not in the sample"] += num_listed - sum(shares)
        places = np.concatenate([stratum.places for stratum in strata.values()])
        table = pa.concat_tables(t for stratum in strata.values() for t in stratum.tables)
        table = table.take(pa.array(np.argsort(places))).combine_chunks()  # neighbours read fast
        size = (shard_rows or MIN_SHARD_ROWS) if listing.keeps_order else LISTING_BATCH_ROWS
        yield from table.to_batches(max_chunksize=size)

    listing.change_batches(choose)


class _Stratum:
    """The images of one label with the smallest hashes."""

    def __init__(self, max_rows: int) -> None:
        self.max_rows, self.num_seen = max_rows, 0
        self.tables: list[pa.Table] = []
        self.hashes, self.places = np.empty(0, np.uint64), np.empty(0, np.int64)

    def add(self, batch: pa.RecordBatch, hashes: np.ndarray, places: np.ndarray) -> None:
        self.num_seen += batch.num_rows
        self.tables.append(pa.Table.from_batches([batch]))
        self.hashes = np.append(self.hashes, hashes)
        self.places = np.append(self.places, places)
        if len(self.hashes) > 2 * self.max_rows + LISTING_BATCH_ROWS:
            self.keep(self.max_rows)

    def keep(self, num_rows: int) -> None:
        chosen = np.argsort(self.hashes, kind="stable")[:num_rows]
        self.tables = [pa.concat_tables(self.tables).take(pa.array(chosen)).combine_chunks()]
        self.hashes, self.places = self.hashes[chosen], self.places[chosen]


def _hash_key(seed: int, key: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=7).digest(), "big")


def share_out(total: int, sizes: list[int]) -> list[int]:
    """Divide `total` in proportion to the sizes, none above its size; each gets one if possible."""
    total = min(total, sum(sizes))
    exact = np.array(sizes) * total / sum(sizes)
    shares = np.floor(exact).astype(int)
    if total >= len(sizes):
        shares = np.maximum(shares, 1)
    while (rest := total - int(shares.sum())) != 0:
        # The first step is by the largest remainder; steps back are from the largest share.
        index = int(np.argmax(exact - shares if rest > 0 else shares))
        shares[index] += 1 if rest > 0 else -1
    return [int(share) for share in shares]
