"""The order of streamed images: shuffled well, and row groups of one rank are not another's."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import numpy as np
import pytest

from cifake_ray.core.training.lanes import choose_num_lanes, deal_groups, order_lanes, pair_lanes
from cifake_ray.core.training.sampling import draw_both_classes, draw_by_source

BATCH_SIZE = 128


def make_groups(counts: list[int], share_fake: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """The row group and the label of each image."""
    rng = np.random.default_rng(0)
    labels = [rng.random(n) < share for n, share in zip(counts, share_fake, strict=True)]
    return np.repeat(np.arange(len(counts)), counts), np.concatenate(labels).astype(np.int64)


def draw_counts(num_groups: int) -> list[int]:
    counts: list[int] = np.random.default_rng(1).integers(1, 300, num_groups).tolist()
    return counts


def count_readers(group: np.ndarray, order: np.ndarray, num_ranks: int) -> int:
    """How many times a row group is read in all."""
    ranks = [group[order[rank::num_ranks]] for rank in range(num_ranks)]
    return sum(len(np.unique(read)) for read in ranks)


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("counts", [[100] * 64, [37] * 16, [5] * 8])
def test_equal_row_groups_are_read_once_in_all(counts: list[int], num_ranks: int) -> None:
    group, labels = make_groups(counts, [0.5] * len(counts))
    for num_lanes in (8, 16):
        if len(counts) % num_lanes == 0:
            order = order_lanes(group, labels, num_lanes, np.random.default_rng(3))
            assert sorted(order) == list(range(len(group)))
            assert count_readers(group, order, num_ranks) == len(counts)


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("num_groups", [1, 3, 9, 50, 203])
@pytest.mark.parametrize("share_fake", ["all alike", "sorted"])
def test_few_of_unequal_row_groups_are_read_twice(
    num_groups: int, num_ranks: int, share_fake: str
) -> None:
    shares = np.full(num_groups, 0.5) if share_fake == "all alike" else np.arange(num_groups) % 2
    group, labels = make_groups(draw_counts(num_groups), shares.tolist())
    num_lanes = choose_num_lanes(num_groups, 64 << 20)
    for seed in range(5):
        order = order_lanes(group, labels, num_lanes, np.random.default_rng(seed))
        assert sorted(order) == list(range(len(group)))
        if num_ranks <= num_lanes:
            assert count_readers(group, order, num_ranks) <= num_groups + 2 * (num_ranks - 1)


def test_one_rank_needs_each_row_group_for_one_stretch_of_time() -> None:
    """Also those that lie across the ends of two lanes."""
    counts = draw_counts(203)
    group, labels = make_groups(counts, [0.5] * 203)
    read = group[order_lanes(group, labels, 16, np.random.default_rng(0))]
    for number in range(203):
        assert np.diff(np.flatnonzero(read == number), prepend=-1)[1:].max(initial=0) <= 16


@pytest.mark.parametrize("share_fake", ["mixed", "sorted", "3 to 1"])
def test_batches_are_mixed(share_fake: str) -> None:
    """Of 96 row groups with 1,000 images; see `lanes.py`."""
    shares = {
        "mixed": [0.5] * 96,
        "sorted": [0.0] * 48 + [1.0] * 48,
        "3 to 1": [0.0] * 24 + [1.0] * 72,
    }[share_fake]
    group, labels = make_groups([1000] * 96, shares)
    alike, errors = [], []
    for seed in range(3):
        order = order_lanes(group, labels, 64, np.random.default_rng(seed))
        for start in range(0, len(order) - BATCH_SIZE, BATCH_SIZE):
            batch = order[start : start + BATCH_SIZE]
            counts = np.bincount(group[batch])
            alike.append((counts * (counts - 1)).sum() / (BATCH_SIZE * (BATCH_SIZE - 1)))
            errors.append(labels[batch].mean() - labels.mean())
    assert np.mean(alike) < 1 / 64
    assert np.std(errors) < (0.05 if share_fake == "mixed" else 0.005)  # 0.044 is that of chance


def test_batches_of_balanced_sources_are_mixed() -> None:
    """Of files sorted by class and source, one source of which is in a single row group."""
    group, labels = make_groups([1000] * 96, [0.0] * 29 + [1.0] * 67)
    source = np.repeat(np.arange(8), np.array([1, 2, 4, 8, 12, 16, 21, 32]) * 1000)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        draw = partial(draw_by_source, source=source, balance=0.5, rng=rng)
        drawn = draw_both_classes(labels, len(labels), draw, rng)
        order = drawn[order_lanes(group[drawn], labels[drawn], 64, rng)]
        assert np.array_equal(np.sort(order), np.sort(drawn))
        batches, shuffled = (
            each[: len(each) // BATCH_SIZE * BATCH_SIZE].reshape(-1, BATCH_SIZE)
            for each in (order, rng.permutation(drawn))
        )
        assert labels[batches].mean(axis=1).std() < 0.005
        for number in range(8):
            shares = (source[batches] == number).mean(axis=1)
            chance = (shares.mean() * (1 - shares.mean()) / BATCH_SIZE) ** 0.5
            assert shares.std() < 2 * chance
        copies, by_chance = (
            sum(BATCH_SIZE - len(np.unique(batch)) for batch in each)
            for each in (batches, shuffled)
        )
        assert copies < 1.5 * by_chance
        assert count_readers(group, order, 4) <= 96 + 2 * 3


@pytest.mark.parametrize("batch_size", [2, 7, 32, 100, 128, 130])
@pytest.mark.parametrize("start", [0, 130])
def test_partners_are_of_the_same_rank(batch_size: int, start: int) -> None:
    partners = pair_lanes(start, batch_size, 16)
    assert sorted(partners) == list(range(batch_size))
    assert np.array_equal(partners[partners], np.arange(batch_size))
    for num_ranks in (1, 2, 4, 8):
        if num_ranks <= batch_size // 2:
            place = start + np.arange(batch_size)
            assert np.array_equal(place % num_ranks, (start + partners) % num_ranks)
            assert (partners == np.arange(batch_size)).mean() <= 0.5


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
def test_validation_is_dealt_by_whole_row_groups(num_ranks: int) -> None:
    group, _ = make_groups(draw_counts(50), [0.5] * 50)
    starts = deal_groups(group, num_ranks)
    assert (starts[0], starts[-1]) == (0, len(group))
    shares = [group[a:b] for a, b in pairwise(starts)]
    assert sum(len(np.unique(share)) for share in shares) == 50
    assert max(map(len, shares)) <= len(group) / num_ranks + 300
    few = deal_groups(np.zeros(10), num_ranks)
    assert sorted(np.diff(few))[-1] == 10


def test_lanes_fit_into_memory() -> None:
    for size_bytes, num_groups, wanted in (
        (1 << 20, 1000, 64),
        (64 << 20, 1000, 16),
        (512 << 20, 1000, 8),
        (1 << 20, 11, 8),
        (1 << 20, 1, 2),
    ):
        assert choose_num_lanes(num_groups, size_bytes) == wanted
