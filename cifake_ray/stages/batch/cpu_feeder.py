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
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from cifake_ray.core.processing.processor import Prepare, Processor
from cifake_ray.errors import ImageError
from cifake_ray.stages.batch.image_batches import PreparedBatch, measure_image, prepare_images
from cifake_ray.storage.s3.throttle import share_requests
from cifake_ray.storage.sources.source import Source

# For each worker: batches prepared or being prepared, and the encoded images sent for that.
MAX_WINDOW_BYTES = 384 * 2**20  # below it one more batch is started
PATIENCE_S = 10.0  # for a task to get a CPU; then the worker prepares its batch itself
MAX_RETRIES = 2  # of a task whose process or node was lost


class _Task(NamedTuple):
    """A batch that is being prepared, and how much of the object store it may use."""

    rows: pa.Table
    result: Any
    size_bytes: int


def feed_images(prepare: Prepare, images: Iterable[bytes | ImageError]) -> Iterator[Any]:
    """Do `prepare_images` as a task, which first yields None: it has a CPU."""
    yield None
    yield prepare_images(prepare, images)


def feed_rows(source: Source, prepare: Prepare, rows: pa.Table, num_fetchers: int) -> Iterator[Any]:
    """Fetch images and prepare them, as `feed_images` does."""
    yield None
    share_requests(num_fetchers)
    yield prepare_images(prepare, source.read_images(rows))


class CpuFeeder:
    """Prepares batches in tasks, in order and a few ahead."""

    def __init__(
        self,
        source: Source,
        work: Processor,
        num_tasks: int,
        timeout_s: float,
        num_fetchers: int = 1,
    ) -> None:
        """Wait for each batch for at most `timeout_s`; the run has `num_fetchers` such tasks."""
        self.source, self.image_bytes, self.timeout_s = source, work.image_bytes, timeout_s
        self.num_fetchers = num_fetchers
        self.source_ref, self.prepare_ref = ray.put(source), ray.put(work.prepare)
        # Two more than can run: one that waits here, one that starts when a CPU is free.
        self.max_pending = num_tasks + 2
        task = ray.remote(num_cpus=1, max_retries=MAX_RETRIES, num_returns="streaming")
        self.feed_rows, self.feed_images = task(feed_rows), task(feed_images)
        self.max_patience_s = min(PATIENCE_S, timeout_s / 2)
        self.patience_s = self.max_patience_s

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
                yield self._wait(rows, task)
        finally:
            for _, task, _ in pending:
                ray.cancel(task)

    def _wait(self, rows: pa.Table, task: Any) -> PreparedBatch:
        """Wait for a task and return its batch; unprepared if it has no CPU or was lost."""
        if not ray.wait([task], timeout=self.patience_s)[0]:
            self.patience_s = 0.0  # until CPUs are free again
            ray.cancel(task, force=True)
            return PreparedBatch(rows, None, 0)
        try:
            ray.get(next(task))
            self.patience_s = self.max_patience_s
            if not ray.wait([task], timeout=self.timeout_s)[0]:
                raise GetTimeoutError
            prepared, size_bytes = ray.get(next(task))
        except RayTaskError as error:
            raise error.cause from None
        except RayError:  # a decoder ended the process or hangs, or a node was lost
            ray.cancel(task, force=True)
            return PreparedBatch(rows, None, 0, is_suspect=True)
        return PreparedBatch(rows, prepared, size_bytes)

    def _start(self, rows: pa.Table) -> _Task:
        size_bytes = rows.num_rows * self.image_bytes
        if rows.column("row").null_count:  # each image is a read of its own
            task = self.feed_rows.remote(self.source_ref, self.prepare_ref, rows, self.num_fetchers)
            return _Task(rows, task, size_bytes)
        # Neighbours in a file, which are read at once; of Parquet each would read the same rows.
        images = list(self.source.read_images(rows))
        task = self.feed_images.remote(self.prepare_ref, images)
        return _Task(rows, task, size_bytes + sum(map(measure_image, images)))
