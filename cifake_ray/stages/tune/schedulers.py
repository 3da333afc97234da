"""Adapt Ray Tune: its schedulers, which stop trials, its searcher, which chooses options, and what
it displays."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
from contextlib import suppress
from typing import Any

from ray import tune
from ray.tune.execution.class_cache import ENV_VARS_TO_PROPAGATE
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search import Searcher

from cifake_ray.config import TuneConfig
from cifake_ray.core.search.space import AUGMENT, ParameterRange, Space
from cifake_ray.errors import UsageError
from cifake_ray.stages.tune.plan import TrialPlan
from cifake_ray.stages.tune.trial_worker import CURRENT, OBJECTIVE, REPLAYED
from cifake_ray.storage.runs.tune_run import Trial

MOST_LEFT_OUT = 50  # choices beyond the budget, per trial
# Options that may change during training.
MUTABLE = {"lr", "momentum", "weight_decay", "grad_clip", "label_smoothing", "mixup", "cutmix"}


def configure_ray_tune() -> None:
    """Disable the tables, logs and tracebacks of Ray Tune, and keep keys out of its trials.

    Ray Tune copies the AWS keys of the driver to the runtime environment of every trial, which Ray
    displays and logs. A trial reads those of its node, as all workers do.
    """
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # it prints every traceback
    ENV_VARS_TO_PROPAGATE.difference_update(
        [name for name in ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")]
    )


def check_searcher(config: TuneConfig, space: Space) -> None:
    """Raise UsageError for a searcher or scheduler that does not support the space."""
    if config.searcher == "tpe" and importlib.util.find_spec("optuna") is None:
        raise UsageError("--searcher tpe: optuna is not installed; `pip install optuna` brings it")
    if config.scheduler == "pbt":
        fixed = [n for n in space if n not in MUTABLE and not n.startswith(AUGMENT)]
        if fixed:
            raise UsageError(
                f"--scheduler pbt changes options during training, and {', '.join(fixed)} cannot"
                f" change then; search {', '.join(sorted(MUTABLE))} and steps of augmentation"
            )


class _Asha(AsyncHyperBandScheduler):
    """Asynchronous successive halving that records replayed results and never stops a trial at one.

    A resumed search replays the histories of its trials in any order, so evaluating them again
    would stop trials that had passed.
    """

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision: str = super().on_trial_result(controller, trial, result)
        return TrialScheduler.CONTINUE if result.get(REPLAYED) else decision


class _Median(MedianStoppingRule):
    """Median stopping that records replayed results without evaluating them, as `_Asha` does."""

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if result.get(REPLAYED):  # evaluated, it would count as stopped, and its next result fail
            self.on_trial_complete(controller, trial, result)  # only records the result
            return TrialScheduler.CONTINUE
        return super().on_trial_result(controller, trial, result)


class _Pbt(PopulationBasedTraining):
    """Population based training, which copies weights and options of better trials with changes."""

    space: Space

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Keep the trial's number and the ranges of the search when options are copied to it.

        Ray Tune copies the number too, and multiplies options by 0.8 or 1.2, beyond their ranges.
        """
        number = trial.config["trial"]["number"]
        decision = super().on_trial_result(controller, trial, result)
        if (copied := trial.config["trial"])["number"] != number:
            chosen = {name: self.space[name].clip(v) for name, v in copied["chosen"].items()}
            trial.set_config({**trial.config, "trial": {"number": number, "chosen": chosen}})
        return decision


