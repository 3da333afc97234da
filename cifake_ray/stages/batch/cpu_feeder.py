"""Images fetched and decoded by tasks on CPUs, for a worker whose GPU scores them.

One process cannot feed a GPU: fetching and decoding cost it more than scoring. So
tasks do that on whatever node has a CPU to spare, a batch each, a few batches ahead.
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
MAX_WINDOW_BYTES = 384 * 2**20  # below it one more batch is begun
MAX_RETRIES = 2  # of a task whose process or node is gone


class PreparedBatch(NamedTuple):
    """What came of some rows of the manifest: `prepared` is None where the process was lost."""

    rows: pa.Table
    prepared: Any
    size_bytes: int  # encoded


class _Task(NamedTuple):
    """A batch that is being prepared, and what it may take of the object store."""

    rows: pa.Table
    result: Any
    size_bytes: int


class Sizes:
    """Images on their way, and how many bytes have passed."""

    def __init__(self, images: Iterable[bytes | ImageError]) -> None:
        self.images = images
        self.size_bytes = 0

    def __iter__(self) -> Iterator[bytes | ImageError]:
        for image in self.images:
            self.size_bytes += 0 if isinstance(image, ImageError) else len(image)
            yield image


def prepare_images(prepare: Prepare, images: Iterable[bytes | ImageError]) -> tuple[Any, int]:
    """The first half of the work on some images, and the encoded bytes they had."""
    sizes = Sizes(images)
    return prepare(sizes), sizes.size_bytes


def prepare_rows(source: Source, prepare: Prepare, rows: pa.Table) -> tuple[Any, int]:
    """The same, of images that are fetched first."""
    return prepare_images(prepare, source.read_images(rows))


class CpuFeeder:
    """Has batches prepared by tasks, in order and a few ahead."""

    def __init__(self, source: Source, work: Processor, num_tasks: int, timeout_s: float) -> None:
        """`timeout_s` is how long a batch is waited for."""
        self.source, self.image_bytes, self.timeout_s = source, work.image_bytes, timeout_s
        self.source_ref, self.prepare_ref = ray.put(source), ray.put(work.prepare)
        # Two more than can run: one that waits here, one that starts when a CPU is free.
        self.most = num_tasks + 2
        task = ray.remote(num_cpus=1, max_retries=MAX_RETRIES)
        self.prepare_rows, self.prepare_images = task(prepare_rows), task(prepare_images)

    def prepare_slices(self, slices: Iterable[pa.Table]) -> Iterator[PreparedBatch]:
        """The slices, prepared. What a task raised is raised here."""
        waiting = iter(slices)
        pending: deque[_Task] = deque()
        try:
            while True:
                while (
                    len(pending) < self.most
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
        # Neighbours in a Parquet file: tasks would all read the same part of it.
        images = Sizes(self.source.read_images(rows))
        task = self.prepare_images.remote(self.prepare_ref, list(images))
        return _Task(rows, task, size_bytes + images.size_bytes)
