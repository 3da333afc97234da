"""tune: shards -> the best of many trainings, with Ray Tune.

A trial is a training as `train` does it, in a folder of its own; Ray Tune decides which one runs,
where, and for how long. The options of a trial are stored before it starts, and the reason for its
end when it ends, so a killed search resumes by replaying the stored trials to Ray Tune.
"""

from __future__ import annotations

import itertools
import os
import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import ray
import torch

from cifake_ray.config import TrainConfig, TuneConfig, fingerprint_settings, list_options
from cifake_ray.core.search.space import Space, count_grid, list_grid, sample_space
from cifake_ray.core.search.trial_table import find_best, find_interval
from cifake_ray.errors import CifakeError, ResourceError, UsageError
from cifake_ray.report.tune_page import render_tune_page
from cifake_ray.report.tune_text import format_recipe
from cifake_ray.stages.cluster import connect_cluster
from cifake_ray.stages.resources import (
    Node,
    Placement,
    Resources,
    choose_gpu,
    count_local_cpus,
    place_workers,
)
from cifake_ray.stages.train.prepare import describe_options
from cifake_ray.stages.tune.plan import TrialPlan, make_plan, read_space
from cifake_ray.stages.tune.schedulers import (
    MOST_LEFT_OUT,
    RecordedSearcher,
    check_searcher,
    configure_ray_tune,
    make_scheduler,
)
from cifake_ray.stages.tune.trial_callback import TrialCallback
from cifake_ray.stages.tune.trial_worker import FAILED, finish_trial, run_trial
from cifake_ray.storage.datasets.pixel_cache import locate_cache
from cifake_ray.storage.datasets.training_rows import TrainingRows, read_training_rows
from cifake_ray.storage.io.paths import to_arrow
from cifake_ray.storage.runs.trackers import check_trackers
from cifake_ray.storage.runs.tune_run import Trial
from cifake_ray.storage.s3.location import open_path

OUT_OF_TIME = "the time budget was over"


@dataclass(frozen=True)
class TuneSummary:
    """Result of a finished search, printed and stored in `_SUCCESS`."""

    command: str
    out: str
    bundle: str
    recipe: str
    report: str
    trials: int
    ends: dict[str, int]  # trials by the reason for their end
    objective: str
    best_trial: int
    best: float
    best_interval: list[float] | None  # 95%, of an accuracy
    baseline: float | None  # the objective of the recipe as it is, if it was tried
    chosen: dict[str, Any]
    epochs: int  # trained, over all trials
    epochs_planned: int  # if no trial had been stopped for falling behind
    steps: int
    elapsed_s: float