def make_scheduler(config: TuneConfig, epochs: int, space: Space) -> TrialScheduler:
    """Return the scheduler of the config.

    Sources: Li et al. 2020 (asha), Golovin et al. 2017 (median), Jaderberg et al. 2017 (pbt).
    """
    if config.scheduler == "asha":
        return _Asha(
            time_attr="epoch",
            max_t=max(epochs, config.grace_epochs),
            grace_period=config.grace_epochs,
            reduction_factor=config.reduction_factor,
            stop_last_trials=False,
            metric=OBJECTIVE,
            mode="max",
        )
    if config.scheduler == "median":
        return _Median(
            time_attr="epoch",
            grace_period=config.grace_epochs,
            min_samples_required=3,
            # Otherwise trials would be paused while there are fewer samples.
            min_time_slice=math.inf,  # type: ignore[arg-type]
            metric=OBJECTIVE,
            mode="max",
        )
    if config.scheduler == "pbt":
        pbt = _Pbt(
            time_attr="epoch",
            metric=CURRENT,
            mode="max",
            perturbation_interval=config.grace_epochs,
            hyperparam_mutations={"trial": {"chosen": {n: to_tune(d) for n, d in space.items()}}},
            log_config=False,
            require_attrs=False,
        )
        pbt.space = space
        return pbt
    return FIFOScheduler()  # type: ignore[no-untyped-call]


def to_tune(domain: ParameterRange) -> Any:
    """Return Ray Tune's distribution; for a choice the list, in which PBT moves to neighbours."""
    if domain.kind == "choice":
        return list(domain.values)
    return getattr(tune, domain.kind)(*domain.values)


class RecordedSearcher(Searcher):
    """Optuna's TPE, with every choice stored before it is tried.

    It suggests trials of an earlier attempt again unchanged, and gives Optuna their results.
    """

    def __init__(self, plan: TrialPlan, space: Space) -> None:
        super().__init__(metric=OBJECTIVE, mode="max")
        from ray.tune.search.optuna import OptunaSearch

        domains = OptunaSearch.convert_search_space(
            {
                name: tune.choice(list(d.values)) if d.kind == "choice" else to_tune(d)
                for name, d in space.items()
            }
        )
        self.plan, self.space = plan, space
        self.known = {trial.number: trial for trial in plan.search.read_trials()}
        # Optuna starts again: with the same seed it would repeat the choices that are stored.
        seed = plan.config.seed + len(self.known)
        self.inner = OptunaSearch(domains, metric=OBJECTIVE, mode="max", seed=seed)
        self.recalled: dict[str, Trial] = {}  # by Ray Tune's name of the trial
        self.asked: dict[str, str] = {}  # Optuna's names of the other trials, by Ray Tune's
        self.number = 0

    def suggest(self, trial_id: str) -> Any:
        """Return the settings of `run_trial`."""
        if self.number == self.plan.config.trials:
            return Searcher.FINISHED
        if self.number == 0 and not self.known:
            with suppress(ValueError):  # a recipe beyond the budget is left out
                self.known[0] = self.plan.measure(Trial(0, self.plan.find_baseline(self.space)))
                self.plan.search.write_trial(self.known[0])
        if (trial := self.known.get(self.number)) is not None:
            self.recalled[trial_id] = trial
        elif (trial := self._ask(trial_id)) is not None:
            self.plan.search.write_trial(trial)
        else:
            return Searcher.FINISHED
        self.number += 1
        return {"trial": {"number": trial.number, "chosen": trial.chosen}}

    def _ask(self, trial_id: str) -> Trial | None:
        """Return Optuna's choice; count those beyond the budget as failed. None when all are."""
        for attempt in range(MOST_LEFT_OUT):
            name = f"{trial_id}-{attempt}"  # Optuna repeats its choice for the same name
            try:
                trial = self.plan.measure(Trial(self.number, self.inner.suggest(name) or {}))
            except ValueError:
                self.inner.on_trial_complete(name, error=True)
            else:
                self.asked[trial_id] = name
                return trial
        return None

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if trial_id in self.asked:
            self.inner.on_trial_result(self.asked[trial_id], result)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        trial = self.recalled.get(trial_id)
        if trial is None:
            self.inner.on_trial_complete(self.asked[trial_id], result, error)
        elif (
            result
            and OBJECTIVE in result
            and all(self.space[name].contains(value) for name, value in trial.chosen.items())
        ):
            self.inner.add_evaluated_point(trial.chosen, result[OBJECTIVE])
