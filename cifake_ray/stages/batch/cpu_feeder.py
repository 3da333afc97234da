"""Fetch and decode images in tasks on CPUs, for a worker whose GPU scores them.

One process cannot feed a GPU: fetching and decoding take longer than scoring. So tasks on any node
with a free CPU do it, one batch each, a few batches ahead.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import pyarrow as pa
import ray
from ray.exceptions import RayError, RayTaskError

from cifake_ray.core.processing.processor import Prepare, Processor
from cifake_ray.errors import ImageError
from cifake_ray.storage.sources.source import Source

# For each worker: batches prepared or being prepared, and the encoded images sent for that.
MAX_WINDOW_BYTES = 384 * 2**20  # below it one more batch is started
MAX_RETRIES = 2  # of a task whose process or node was lost


class PreparedBatch(NamedTuple):
    """Some rows of the manifest with their images; `prepared` is None if the process was lost."""

    rows: pa.Table
    prepared: Any
    size_bytes: int  # encoded


class _Task(NamedTuple):
    """A batch that is being prepared, and how much of the object store it may use."""

    rows: pa.Table
    result: Any
    size_bytes: int


def measure_image(image: bytes | ImageError) -> int:
    """Return the encoded bytes of an image, 0 for one that could not be fetched."""
    return 0 if isinstance(image, ImageError) else len(image)


def prepare_images(prepare: Prepare, images: Iterable[bytes | ImageError]) -> tuple[Any, int]:
    """Prepare images as they arrive; return also how many encoded bytes they have together."""
    sizes = []

    def measure() -> Iterator[bytes | ImageError]:
        for image in images:
            sizes.append(measure_image(image))
            yield image

    return prepare(measure()), sum(sizes)


def prepare_rows(source: Source, prepare: Prepare, rows: pa.Table) -> tuple[Any, int]:
    """Fetch images and prepare them, as `prepare_images` does."""
    return prepare_images(prepare, source.read_images(rows))


class CpuFeeder:
    """Prepares batches in tasks, in order and a few ahead."""

    def __init__(self, source: Source, work: Processor, num_tasks: int, timeout_s: float) -> None:
        """Wait for each batch for at most `timeout_s`."""
        self.source, self.image_bytes, self.timeout_s = source, work.image_bytes, timeout_s
        self.source_ref, self.prepare_ref = ray.put(source), ray.put(work.prepare)
        # Two more than can run: one that waits here, one that starts when a CPU is free.
        self.max_pending = num_tasks + 2
        task = ray.remote(num_cpus=1, max_retries=MAX_RETRIES)
        self.prepare_rows, self.prepare_images = task(prepare_rows), task(prepare_images)

    def prepare_slices(self, slices: Iterable[pa.Table]) -> Iterator[PreparedBatch]:
        """Yield the slices, prepared. Raise what a task raised."""
        waiting = iter(slices)
        pending: deque[_Task] = deque()
        try:
            while True:
                while (
                    len(pending) < self.max_pending
                    and sum(task.size_bytes for task in pending) < MAX_WINDOW_BYTES
                    and (rows := next(waiting, None)) is not None
                ):
                    pending.append(self._start(rows))
                if not pending:
                    return
                rows, task, _ = pending.popleft()
                try:
                    prepared, size_bytes = ray.get(task, timeout=self.timeout_s)
                except RayTaskError as error:
                    raise error.cause from None
                except RayError:  # a decoder ended the process or hangs, or a node was lost
                    ray.cancel(task, force=True)
                    prepared, size_bytes = None, 0
                yield PreparedBatch(rows, prepared, size_bytes)
        finally:
            for _, task, _ in pending:
                ray.cancel(task)

    def _start(self, rows: pa.Table) -> _Task:
        size_bytes = rows.num_rows * self.image_bytes
        if rows.column("row").null_count:  # each image is a read of its own
            task = self.prepare_rows.remote(self.source_ref, self.prepare_ref, rows)
            return _Task(rows, task, size_bytes)
        # Neighbours in a file, which are read at once; of Parquet each would read the same rows.
        images = list(self.source.read_images(rows))
        task = self.prepare_images.remote(self.prepare_ref, images)
        return _Task(rows, task, size_bytes + sum(map(measure_image, images)))