def tune_detector(
    config: TuneConfig,
    started_s: float,
    log: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Search to `config.run`/bundle. The same call resumes; a finished search is left untouched.

    With more `config.trials`, a finished search is extended, except in population based training.
    """
    config = replace(
        config,
        shards=str(open_path(config.shards, config.store)),
        run=str(open_path(config.run, config.store)),
        cache_dir=config.cache_dir and str(locate_cache(config.cache_dir)),  # else each node's own
    )
    check_trackers(config.track)
    plan = make_plan(config)
    search = plan.search
    shared = plan.to_train_config(Trial(0, {}))
    space = read_space(config, shared)
    check_searcher(config, space)
    settings = {
        **fingerprint_settings(config),
        "search": {n: [domain.kind, *domain.values] for n, domain in space.items()},
        "recipe": describe_options(shared),
    }
    # Versions before compared it for every search; pbt's trials depend on their number.
    if config.scheduler == "pbt" or "trials" in search.read_settings():
        settings["trials"] = config.trials
        if config.scheduler != "pbt":
            settings["trials"] = search.read_settings()["trials"]
    success = None if config.dry_run else search.read_success()
    if success is not None:
        search.check_options(settings, unread=["rows"])
        is_whole = config.searcher == "grid" and success["trials"] == count_grid(space)
        if config.trials <= success["trials"] or is_whole:
            log("tune: had finished before, so nothing is trained; more --trials extend it")
            return success
    rows = read_training_rows(shared)
    settings["rows"] = rows.hash_rows()
    with _connect(config, log) as resources:
        use_gpu = choose_gpu(config.device, resources)
        num_at_once = _count_at_once(config, resources, use_gpu)
        if config.dry_run:
            return {
                "command": "tune",
                "out": str(search.path),
                "trials": config.trials,
                "at_once": min(num_at_once, config.trials),
                "epochs": plan.options["epochs"],
                "searched": {name: list(domain.values) for name, domain in space.items()},
            }
        with search.lock():
            search.open(settings, asdict(config))
            if success is not None:
                log(
                    f"tune: extending the search from {success['trials']} to {config.trials} trials"
                )
                search.withdraw_success()
            trials = _prepare_trials(plan, space, log)
            log("tune: running trials ...")
            watch = TrialCallback(plan, list(space), log)
            _run_trials(plan, space, trials, num_at_once, use_gpu, watch)
            return _finish(plan, plan.find_baseline(space), watch, use_gpu, rows, started_s)


@contextmanager
def _connect(config: TuneConfig, log: Callable[[str], None]) -> Iterator[Resources]:
    """Yield the resources of the cluster, or of this machine for a dry run without a cluster."""
    has_cluster = ray.is_initialized() or config.address or os.environ.get("RAY_ADDRESS")
    if config.dry_run and not has_cluster:
        yield Resources((Node(count_local_cpus(), torch.cuda.device_count()),))
        return
    num_at_once = (config.max_concurrent or 1) if config.scale_timeout_s else 1
    room = Placement(
        max(1, config.num_workers) * num_at_once,
        config.cpus_per_worker,
        int(config.device == "cuda"),
    )
    with connect_cluster(config, room, log) as resources:
        yield resources


def _count_at_once(config: TuneConfig, resources: Resources, use_gpu: bool) -> int:
    """Return how many trials the cluster can run at once. ResourceError if not even one."""
    per_trial = max(1, config.num_workers)
    cpus = config.cpus_per_worker
    place_workers(resources, num_workers=per_trial, use_gpu=use_gpu, cpus_per_worker=cpus)
    num_places = resources.count_places(cpus, int(use_gpu)) // per_trial
    if config.scheduler == "pbt" and config.num_workers > 0 and num_places < 2:
        raise ResourceError(
            f"--scheduler pbt compares concurrent trials; with --num-workers {config.num_workers}"
            " there is room for one: give --num-workers 0, or more CPUs or GPUs"
        )
    return min(num_places, config.max_concurrent or num_places)


def _prepare_trials(plan: TrialPlan, space: Space, log: Callable[[str], None]) -> list[Trial]:
    """Choose and store the options of every trial; keep those of an earlier attempt.

    The searcher tpe chooses during the search. UsageError when nothing is within the budget.
    """
    config, search = plan.config, plan.search
    known = search.read_trials()
    search.check_options_of(known, space)
    if known:
        over = sum(trial.end is not None for trial in known)
        log(f"tune: resuming with {len(known)} trials, {over} of them over")
    for number, trial in enumerate(known):
        is_lost = trial.end is not None and not search.run_of(trial).read_history()
        if is_lost or (trial.end or "").startswith((FAILED, OUT_OF_TIME)):  # try it again
            known[number] = replace(trial, end=None)
            search.write_trial(known[number])
    if config.searcher == "tpe" or len(known) == config.trials:
        return known
    trials = _choose_trials(plan, space, known, log)
    for trial in trials:
        search.write_trial(trial)
    return trials


def _choose_trials(
    plan: TrialPlan, space: Space, known: list[Trial], log: Callable[[str], None]
) -> list[Trial]:
    """Return the trials within the budget whose options fit; log why others are left out."""
    config, trials, left_out = plan.config, list[Trial](), Counter[str]()
    by_number = {trial.number: trial for trial in known}  # a person may have deleted one
    if config.searcher == "grid":
        choices, num_choices = list_grid(space), count_grid(space)
        if num_choices > config.trials:
            log(f"tune: {config.trials} of {num_choices:,} combinations are tried; see --trials")
    else:
        tries = range(config.trials * MOST_LEFT_OUT)
        samples = (sample_space(space, config.seed, number) for number in tries)
        choices = itertools.chain([plan.find_baseline(space)], samples)
    for chosen in choices:
        number = len(trials)
        if number == config.trials:
            break
        if (trial := by_number.get(number)) is not None:
            if trial.generation or trial.chosen == chosen:  # any other was left out before
                trials.append(trial)
            continue
        try:
            trials.append(plan.measure(Trial(number, chosen)))
        except ValueError as error:
            left_out[str(error)] += 1
    reasons = "; ".join(f"{count:,}: {reason}" for reason, count in left_out.most_common(3))
    if not trials:
        raise UsageError(f"none of {left_out.total():,} choices can be trained ({reasons})")
    if left_out:
        log(f"tune: {left_out.total():,} choices left out ({reasons})")
    return trials


def _run_trials(
    plan: TrialPlan,
    space: Space,
    trials: list[Trial],
    num_at_once: int,
    use_gpu: bool,
    watch: TrialCallback,
) -> None:
    """Run the trials until all have ended or the time budget is used up."""
    from ray import tune

    configure_ray_tune()
    config = plan.config
    filesystem, storage_path = to_arrow(plan.search.path)
    room: dict[str, float] = {"cpu": config.cpus_per_worker, "gpu": int(use_gpu)}
    if config.num_workers > 0:  # a trial only waits for workers of its own
        room = {"cpu": 0, "memory": 1}  # one byte: Ray requires some resource
    settings = [{"number": trial.number, "chosen": trial.chosen} for trial in trials]
    is_tpe = config.searcher == "tpe"
    is_shared = config.scheduler == "pbt" and config.num_workers == 0
    tuner = tune.Tuner(
        tune.with_resources(partial(run_trial, plan=plan), room),
        param_space={} if is_tpe else {"trial": tune.grid_search(settings)},
        tune_config=tune.TuneConfig(
            search_alg=RecordedSearcher(plan, space) if is_tpe else None,
            scheduler=make_scheduler(config, plan.options["epochs"], space),
            num_samples=config.trials if is_tpe else 1,
            # In population based training trials take turns, so all of them must be started.
            max_concurrent_trials=None if is_shared else num_at_once,
            time_budget_s=config.time_budget,
            reuse_actors=config.num_workers == 0,
        ),
        run_config=tune.RunConfig(
            name="ray",
            storage_path=storage_path,
            storage_filesystem=filesystem,
            failure_config=tune.FailureConfig(max_failures=config.max_failures),
            # Population based training copies them; with fewer, Ray warns.
            checkpoint_config=tune.CheckpointConfig(num_to_keep=4),
            callbacks=[watch],
            verbose=0,
        ),
    )
    threads = ThreadPoolExecutor(1)  # in the main thread, Ray Tune would handle Ctrl-C
    try:
        threads.submit(tuner.fit).result()
        watch.write_failures()
    finally:
        threads.shutdown(wait=False)


def _finish(
    plan: TrialPlan,
    baseline: dict[str, Any],
    watch: TrialCallback,
    use_gpu: bool,
    train_rows: TrainingRows,
    started_s: float,
) -> dict[str, Any]:
    """Write the tables, the best trial's bundle and recipe, the report, and `_SUCCESS`."""
    config, search = plan.config, plan.search
    for trial in search.read_trials():
        if trial.end is None:
            watch.write_end(replace(trial, end=OUT_OF_TIME))
    rows = watch.read_rows()
    best = find_best(rows, config.objective)
    if best is None:
        ends = "; ".join(sorted({row["end"] for row in rows})) or "nothing was within the budget"
        raise CifakeError(f"no trial trained an epoch ({ends}); see {search.path / 'trials'}")
    trial = search.read_trial(best["trial"])
    train = plan.to_train_config(trial)
    if search.run_of(trial).read_success() is None:  # it was stopped, but is the best
        finish_trial(train, config.cpus_per_worker, use_gpu)
    settings = {**fingerprint_settings(train), "augment": str(train.augment)}
    default = TrainConfig(shards=train.shards, run="")
    options = {n: v for n, v in settings.items() if getattr(train, n) != getattr(default, n)}
    recipe = format_recipe(
        options,
        command=f"cifake-ray train {config.shards} RUN --recipe recipe.yaml",
        row=best,
        objective=config.objective,
        is_alone=trial.generation == 0,
    )
    search.write_tables(rows)
    search.write_best(trial, recipe)
    summary = TuneSummary(
        command="tune",
        out=str(search.path),
        bundle=str(search.path / "bundle"),
        recipe=str(search.path / "recipe.yaml"),
        report=str(search.path / "report.html"),
        trials=len(rows),
        ends=dict(Counter(row["end"] for row in rows)),
        objective=config.objective,
        best_trial=trial.number,
        best=best[config.objective],
        best_interval=find_interval(best, config.objective, int(train_rows.is_val.sum())),
        baseline=next((r[config.objective] for r in rows if baseline.items() <= r.items()), None),
        chosen=trial.chosen,
        epochs=sum(row["epochs"] for row in rows),
        epochs_planned=sum(
            row["epochs"]
            if row["end"] == OUT_OF_TIME or row["end"].startswith(FAILED)
            else plan.options["epochs"]
            for row in rows
        ),
        steps=sum(row["steps"] for row in rows),
        elapsed_s=round(time.monotonic() - started_s, 1),
    )
    histories = {
        trial.number: search.run_of(trial).read_history() for trial in search.read_trials()
    }
    command = shlex.join(["cifake-ray", "tune", *list_options(config)])
    page = render_tune_page(asdict(summary), rows, histories, recipe, command)
    search.write_report(page.encode())
    watch.show()
    search.write_success(asdict(summary))
    return asdict(summary)
