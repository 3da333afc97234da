"""Deal rows to shards in the order of the hash of their key: each is a random sample of a split.

Which rows a shard has follows from how many there are in each bucket, so shards can be made apart.
A reader that knows files but not rows, such as `load_dataset`, can tell the splits apart.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from cifake_ray.errors import StorageError
from cifake_ray.storage.runs.listed_rows import ListedRows, number_splits


class Shard(NamedTuple):
    """The rows from `start` to before `stop` of a split, in the order of hash and key."""

    bucket: int  # that has the last of them
    split: int  # see `number_splits`: all that are none of SPLITS are dealt together
    start: int
    stop: int


def plan_shards(counts: np.ndarray, shard_rows: int) -> list[Shard]:
    """Return all shards in the order in which they are complete, and last those that are smaller.

    The last of each split may be. `counts` are the rows by bucket and split.
    """
    shards = []
    for split, ends in enumerate(counts.cumsum(axis=0).T):
        starts = np.arange(0, ends[-1], shard_rows)
        stops = np.minimum(starts + shard_rows, ends[-1])
        buckets = np.searchsorted(ends, stops)
        shards += [
            Shard(bucket, split, start, stop)
            for bucket, start, stop in zip(
                buckets.tolist(), starts.tolist(), stops.tolist(), strict=True
            )
        ]
    return sorted(shards, key=lambda shard: (shard.stop - shard.start < shard_rows, shard))


def deal_shards(
    rows: ListedRows, shards: Sequence[Shard], key_column: str | None
) -> Iterator[pa.Table]:
    """Yield the rows of some neighbouring shards, a table each, sorted by key.

    UsageError when a key is listed twice in the buckets that they touch.
    """
    ends = rows.counts.cumsum(axis=0)
    wanted = {
        split: (min(s.start for s in own), max(s.stop for s in own))
        for split in {shard.split for shard in shards}
        if (own := [shard for shard in shards if shard.split == split])
    }
    first = min(
        int(np.searchsorted(ends[:, split], start, side="right"))
        for split, (start, _) in wanted.items()
    )
    seen = ends[first] - rows.counts[first]  # rows of each split in the buckets before
    waiting = {split: list[pa.Table]() for split in wanted}
    left = deque(shards)
    for table in rows.read_sorted(first, max(shard.bucket for shard in shards) + 1, key_column):
        splits = number_splits(table.column("split"))
        for split, (start, stop) in wanted.items():
            places = np.flatnonzero(splits == split)
            begin, end = np.clip([start - seen[split], stop - seen[split]], 0, len(places))
            waiting[split].append(table.take(pa.array(places[begin:end])))
            seen[split] += len(places)
        while left and seen[left[0].split] >= left[0].stop:
            shard = left.popleft()
            ready = pa.concat_tables(waiting[shard.split])
            waiting[shard.split] = [ready.slice(shard.stop - shard.start)]
            yield ready.slice(0, shard.stop - shard.start).sort_by("key").combine_chunks()
    if left:
        raise StorageError(
            f"{rows.folder}: it has fewer rows than were listed; remove the folder and run the same"
            " command again"
        )
