"""Images fetched and decoded by tasks on CPUs, for a worker whose GPU scores them.

Floor: stages. One process cannot feed a GPU: fetching and decoding cost it more than scoring. So
tasks do that on whatever node has a CPU to spare, a batch each, a few batches ahead.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import pyarrow as pa
import ray
from ray.exceptions import RayError, RayTaskError

from cifake_ray.core.work import Prepare, Work
from cifake_ray.errors import ImageError
from cifake_ray.storage.listing import Source

MAX_WINDOW_BYTES = 512 * 2**20  # prepared and not yet taken, for each worker
MAX_RETRIES = 2  # of a task whose process or node is gone


class Batch(NamedTuple):
    """What came of some rows of the manifest: `prepared` is None where the process was lost."""

    rows: pa.Table
    prepared: Any
    size_bytes: int  # encoded


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


class Feeder:
    """Has batches prepared by tasks, in order and a few ahead."""

    def __init__(self, source: Source, work: Work, num_tasks: int) -> None:
        self.source = source
        self.source_ref, self.prepare_ref = ray.put(source), ray.put(work.prepare)
        # Two more than can run: one that waits here, one that starts when a CPU is free.
        batch_bytes = work.batch_size * work.image_bytes
        self.window = max(1, min(num_tasks + 2, MAX_WINDOW_BYTES // batch_bytes))
        task = ray.remote(num_cpus=1, max_retries=MAX_RETRIES)
        self.prepare_rows, self.prepare_images = task(prepare_rows), task(prepare_images)

    def prepare_slices(self, slices: Iterable[pa.Table]) -> Iterator[Batch]:
        """The slices, prepared. What a task raised is raised here."""
        waiting = iter(slices)
        pending: deque[tuple[pa.Table, Any]] = deque()
        try:
            while True:
                while len(pending) < self.window and (rows := next(waiting, None)) is not None:
                    pending.append((rows, self._start(rows)))
                if not pending:
                    return
                rows, task = pending.popleft()
                try:
                    prepared, size_bytes = ray.get(task)
                except RayTaskError as error:
                    raise error.cause from None
                except RayError:  # a decoder ended the process, or memory or a node was lost
                    prepared, size_bytes = None, 0
                yield Batch(rows, prepared, size_bytes)
        finally:
            for _, task in pending:
                ray.cancel(task)

    def _start(self, rows: pa.Table) -> Any:
        if rows.column("row").null_count:  # each image is a read of its own
            return self.prepare_rows.remote(self.source_ref, self.prepare_ref, rows)
        # Neighbours in a Parquet file: tasks would all read the same part of it.
        return self.prepare_images.remote(self.prepare_ref, list(self.source.read_images(rows)))
