"""Reading ahead: the order of the results, and how much is in memory before it is asked for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from cifake_ray.errors import StorageError
from cifake_ray.storage.io.read_ahead import read_ahead, take_turns


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


class Reads:
    """Counts the images that were read; each is 100 bytes."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, number: int) -> bytes:
        self.count += 1
        return b"%100d" % number


@pytest.mark.parametrize("group_size", [1, 7, 1000])
def test_results_come_in_the_order_of_the_items(
    threads: ThreadPoolExecutor, group_size: int
) -> None:
    items = [(number, 100) for number in range(100)]
    results = read_ahead(Reads(), items, threads, max_ahead=20, group_size=group_size)
    assert list(results) == [b"%100d" % number for number in range(100)]


@pytest.mark.parametrize("group_size", [1, 4])
@pytest.mark.parametrize(
    ("limits", "most"),
    [({"max_ahead": 20}, 28), ({"max_ahead": 500, "max_ahead_bytes": 3200}, 36)],
)
def test_no_more_is_read_ahead_than_is_allowed(
    threads: ThreadPoolExecutor, limits: dict[str, Any], most: int, group_size: int
) -> None:
    read = Reads()
    items = ((number, 100) for number in range(200))
    results = read_ahead(read, items, threads, group_size=group_size, **limits)
    next(results)
    time.sleep(0.2)
    assert read.count <= most
    assert len(list(results)) == 199


def test_large_images_are_not_read_in_groups(threads: ThreadPoolExecutor) -> None:
    """One slow thread would otherwise read all of them, one after another."""
    read = Reads()
    items = [(number, 100) for number in range(50)]
    results = read_ahead(read, items, threads, max_ahead=500, max_ahead_bytes=1600, group_size=1000)
    next(results)
    time.sleep(0.2)
    assert read.count <= 17
    results.close()  # type: ignore[attr-defined]
    assert read.count <= 17


def test_what_reading_raises_is_raised_at_its_turn(threads: ThreadPoolExecutor) -> None:
    def read(number: int) -> bytes:
        if number == 3:
            raise StorageError("no credentials")
        return b""

    results = read_ahead(read, [(n, 0) for n in range(9)], threads, max_ahead=9)
    assert [next(results) for _ in range(3)] == [b""] * 3
    with pytest.raises(StorageError, match="no credentials"):
        next(results)


@pytest.mark.parametrize("length", [0, 3, 4, 5, 40])
def test_streams_take_turns_and_the_next_ones_wait_with_a_few_items(length: int) -> None:
    taken = [0] * 6

    def count(stream: int) -> Iterator[tuple[int, int]]:
        for number in range(length):
            taken[stream] += 1
            yield stream, number

    items = take_turns(map(count, range(6)), num_threads=3, num_ahead=4)
    expected = [(stream, number) for stream in range(6) for number in range(length)]
    first = next(items, None)
    time.sleep(0.05)
    assert max(taken[1:]) <= 4
    assert ([] if first is None else [first, *items]) == expected
