"""Run a trial in its process: train as `train` does, and report each epoch to Ray Tune.

A resumed search reports the stored epochs of its trials again, which restores the state of the
scheduler without training an epoch twice.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayError, RayTaskError

from cifake_ray.config import TrainConfig, TuneConfig
from cifake_ray.core.training.early_stopping import to_score
from cifake_ray.errors import CifakeError, ResourceError
from cifake_ray.stages.cluster import find_cause
from cifake_ray.stages.train.driver import finish_training, train_detector
from cifake_ray.stages.tune.plan import TrialPlan
from cifake_ray.storage.io.files import make_folder, read_bytes, read_json, write_json
from cifake_ray.storage.runs.tune_run import Trial, TuneRun

OBJECTIVE, CURRENT = (
    "objective",
    "current",
)  # of the best epoch so far, and of this one; more is better
REPLAYED = "known"  # whether an earlier attempt reported it already
FAILED = "failed"  # prefix of the `end` of a trial that will be tried again


def run_trial(settings: dict[str, Any], plan: TrialPlan) -> None:
    """Train a trial, resume it, or report the epochs of one that has ended."""
    search = plan.search
    trial = search.read_trial(settings["trial"]["number"])
    checkpoint = tune.get_checkpoint()  # with population based training only
    if checkpoint is not None:
        trial = _take_over(search, trial, settings["trial"]["chosen"], checkpoint)
    config = plan.to_train_config(trial)
    report = _Report(search, trial, plan.config)
    run = search.run_of(trial)
    history = run.read_history()
    if history and trial.end is None:  # a kill may have come between its two files
        run.write_history(history)
    for number, row in enumerate(history, start=1):
        report.record(row)
        if checkpoint is None and plan.config.scheduler != "pbt":  # pbt compares only new epochs
            report.send(row, is_replayed=trial.end is not None or number < len(history))
    if trial.end is None:
        train_detector(config, report, time.monotonic())
    report.send_last()


def finish_trial(config: TrainConfig, num_cpus: int, use_gpu: bool) -> None:
    """Write the bundle of a stopped trial, where trials run: the driver may lack a GPU."""
    room = ray.remote(num_cpus=num_cpus, num_gpus=int(use_gpu))
    try:
        ray.get(room(finish_training).remote(config, use_gpu))
    except RayTaskError as error:
        if isinstance(error.cause, CifakeError):
            raise error.cause from None
        raise CifakeError(f"the best trial has no bundle: {find_cause(error)}") from error
    except RayError as error:
        raise ResourceError(
            f"the best trial has no bundle, its worker was lost ({find_cause(error)}); run the same"
            " command again"
        ) from error


@dataclass
class _Report:
    """Reports each epoch to Ray Tune, the last one only when the bundle is written.

    A scheduler may stop a trial at a report, and then nothing more is written.
    """

    search: TuneRun
    trial: Trial
    config: TuneConfig
    best: float = float("-inf")
    last: dict[str, Any] | None = None  # not reported yet

    def __call__(self, row: dict[str, Any], epochs: int) -> None:
        self.record(row)
        if row["epoch"] == epochs:
            self.last = row
        elif self.config.scheduler == "pbt":
            with tempfile.TemporaryDirectory(prefix="cifake-trial-") as folder:
                last = self.search.run_of(self.trial).checkpoint_path
                (Path(folder) / "last.pt").write_bytes(read_bytes(last))
                write_json(Path(folder) / "trial.json", {"number": self.trial.number})
                self.send(row, tune.Checkpoint.from_directory(folder))
        else:
            self.send(row)

    def record(self, row: dict[str, Any]) -> None:
        self.best = max(self.best, to_score(row, self.config.objective))

    def send(self, row: dict[str, Any], checkpoint: Any = None, is_replayed: bool = False) -> None:
        current = to_score(row, self.config.objective)
        scores = {OBJECTIVE: self.best, CURRENT: current, REPLAYED: is_replayed}
        tune.report({"epoch": row["epoch"], **scores}, checkpoint=checkpoint)

    def send_last(self) -> None:
        if self.last is not None:
            self.send(self.last)


def _take_over(search: TuneRun, trial: Trial, chosen: dict[str, Any], checkpoint: Any) -> Trial:
    """Return the trial; if pbt assigned it a better one's weights and options, in a new run."""
    with checkpoint.as_directory() as folder:
        donor = read_json(Path(folder) / "trial.json")
        if donor["number"] == trial.number and chosen == trial.chosen:
            return trial  # it only waited for its turn
        trial = replace(trial, chosen=chosen, generation=trial.generation + 1)
        run = search.run_of(trial)
        make_folder(run.path, parents=False)
        run.write_checkpoint((Path(folder) / "last.pt").read_bytes())
    search.write_trial(trial)
    return trial
