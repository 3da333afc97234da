"""Run a batch: list -> freeze -> for each shard: fetch, process, commit -> _SUCCESS.

convert, score, evaluate and audit differ only in their processor. A worker per core fetches,
processes and commits a shard whole (`shard_worker`); only a `ShardReport` travels back. The workers
are actors on Ray (`ray_pool`) or, on one machine, processes of ours (`local_pool`). For an
actor with a GPU, tasks on CPUs prepare the images (`cpu_feeder`); the actor still commits.
"""

from __future__ import annotations

import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from functools import partial
from threading import Event

from cifake_ray.errors import CifakeError
from cifake_ray.stages.batch.local_pool import LocalPool
from cifake_ray.stages.batch.plan import (
    BatchPlan,
    DryRun,
    choose_placement,
    describe_workers,
    plan_batch,
)
from cifake_ray.stages.batch.shard_worker import (
    ShardReport,
    WorkerOptions,
    WorkerTask,
    count_retryable,
)
from cifake_ray.stages.batch.summary import BatchSummary, Totals, read_summary
from cifake_ray.stages.batch.task_pool import AwaitedPool, RayPool
from cifake_ray.stages.batch.watchdog import watch_progress
from cifake_ray.stages.resources import Placement, read_local_resources, runs_here
from cifake_ray.storage.io.files import read_json
from cifake_ray.storage.runs.attempts import clear_attempts
from cifake_ray.storage.runs.extension import extend_run
from cifake_ray.storage.runs.finish import finish_run
from cifake_ray.storage.runs.run import Run, RunExtended, force_names, is_finished, reopen_run
from cifake_ray.storage.runs.shards import decide_shard
from cifake_ray.storage.sources.source import Listing

SHORT_LISTING_S = 0.5
DECIDING_THREADS = 8  # so many shards in memory; mostly the store is waited for


def run_batch(plan: BatchPlan) -> BatchSummary | DryRun:
    """Finish the run, or return at once the summary of one that is finished.

    ResourceError, StorageError, RunMismatch or NothingToDo when that is impossible.
    """
    if plan.config.dry_run:
        return plan_batch(plan)
    found = plan.run.find()
    if found is None:
        plan.run.check_new()
    elif plan.extend:
        force_names(found)
        run, changes = extend_run(plan.run)
        plan.log(f"{plan.command}: {changes.describe()}")
        return replace(work_on(plan, run), changes=changes.counts)
    return work_on(plan, found)


def work_on(plan: BatchPlan, found: Run | None) -> BatchSummary:
    """Finish a run that was found, or the one that is frozen now, and what others add meanwhile."""
    while True:
        try:
            return _finish_found(plan, found)
        except RunExtended:
            plan.log(f"{plan.command}: another command has extended the run; going on with it")
            found = plan.run.find()


def _finish_found(plan: BatchPlan, found: Run | None) -> BatchSummary:
    if found is None:
        pass
    elif (summary := find_result(plan, found)) is not None:
        at = read_json(plan.out / "_SUCCESS").get("finished_at", "some time ago")
        remedy = "--extend" if plan.command == "score" else "a new output folder"
        plan.log(
            f"{plan.command}: finished {at}"
            + f"; the source was not looked at again: give {remedy} to include new images"
            * (not plan.extend)
        )
        return summary
    else:
        force_names(found)
        if plan.run.changes_verdicts(found):
            with plan.run.lock():
                found = plan.run.change_verdicts(plan.run.find_again())
            if (summary := find_result(plan, found)) is not None:  # of an equal command, meanwhile
                return summary
        if found.earlier_identities and not is_finished(found):
            plan.log(
                f"{plan.command}: deciding again"
                f" {f'by {plan.policy.id}' if plan.policy else f'at {plan.threshold:.4g}'},"
                " without scoring again"
            )
            if (summary := decide_again(plan, found)) is not None:
                return summary
    with ExitStack() as stack:
        is_local = runs_here(plan.config, plan.config.num_workers, plan.device)
        start = _start_here if is_local else _start_on_ray
        run, placement, pool = start(plan, found, stack)
        if (summary := find_result(plan, run)) is not None:  # of another process, meanwhile
            return summary
        if plan.config.retry_errors:
            reopen_run(run)
        session, stall_timeout_s = secrets.token_hex(4), plan.config.stall_timeout_s
        options = WorkerOptions(session, plan.config.retry_errors, stall_timeout_s)
        task = WorkerTask(
            run=run,
            source=plan.source,
            make_processor=plan.make_processor,
            placement=placement,
            options=options,
        )
        num_workers = min(placement.num_workers, run.manifest.num_shards)
        ran_on = describe_workers(num_workers, is_local)
        plan.log(f"{plan.command}: starting {ran_on} ...")
        if pool is not None:
            stream, describe = pool.report_shards(task), lambda: f"there are {ran_on}"
        else:
            from cifake_ray.stages.batch.ray_pool import describe_cluster, report_shards

            is_over = Event()
            stack.callback(is_over.set)
            stream, describe = report_shards(task, is_over), describe_cluster
        totals = Totals(listed=run.manifest.num_rows)
        watched = watch_progress(stream, run, session, stall_timeout_s, describe)
        with closing(watched) as reports:
            for report in reports:
                if isinstance(report, CifakeError):
                    raise report
                totals.add(report)
                plan.on_progress(totals.progress())
        return finish_batch(plan, run, totals, ran_on)


