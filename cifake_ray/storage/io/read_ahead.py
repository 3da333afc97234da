"""Reads images on threads before they are asked for, and hands them over in order.

Stores and network file systems answer in milliseconds, so a worker that read one
small image after another would mostly wait.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeAlias, TypeVar

from cifake_ray.core.imaging.decode import MAX_IMAGE_BYTES
from cifake_ray.errors import ImageError

T = TypeVar("T")
_Group: TypeAlias = list[tuple[T, int | None]]  # read by one thread; sizes in bytes
MAX_AHEAD_BYTES = 64 * 2**20
ASSUMED_BYTES = 16 * 2**20  # of an image of unknown size, until the first has come


class _Budget:
    """Bytes beyond what the consumer took: there already, or on their way."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # the threads correct what was assumed
        self.size_bytes = 0
        self.largest: int | None = None  # of all that have come

    def expect(self, size_bytes: int | None) -> int:
        """Return the bytes to reserve: of unknown size, as many as the largest image so far."""
        if size_bytes is None:
            size_bytes = ASSUMED_BYTES if self.largest is None else self.largest
        return min(size_bytes, MAX_IMAGE_BYTES)

    def add(self, size_bytes: int) -> None:
        with self.lock:
            self.size_bytes += size_bytes

    def correct(self, expected_bytes: int, results: list[bytes | ImageError]) -> int:
        """Count what has come instead of what was expected, and return its bytes."""
        sizes = [len(r) if isinstance(r, bytes) else 0 for r in results]
        with self.lock:
            self.size_bytes += sum(sizes) - expected_bytes
            self.largest = max(self.largest or 0, *sizes)
        return sum(sizes)


def read_ahead(
    read: Callable[[T], bytes | ImageError],
    items: Iterable[tuple[T, int | None]],
    threads: ThreadPoolExecutor,
    *,
    max_ahead: int,
    max_ahead_bytes: int = MAX_AHEAD_BYTES,
    group_size: int = 1,
) -> Iterator[bytes | ImageError]:
    """Call `read` for each item, given with its size in bytes if known; yield results in order.

    At most `max_ahead` items are read ahead, and at most `max_ahead_bytes` beyond what the caller
    took (an image alone may be larger; of unknown sizes, those on their way are taken to be no
    larger than any before them). A thread takes `group_size` small items at once, which costs less
    CPU time an item. What `read` raises is raised here.
    """
    pending: deque[Future[tuple[list[bytes | ImageError], int]]] = deque()
    budget = _Budget()

    def read_group(group: _Group[T], expected_bytes: int) -> tuple[list[bytes | ImageError], int]:
        results = [read(item) for item, _ in group]
        return results, budget.correct(expected_bytes, results)

    groups = _group_items(items, group_size, max_ahead_bytes // 16)
    waiting = next(groups, None)
    try:
        while waiting or pending:
            while waiting and len(pending) * group_size < max_ahead:
                expected_bytes = sum(budget.expect(size) for _, size in waiting)
                if pending and budget.size_bytes + expected_bytes > max_ahead_bytes:
                    break
                budget.add(expected_bytes)
                pending.append(threads.submit(read_group, waiting, expected_bytes))
                waiting = next(groups, None)
            results, size_bytes = pending.popleft().result()
            budget.add(-size_bytes)
            yield from results
    finally:
        for future in pending:
            future.cancel()


def _group_items(
    items: Iterable[tuple[T, int | None]], group_size: int, max_bytes: int
) -> Iterator[_Group[T]]:
    """Yield neighbours; a large image, or one of unknown size, is a group of its own."""
    group: _Group[T] = []
    group_bytes = 0
    for item, size in items:
        size_bytes = ASSUMED_BYTES if size is None else size
        if group and (len(group) == group_size or group_bytes + size_bytes > max_bytes):
            yield group
            group, group_bytes = [], 0
        group.append((item, size))
        group_bytes += size_bytes
    if group:
        yield group


def take_turns(
    streams: Iterator[Iterator[T]], num_threads: int, num_ahead: int
) -> Generator[T, None, None]:
    """Yield what each of many iterators yields, in order; threads advance the next ones meanwhile.

    Of each of `num_threads` iterators, at most `num_ahead` items wait for their turn.
    """

    def take(stream: Iterator[T]) -> list[T]:
        return list(islice(stream, num_ahead))

    with ThreadPoolExecutor(num_threads, "ahead") as threads:
        pending = deque((each, threads.submit(take, each)) for each in islice(streams, num_threads))
        try:
            while pending:
                stream, future = pending.popleft()
                items = future.result()
                if len(items) == num_ahead:
                    pending.appendleft((stream, threads.submit(take, stream)))
                elif following := next(streams, None):
                    pending.append((following, threads.submit(take, following)))
                yield from items
        finally:
            for _, future in pending:
                future.cancel()
