"""Process a shard in a worker: fetch, work, commit, and leave a trace if that kills the actor.

While a shard is processed, its heartbeat file is next to the results. A worker that died is
replaced, and its successor gets the same shard; it finds the file and tries the images in
quarantine first, so an image that kills its process becomes a row with its error.
"""

from __future__ import annotations

import faulthandler
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cifake_ray.core.processing.processor import Processor
from cifake_ray.core.schema import ERROR_FIELDS, RETRYABLE_ERRORS
from cifake_ray.errors import CifakeError, ResourceError
from cifake_ray.stages.batch.image_batches import (
    PreparedBatch,
    prepare_images,
    slice_rows,
    take_images,
)
from cifake_ray.stages.batch.quarantine import Quarantine
from cifake_ray.stages.resources import Placement
from cifake_ray.storage.io.files import identify_host
from cifake_ray.storage.runs.attempts import (
    Attempt,
    follow_attempt,
    read_attempt,
    remove_attempt,
    write_attempt,
)
from cifake_ray.storage.runs.manifest import read_manifest_shard
from cifake_ray.storage.runs.run import Run, ShardStats
from cifake_ray.storage.runs.shards import (
    breaks_seal,
    commit_shard,
    inspect_shard,
    read_shard,
)
from cifake_ray.storage.sources.source import Source

if TYPE_CHECKING:
    from cifake_ray.stages.batch.cpu_feeder import CpuFeeder
    from cifake_ray.stages.batch.prometheus import WorkMetrics

MAX_ATTEMPTS = 5  # at one shard, by one command
MAX_HEARTBEAT_S = 10.0  # between two heartbeats
MAX_IMAGE_S = 60.0  # for one image in quarantine
STDERR = 2


@dataclass(frozen=True)
class WorkerOptions:
    """The options of a command that its workers need."""

    session: str
    retry_errors: bool
    stall_timeout_s: float


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """Report of a committed shard to the driver."""

    stats: ShardStats
    worked: int  # images, in this session; 0 if the shard was committed before
    retried: bool  # an earlier attempt was lost with its worker
    started_s: float = 0.0  # time.monotonic() of the host, as finished_s
    finished_s: float = 0.0
    host: str = ""


class Heartbeat:
    """Writes the progress of an attempt to its file, and ends the process when there is none.

    Only the end of the process stops a decoder that hangs. Ray starts another process, and because
    of the file it processes the shard in quarantine.
    """

    def __init__(self, run: Run, attempt: Attempt, stall_timeout_s: float) -> None:
        self.run, self.attempt = run, attempt
        self.rows_done = self.steps = 0
        self.interval_s = min(MAX_HEARTBEAT_S, stall_timeout_s / 10)
        self.silence_s = stall_timeout_s / 2
        self.next_s = 0.0

    def beat(self) -> None:
        """Count a step, and write the file when it is due."""
        self.steps += 1
        if time.monotonic() >= self.next_s:
            self.show()

    def show(self) -> None:
        """Write the file, and restart the timer that ends the process."""
        self.next_s = time.monotonic() + self.interval_s
        write_attempt(self.run, replace(self.attempt, rows_done=self.rows_done, steps=self.steps))
        faulthandler.dump_traceback_later(self.silence_s, exit=True, file=STDERR)

    def stop(self) -> None:
        faulthandler.cancel_dump_traceback_later()


@dataclass(frozen=True, kw_only=True)
class WorkerTask:
    """All that a worker is given, but the numbers of its shards."""

    run: Run
    source: Source
    make_processor: Callable[[Placement], Processor]
    placement: Placement
    options: WorkerOptions