def _start_here(
    plan: BatchPlan, found: Run | None, stack: ExitStack
) -> tuple[Run, Placement, LocalPool]:
    """Place the workers on this machine, and list the source while they start."""
    here = read_local_resources(plan.device)
    placement = choose_placement(here, plan.config.num_workers, plan.device)
    placement = replace(placement, num_feeders=0)  # they are tasks of Ray
    pool = stack.enter_context(LocalPool(placement, plan.make_processor.__module__))

    def list_images() -> Listing:
        listing = plan.list_images()
        listing.change_batches(pool.follow_listing)
        return listing

    new = replace(plan.run, list_source=list_images, workers=pool)
    return found or new.freeze(), placement, pool


def _start_on_ray(
    plan: BatchPlan, found: Run | None, stack: ExitStack
) -> tuple[Run, Placement, None]:
    """Connect to a cluster, or start Ray, while the source is listed."""
    from cifake_ray.stages.cluster import connect_cluster

    lister, workers = ThreadPoolExecutor(1), AwaitedPool(plan.config.num_workers or 1)
    stack.callback(lister.shutdown, wait=False)  # Ctrl-C does not wait for a long listing
    stack.callback(workers.give_up)
    new = replace(plan.run, workers=workers)
    opening = lister.submit(lambda: found or new.freeze())
    opening.add_done_callback(lambda _: workers.wanted.set())
    # Ray takes seconds to start, so start it while a long source is listed; but not if an
    # autoscaler would start nodes that are idle until then.
    workers.wanted.wait(None if plan.config.scale_timeout_s else SHORT_LISTING_S)
    if opening.done():
        opening.result()  # report an error of the source before starting Ray
    least = Placement(plan.config.num_workers or 1, 1, int(plan.device == "cuda"))
    resources = stack.enter_context(connect_cluster(plan.config, least, plan.log))
    placement = choose_placement(resources, plan.config.num_workers, plan.device)
    workers.use(RayPool(choose_placement(resources, plan.config.num_workers, "cpu")))
    stack.callback(workers.give_up)  # before Ray ends: the next use of it would start another one
    return opening.result(), placement, None


def finish_batch(plan: BatchPlan, run: Run, totals: Totals, ran_on: str) -> BatchSummary:
    """Write what marks a run as finished, once all of its shards are committed."""
    plan.before_success(run)
    elapsed_s = time.monotonic() - plan.started_s
    is_counted = all(stats.called_fake for stats in totals.shards)  # not by earlier versions
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
        steady_images_per_s=round(totals.rate, 1),
        threshold=None if plan.policy else plan.threshold,
        policy=plan.policy.id if plan.policy else "",
        called_fake=dict(totals.called_fake) if is_counted else {},
        thresholds=plan.thresholds,
        provenance=dict(totals.provenance),
        ran_on=ran_on,
        precision=plan.inputs.get("precision", ""),
        **run.counts,
    )
    clear_attempts(run)
    finish_run(run, totals.shards, asdict(summary))
    return summary


def decide_again(plan: BatchPlan, run: Run) -> BatchSummary | None:
    """Finish a run whose verdicts were changed, without Ray and without scoring.

    None if a shard is missing or damaged, or has errors to retry.
    """
    assert plan.threshold is not None
    totals = Totals(listed=run.manifest.num_rows)
    decide = partial(decide_shard, run, threshold=plan.threshold, policy=plan.policy)
    pool = ThreadPoolExecutor(DECIDING_THREADS)
    try:
        for stats in pool.map(decide, range(run.manifest.num_shards)):
            if stats is not None:
                totals.add(ShardReport(stats=stats, worked=0, retried=False))
            plan.on_progress(totals.progress())
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C waits only for what has begun
    is_whole = len(totals.shards) == run.manifest.num_shards
    has_work = plan.config.retry_errors and count_retryable(totals.errors)
    return finish_batch(plan, run, totals, "one process") if is_whole and not has_work else None


def find_result(plan: BatchPlan, run: Run) -> BatchSummary | None:
    """Return the summary of a run that has finished, unless there is work left.

    That is with `--retry-errors`, and for a run with other verdicts.
    """
    if not is_finished(run) or plan.run.changes_verdicts(run):
        return None
    summary = read_summary(plan.out)
    has_work = plan.config.retry_errors and count_retryable(summary.errors)
    return None if has_work else summary
