"""Order the images of row groups that are streamed, so that ranks read different ones.

An epoch has a fixed number of lanes, a power of two. Each is a row of neighbouring row groups, and
image p of the epoch is the next one of lane `p % num_lanes`. Of each global batch, rank r takes the
images with `p % num_ranks == r`, so whole lanes, as long as the number of ranks is a power of two
and no larger than that of the lanes: then a row group is read by one rank only. The global batches
are the same for every number of ranks; of another number, several ranks read the same row group.

Lanes are equally long, so a row group may lie across the end of one. Ranks have neighbouring lanes
of the REAL and of the FAKE half, and every second lane runs backwards, so that a row group which
two lanes of a rank share is in memory once: 2 * (num_ranks - 1) row groups at most are read twice.

The shuffle: a batch has as many images of one lane as of any other. Row groups come in random
order, the images of each too, and row groups with more FAKE images are in the upper lanes. So of
96 row groups with 1,000 images each, in 64 lanes, 1.3% of the pairs in a batch of 128 come from
the same row group (of a whole shuffle 1.0%). Of files sorted by label, the FAKE share of a batch
is that of all images to 0.005; of mixed ones it has the deviation of chance (`test_lanes.py`). Two
row groups of one lane are never in the same batch, but where one ends and the next begins.
"""

from __future__ import annotations

import numpy as np

from cifake_ray.core.schema import FAKE

HELD_BYTES = 1 << 30  # of the row groups that one process reads at the same time
MIN_LANES, MAX_LANES = 8, 64


def choose_num_lanes(num_groups: int, mean_bytes: float) -> int:
    """Return the number of lanes for row groups, the same on every rank.

    As many as fit HELD_BYTES, and no more than there are row groups, but 2 at least.
    """
    num_fitting = int(HELD_BYTES // max(1.0, mean_bytes))
    most = min(max(MIN_LANES, min(num_fitting, MAX_LANES)), max(2, num_groups))
    return 1 << (most.bit_length() - 1)


def order_lanes(
    group: np.ndarray, labels: np.ndarray, num_lanes: int, rng: np.random.Generator
) -> np.ndarray:
    """Return int64[N], a permutation of images; `group` int32[N] is the row group of each.

    Some may be copies of others, as `--balance-sources` draws them.
    """
    _, number, counts = np.unique(group, return_inverse=True, return_counts=True)
    share_fake = np.bincount(number, labels == FAKE) / counts
    line = rng.permutation(len(counts))
    line = line[np.argsort(np.round(4 * share_fake[line]), kind="stable")]
    place = np.empty(len(line), np.int64)
    place[line] = np.arange(len(line))
    images = rng.permutation(len(group))
    images = images[np.argsort(place[number[images]], kind="stable")]
    order, start = np.empty(len(group), np.int64), 0
    for turn, lane in enumerate(_list_lanes(num_lanes)):
        places = order[lane::num_lanes]
        part = images[start : start + len(places)]
        places[:] = part[::-1] if turn % 2 else part
        start += len(places)
    return order


def _list_lanes(num_lanes: int) -> list[int]:
    """Return the lanes in the order of their row groups.

    Within each half by their reversed bits: neighbours have the same rank.
    """
    half = num_lanes // 2
    width = half.bit_length() - 1
    lanes = [int(f"{n:0{width}b}"[::-1], 2) if width else n for n in range(half)]
    return lanes + [half + lane for lane in reversed(lanes)]


def pair_lanes(start: int, batch_size: int, num_lanes: int) -> np.ndarray:
    """Return int64[batch_size], the partner of each place in a batch that starts at image `start`.

    Partners have the same rank, if it has two places of each batch at least. They are of both
    halves of the lanes in turn, so that REAL and FAKE images of sorted files meet.
    """
    step = min(num_lanes // 2, 1 << (max(1, batch_size // 2).bit_length() - 1))
    lane = (start + np.arange(batch_size)) % step
    partners = np.empty(batch_size, np.int64)
    partners[np.argsort(lane, kind="stable")] = np.lexsort((-np.arange(batch_size), lane))
    return partners


def deal_groups(group: np.ndarray, num_ranks: int) -> np.ndarray:
    """Return int64[num_ranks + 1], where the images of each rank start; row groups stay whole.

    `group` int32[N] is sorted. Without enough row groups some ranks get none.
    """
    starts = np.append(np.flatnonzero(np.diff(group, prepend=-1)), len(group))
    wanted = np.arange(num_ranks + 1) * len(group) / num_ranks
    nearest: np.ndarray = starts[np.abs(starts[None] - wanted[:, None]).argmin(axis=1)]
    return nearest