class ShardWorker:
    """Commits the shards whose numbers it is given, in a process of its own."""

    def __init__(self, task: WorkerTask, metrics: WorkMetrics | None = None) -> None:
        self.task, self.metrics = task, metrics
        self.run, self.source = task.run, task.source
        self.placement, self.options = task.placement, task.options

    @cached_property
    def processor(self) -> Processor:
        """Make the processor when there is work for it, since that takes seconds."""
        return self.task.make_processor(self.placement)

    @cached_property
    def feeder(self) -> CpuFeeder:
        from cifake_ray.stages.batch.cpu_feeder import CpuFeeder  # only a cluster has feeders

        timeout_s = self.options.stall_timeout_s / 4  # half of the silence that ends a process
        return CpuFeeder(
            self.source,
            self.processor,
            self.placement.num_feeders,
            timeout_s,
            self.placement.num_fetchers,
        )

    def report_shard(self, shard: int) -> ShardReport | CifakeError:
        """Make, retry or find a shard. Return an error, because Ray would wrap a raised one."""
        try:
            stats = inspect_shard(self.run, shard)
            started_s, worked, retried = time.monotonic(), 0, False
            has_work = stats and self.options.retry_errors and count_retryable(stats.errors)
            if stats is None or (has_work and breaks_seal(self.run.shard_path(shard))):
                stats, retried = self._make_shard(shard)
                worked = stats.rows
            elif has_work:
                worked = has_work
                result = self._retry_shard(shard)
                if result is None:
                    return self.report_shard(shard)
                stats, retried = result
        except CifakeError as error:
            return error
        finished_s = time.monotonic()
        if worked and self.metrics:
            self.metrics.time_shard(finished_s - started_s)
        return ShardReport(
            stats=stats,
            worked=worked,
            retried=retried,
            started_s=started_s,
            finished_s=finished_s,
            host=identify_host(),
        )

    def _make_shard(self, shard: int) -> tuple[ShardStats, bool]:
        """Make all of a shard; return also whether an earlier attempt was lost."""
        with self._attempt(shard) as (heartbeat, is_suspect):
            rows = read_manifest_shard(self.run.manifest_folder, self.run.find_file(shard), shard)
            return self._commit(shard, self._work_on(rows, heartbeat, is_suspect)), is_suspect

    def _retry_shard(self, shard: int) -> tuple[ShardStats, bool] | None:
        """Make those rows of a committed shard again whose error may be transient; keep others.

        None if another command has just done so.
        """
        with self._attempt(shard) as (heartbeat, is_suspect):
            rows = read_manifest_shard(self.run.manifest_folder, self.run.find_file(shard), shard)
            old = read_shard(self.run.shard_path(shard), ERROR_FIELDS).replace_schema_metadata(None)
            error = old.column("error")
            failed = pc.fill_null(pc.is_in(error, pa.array(RETRYABLE_ERRORS)), False)
            if not pc.any(failed).as_py():
                return None
            crashed = pc.any(pc.equal(error, "worker_crash")).as_py()
            new = self._work_on(rows.filter(failed), heartbeat, is_suspect or bool(crashed))
            table = replace_rows(old, failed.to_numpy().nonzero()[0], new)
            return self._commit(shard, table), is_suspect

    def _commit(self, shard: int, table: pa.Table) -> ShardStats:
        unlike = self.processor.count_unlike(table)
        return commit_shard(self.run, shard, table, self.processor.footer, unlike)

    @contextmanager
    def _attempt(self, shard: int) -> Iterator[tuple[Heartbeat, bool]]:
        """Keep a heartbeat while a shard is processed; yield also whether an attempt was lost.

        ResourceError after MAX_ATTEMPTS.
        """
        earlier = read_attempt(self.run, shard)
        attempt = follow_attempt(earlier, shard, self.options.session)
        if earlier is not None and attempt.number > MAX_ATTEMPTS:
            raise ResourceError(
                f"{self.run.out}: {earlier.describe()} has ended its worker {MAX_ATTEMPTS} times,"
                " and not in a decoder; it may be short of memory or time: try fewer --num-workers,"
                " a smaller --batch-size, a longer --stall-timeout-s or a larger machine, and run"
                " the same command again"
            )
        heartbeat = Heartbeat(self.run, attempt, self.options.stall_timeout_s)
        heartbeat.show()
        try:
            yield heartbeat, earlier is not None
        finally:
            heartbeat.stop()
        remove_attempt(self.run, shard)

    def _work_on(self, rows: pa.Table, heartbeat: Heartbeat, is_suspect: bool) -> pa.Table:
        """Process rows of the manifest; try suspect images in quarantine first."""
        feed = self._feed if self.placement.num_feeders and not is_suspect else self._prepare
        tables = []
        with closing(feed(rows, heartbeat, is_suspect)) as batches:
            for batch in batches:
                tables.append(self.processor.finish(batch.rows, batch.prepared))
                if self.metrics:
                    self.metrics.count_images(tables[-1], batch.size_bytes)
                heartbeat.rows_done += batch.rows.num_rows
                heartbeat.beat()
        return pa.concat_tables(tables)

    def _prepare(
        self, rows: pa.Table, heartbeat: Heartbeat, is_suspect: bool
    ) -> Generator[PreparedBatch, None, None]:
        """Fetch and prepare images in this process; prefetch the next ones meanwhile."""
        with ExitStack() as stack:
            quarantine = None
            if is_suspect:
                image_s = min(MAX_IMAGE_S, self.options.stall_timeout_s / 8)
                quarantine = stack.enter_context(
                    Quarantine(decodes=self.processor.decodes, timeout_s=image_s)
                )
            fetched, start = self.source.read_images(rows), 0
            while images := take_images(fetched, self.processor.batch_size, heartbeat.beat):
                some = rows.slice(start, len(images))
                start += len(images)
                if quarantine is not None:
                    images = quarantine.try_images(images, heartbeat.beat)
                yield PreparedBatch(some, *prepare_images(self.processor.prepare, images))

    def _feed(
        self, rows: pa.Table, heartbeat: Heartbeat, is_suspect: bool
    ) -> Generator[PreparedBatch, None, None]:
        """Fetch and prepare images in tasks on other CPUs, or here when none is free.

        What ends a task goes into quarantine.
        """
        for batch in self.feeder.prepare_slices(slice_rows(rows, self.processor.batch_size)):
            heartbeat.beat()
            if batch.prepared is None:
                yield from self._prepare(batch.rows, heartbeat, batch.is_suspect)
            else:
                yield batch


def count_retryable(errors: dict[str, int]) -> int:
    """Count the errors that may be transient."""
    return sum(errors.get(error, 0) for error in RETRYABLE_ERRORS)


def replace_rows(table: pa.Table, indices: np.ndarray, new: pa.Table) -> pa.Table:
    """Return `table` with those of `new` as rows `indices` (ascending); no byte is copied.

    Not by `take`, which would gather more than 2 GiB of images into one array and fail.
    """
    pieces, start = [], 0
    for number, index in enumerate(indices.tolist()):
        pieces += [table.slice(start, index - start), new.slice(number, 1).cast(table.schema)]
        start = index + 1
    return pa.concat_tables([*pieces, table.slice(start)])
