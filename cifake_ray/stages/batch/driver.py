"""Run a batch: list -> freeze -> for each shard: fetch, process, commit -> _SUCCESS.

convert, score and evaluate differ only in their processor. One Ray Data row is one shard; an actor
per core fetches, processes and commits it whole (`shard_worker`), so no image crosses the object
store. For an actor with a GPU, tasks on CPUs prepare the images (`cpu_feeder`); the actor still
commits. Only a `ShardReport` travels back to the driver.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext

from cifake_ray.config import BatchConfig, Device, fingerprint_settings
from cifake_ray.core.processing.processor import Processor
from cifake_ray.errors import CifakeError, ExitCode, NothingToDo, StorageError
from cifake_ray.stages.batch.plan import (
    DryRun,
    choose_placement,
    count_listing,
    guess_placement,
)
from cifake_ray.stages.batch.shard_worker import (
    ShardReport,
    ShardWorker,
    WorkerOptions,
    count_retryable,
)
from cifake_ray.stages.batch.watchdog import watch_progress
from cifake_ray.stages.cluster import (
    Placement,
    connect_cluster,
)
from cifake_ray.storage.io.files import exists, read_json
from cifake_ray.storage.io.paths import AnyPath
from cifake_ray.storage.runs.attempts import clear_attempts
from cifake_ray.storage.runs.manifest import choose_shard_rows
from cifake_ray.storage.runs.run import Run, RunPlan, ShardStats, finish_run, reopen_run
from cifake_ray.storage.sources.source import Listing, Source

SHORT_LISTING_S = 0.5
BLOCK_IMAGES = 4_096  # a Ray Data task costs tens of milliseconds; give it that many images
BLOCKS_PER_WORKER = 4  # at least, if there are enough shards: then all workers end together
MAX_BLOCKS = 4_096
KEPT_OPTIONS = ("max_error_rate", "allow_pickle")  # not in the fingerprint, but `repair` needs them


@dataclass(frozen=True)
class Progress:
    """Progress of a batch run."""

    done: int  # images, including those of resumed shards
    failed: int
    listed: int
    images_per_s: float  # in this process, since the first shard was started
    eta_s: float | None


@dataclass(frozen=True)
class BatchSummary:
    """Counts of a finished batch run: listed = done + failed."""

    command: str
    out: str
    listed: int
    done: int
    failed: int
    errors: dict[str, int]
    unlike_training: dict[str, int]  # images by reason; empty if no domain is known
    left_out: dict[str, int]
    shards_total: int
    shards_resumed: int
    shards_retried: int  # an earlier attempt was lost with its worker
    elapsed_s: float
    images_per_s: float
    steady_images_per_s: float

    def exit_code(self, max_error_rate: float) -> ExitCode:
        too_many = self.failed > max_error_rate * self.listed
        return ExitCode.TOO_MANY_ERRORS if too_many else ExitCode.OK


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """All that a verb defines of its run."""

    command: str
    config: BatchConfig
    out: AnyPath
    source: Source
    paths: dict[str, str | None]  # the other path options, resolved, for `repair` to use again
    inputs: dict[str, Any] = field(default_factory=dict)  # replaces them in the fingerprint
    device: Device = "cpu"
    make_processor: Callable[[Placement], Processor]
    on_progress: Callable[[Progress], None]
    started_s: float  # time.time() when the process began
    log: Callable[[str], None]
    facts: dict[str, Any] = field(default_factory=dict)  # for DryRun: bundle, threshold
    before_success: Callable[[Run], None] = lambda run: None  # called when all shards are committed

    @property
    def run(self) -> RunPlan:
        """Return the plan of the run that is found in the output or frozen there."""
        settings = {**fingerprint_settings(self.config), **self.paths}
        kept = {name: value for name, value in asdict(self.config).items() if name in KEPT_OPTIONS}
        return RunPlan(
            out=self.out,
            command=self.command,
            settings={**settings, **self.inputs},
            config={**settings, **kept},
            list_source=self._list_source,
            shard_rows=self.config.shard_size,
        )

    def _list_source(self) -> Listing:
        """List the source, and log how far that is."""
        listing = self.source.list_images()

        def count() -> Iterator[pa.RecordBatch]:
            listed = 0
            for batch in listing.batches:
                listed += batch.num_rows
                self.log(f"{self.command}: listing, {listed:,} keys ...")
                yield batch
            self.log(f"{self.command}: listed {listed:,} keys; starting workers ...")

        return replace(listing, batches=count())


def plan_batch(plan: BatchPlan) -> DryRun:
    """List the source and count; write nothing and do not start Ray."""
    plan.run.find()  # raises if the output belongs to another run
    listing = plan._list_source()
    counts = count_listing(listing)
    if not counts.listed:
        raise NothingToDo("the source holds no file; check the path, --include and --exclude")
    num_workers, device = guess_placement(plan.config, plan.device)
    rows = plan.config.shard_size or choose_shard_rows(counts.listed, counts.size_bytes)
    is_dealt = not listing.keeps_order
    return DryRun(
        command=plan.command,
        out=str(plan.out),
        listed=counts.listed,
        size_bytes=counts.size_bytes,
        left_out=dict(listing.left_out),
        shards_total=-(-counts.listed // rows) if is_dealt else counts.num_batches,
        labels=dict(counts.labels),
        splits=dict(counts.splits),
        num_workers=num_workers,
        device=device,
        **plan.facts,
    )


@dataclass
class _Totals:
    """Adds up the reports of the workers."""

    listed: int
    shards: list[ShardStats] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    unlike_training: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    resumed: int = 0
    retried: int = 0
    worked_rows: int = 0
    first_s: float | None = None
    last_s: float = 0.0

    def add(self, report: ShardReport) -> None:
        self.shards.append(report.stats)
        self.errors.update(report.stats.errors)
        self.unlike_training.update(report.stats.unlike_training)
        self.rows += report.stats.rows
        self.resumed += not report.worked
        self.retried += report.retried
        if report.worked:
            self.worked_rows += report.worked
            self.first_s = min(self.first_s or report.started_s, report.started_s)
            self.last_s = max(self.last_s, report.finished_s)

    @property
    def failed(self) -> int:
        return sum(self.errors.values())

    def rate(self, until_s: float) -> float:
        """Return images per second since the first shard was started; 0 before that."""
        if self.first_s is None or until_s <= self.first_s:
            return 0.0
        return self.worked_rows / (until_s - self.first_s)

    def progress(self) -> Progress:
        rate = self.rate(time.time())
        left = self.listed - self.rows
        return Progress(
            done=self.rows - self.failed,
            failed=self.failed,
            listed=self.listed,
            images_per_s=rate,
            eta_s=left / rate if rate else None,
        )


def run_batch(plan: BatchPlan) -> BatchSummary | DryRun:
    """Finish the run, or return at once the summary of one that is finished.

    ResourceError, StorageError, RunMismatch or NothingToDo when that is impossible.
    """
    if plan.config.dry_run:
        return plan_batch(plan)
    found = plan.run.find()
    if found is None:
        plan.run.check_new()
    elif (summary := find_result(plan)) is not None:
        return summary
    with ExitStack() as stack:
        lister = ThreadPoolExecutor(1)
        stack.callback(lister.shutdown, wait=False)  # Ctrl-C does not wait for a long listing
        opening = lister.submit(lambda: found or plan.run.freeze())
        # Ray takes seconds to start, so start it while a long source is listed; but not if an
        # autoscaler would start nodes that are idle until then.
        wait([opening], timeout=None if plan.config.scale_timeout_s else SHORT_LISTING_S)
        if opening.done():
            opening.result()  # report an error of the source before starting Ray
        least = Placement(plan.config.num_workers or 1, 1, int(plan.device == "cuda"))
        resources = stack.enter_context(connect_cluster(plan.config, least, plan.log))
        placement = choose_placement(resources, plan.config.num_workers, plan.device)
        run = opening.result()
        plan.log(f"{plan.command}: starting {placement.num_workers} workers ...")
        if (summary := find_result(plan)) is not None:  # another process has finished it meanwhile
            return summary
        if plan.config.retry_errors:
            reopen_run(run)
        session, stall_timeout_s = secrets.token_hex(4), plan.config.stall_timeout_s
        options = WorkerOptions(session, plan.config.retry_errors, stall_timeout_s)
        stream = _stream_shards(run, plan, placement, options)
        totals = _Totals(listed=run.manifest.num_rows)
        with closing(watch_progress(stream, run, session, stall_timeout_s)) as reports:
            for report in reports:
                totals.add(report)
                plan.on_progress(totals.progress())
        elapsed_s = time.time() - plan.started_s
        summary = BatchSummary(
            command=run.command,
            out=str(run.out),
            listed=run.manifest.num_rows,
            done=totals.rows - totals.failed,
            failed=totals.failed,
            errors=dict(totals.errors.most_common()),
            unlike_training=dict(totals.unlike_training),
            left_out=run.left_out,
            shards_total=run.manifest.num_shards,
            shards_resumed=totals.resumed,
            shards_retried=totals.retried,
            elapsed_s=round(elapsed_s, 3),
            images_per_s=round(totals.worked_rows / elapsed_s, 1),
            steady_images_per_s=round(totals.rate(totals.last_s), 1),
        )
        plan.before_success(run)
        clear_attempts(run)
        finish_run(run, totals.shards, asdict(summary))
    return summary


def choose_blocks(num_shards: int, num_images: int, num_workers: int) -> int:
    """Return the number of Ray Data tasks; each takes some shards and commits them one by one."""
    wanted = max(num_images // BLOCK_IMAGES, num_workers * BLOCKS_PER_WORKER)
    return min(num_shards, wanted, MAX_BLOCKS)


def _stream_shards(
    run: Run, plan: BatchPlan, placement: Placement, options: WorkerOptions
) -> Generator[ShardReport, None, None]:
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Ray would give up after half an hour without a finished block, even if it is processed.
    context.execution_no_progress_timeout_s = -1
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    shards = [{"shard": shard} for shard in range(run.manifest.num_shards)]
    num_actors = min(placement.num_workers, len(shards))
    num_blocks = choose_blocks(len(shards), run.manifest.num_rows, num_actors)
    # The list is in the driver, so no read task needs a CPU: the actors may use all of them.
    results = ray.data.from_items(shards, override_num_blocks=num_blocks).map_batches(
        ShardWorker,
        fn_constructor_args=(run, plan.source, plan.make_processor, placement, options),
        batch_size=1,  # a shard; with GPUs Ray insists on a number
        num_cpus=placement.cpus_per_worker,
        num_gpus=placement.gpus_per_worker,
        compute=ActorPoolStrategy(size=num_actors),
    )
    for row in results.iter_rows():
        if isinstance(row["report"], CifakeError):
            raise row["report"]
        yield row["report"]


def find_result(plan: BatchPlan) -> BatchSummary | None:
    """Return the summary of a run that has finished, unless `--retry-errors` has work left."""
    path = plan.out / "_SUCCESS"
    if not exists(path):
        return None
    record = read_json(path)
    try:
        summary = BatchSummary(**{name: record[name] for name in BatchSummary.__dataclass_fields__})
    except KeyError as error:
        raise StorageError(
            f"{path}: no {error} in it; it was edited, or an older version wrote it: `cifake-ray"
            " repair` restores it"
        ) from error
    has_work = plan.config.retry_errors and count_retryable(summary.errors)
    return None if has_work else summary
