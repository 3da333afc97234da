"""Read and decode images while they are trained on, for sets that are too large for the cache.

Threads fetch the row groups that come next, a bounded number of bytes ahead. What does not decode
is found only then. Its place is taken by the next image of the same row group, label and side, so
that batches keep their size and their labels on every rank, and it is counted.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa

from cifake_ray.core.schema import LABEL_NAMES
from cifake_ray.errors import ImageError, StorageError
from cifake_ray.storage.datasets.training_rows import TrainingRows, read_bytes_of

AHEAD_BYTES = 256 * 2**20  # of row groups that no image has been read from, or one row group
NUM_FETCHES = 4  # at a time
MAX_GAP = 1024  # images after which a row group is rather fetched again than kept
CHUNK = 16  # images that a decoding thread takes at once
Load = Callable[[bytes], Any]  # from encoded bytes to what is kept of an image


@dataclass(eq=False)
class _Fetch:
    """A row group that is wanted, on its way, or in memory."""

    group: int
    num_left: int  # images that will be read from it
    images: Future[pa.ChunkedArray] | None = None  # None while it is only wanted
    is_ahead: bool = True  # no image has been read


class StreamedPixels:
    """Images decoded on demand: `training_set.Pixels`."""

    def __init__(
        self, rows: TrainingRows, load: Load, num_threads: int, errors: dict[int, str]
    ) -> None:
        """`errors` are those of images that are known not to decode, and is added to."""
        self.rows, self.load, self.errors = rows, load, errors
        self.decoders = ThreadPoolExecutor(num_threads, "decode")
        self.fetchers = ThreadPoolExecutor(NUM_FETCHES, "fetch")
        self.lock = Lock()  # of what follows
        self.fetches: defaultdict[int, deque[_Fetch]] = defaultdict(deque)  # by row group
        self.next: deque[_Fetch] = deque()
        self.ahead_bytes = 0

    def expect(self, positions: np.ndarray) -> None:
        """Fetch row groups ahead of images that will be read, each once, in about this order.

        What was expected before is forgotten.
        """
        groups = self.rows.group[positions]
        places = np.argsort(groups, kind="stable")
        is_first = np.diff(groups[places], prepend=-1) != 0
        is_first |= np.diff(places, prepend=0) > MAX_GAP
        starts = np.flatnonzero(is_first)
        counts = np.diff(starts, append=len(places))
        with self.lock:
            for fetch in chain(*self.fetches.values()):
                if fetch.images is not None:
                    fetch.images.cancel()
            self.fetches.clear()
            self.next.clear()
            self.ahead_bytes = 0
            for n in np.argsort(places[starts], kind="stable").tolist():
                fetch = _Fetch(int(groups[places[starts[n]]]), int(counts[n]))
                self.fetches[fetch.group].append(fetch)
                self.next.append(fetch)
            self._fetch_ahead()

    def read(self, positions: np.ndarray) -> np.ndarray:
        return np.stack(self.map(positions, lambda image, _: image))

    def map(self, positions: np.ndarray, cut: Callable[[Any, int], np.ndarray]) -> list[np.ndarray]:
        groups, found = self.rows.group[positions], [np.empty(0)] * len(positions)
        of_group = {
            group: np.flatnonzero(groups == group).tolist()
            for group in dict.fromkeys(groups.tolist())
        }
        fetches = [self._take(group, len(places)) for group, places in of_group.items()]
        for fetch, places in zip(fetches, of_group.values(), strict=True):
            assert fetch.images is not None
            images = fetch.images.result()

            def decode(chunk: list[int], images: pa.ChunkedArray = images) -> None:
                for place in chunk:
                    found[place] = cut(self._decode(images, int(positions[place])), place)

            chunks = [places[start : start + CHUNK] for start in range(0, len(places), CHUNK)]
            for _ in self.decoders.map(decode, chunks):
                pass
            self._release(fetch.group, len(places))
        return found

    def _take(self, group: int, num_images: int) -> _Fetch:
        """Return the row group that images are read from now; fetch it if it is not on its way."""
        with self.lock:
            if not self.fetches[group]:  # not expected
                self.fetches[group].append(_Fetch(group, num_images))
            fetch = self.fetches[group][0]
            if fetch.images is None:
                self._begin(fetch)
            if fetch.is_ahead:
                fetch.is_ahead = False
                self.ahead_bytes -= int(self.rows.group_bytes[group])
            self._fetch_ahead()
            return fetch

    def _release(self, group: int, num_images: int) -> None:
        """Let go of what has been read; batches may also read what a later fetch was meant for."""
        with self.lock:
            fetches = self.fetches[group]
            while fetches and num_images >= fetches[0].num_left:
                done = fetches.popleft()
                num_images, done.num_left = num_images - done.num_left, 0
                if done.images is not None and done.is_ahead:
                    self.ahead_bytes -= int(self.rows.group_bytes[group])
            if fetches:
                fetches[0].num_left -= num_images

    def _fetch_ahead(self) -> None:
        while self.next:
            fetch = self.next[0]
            if fetch.images is None and fetch.num_left:
                size_bytes = int(self.rows.group_bytes[fetch.group])
                if self.ahead_bytes and self.ahead_bytes + size_bytes > AHEAD_BYTES:
                    return
                self._begin(fetch)
            self.next.popleft()

    def _begin(self, fetch: _Fetch) -> None:
        fetch.images = self.fetchers.submit(self.rows.read_group, fetch.group)
        self.ahead_bytes += int(self.rows.group_bytes[fetch.group])

    def _decode(self, images: pa.ChunkedArray, position: int) -> Any:
        """Return an image, or the one that takes its place. StorageError when there is none."""
        for other in chain([position], self._list_alike(position)):
            if other not in self.errors:
                data = read_bytes_of(images[int(self.rows.row[other])].as_py())
                try:
                    return self.load(data or b"")
                except ImageError as error:
                    self.errors[other] = error.error
        path, number = self.rows.groups[self.rows.group[position]]
        label = LABEL_NAMES[int(self.rows.label[position])]
        raise StorageError(
            f"{path}: no {label} image of row group {number} decodes"
            f" ({self.errors[position]}), so none can take the place of another; `convert` the"
            " images again, which marks such rows, or take the file away"
        )

    def _list_alike(self, position: int) -> Iterator[int]:
        """Yield the images of a row group with the same label and side, the next ones first."""
        rows = self.rows
        first = int(np.searchsorted(rows.group, rows.group[position]))
        end = int(np.searchsorted(rows.group, rows.group[position], side="right"))
        is_alike = rows.label[first:end] == rows.label[position]
        is_alike &= rows.is_val[first:end] == rows.is_val[position]
        alike = first + np.flatnonzero(is_alike)
        yield from np.roll(alike, -int(np.searchsorted(alike, position))).tolist()
