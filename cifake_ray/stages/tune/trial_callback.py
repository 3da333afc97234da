"""Follow a search in the driver: store and log why each trial ended."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ray.tune import Callback

from cifake_ray.core.search.trial_table import to_row
from cifake_ray.report.tune_text import format_trials
from cifake_ray.stages.cluster import find_cause
from cifake_ray.stages.tune.plan import TrialPlan
from cifake_ray.stages.tune.trial_worker import FAILED
from cifake_ray.storage.runs.tune_run import Trial

TABLE_INTERVAL_S = 30.0


class TrialCallback(Callback):
    """Callbacks that Ray Tune calls in the driver."""

    def __init__(self, plan: TrialPlan, names: Sequence[str], log: Callable[[str], None]) -> None:
        self.plan, self.names, self.log = plan, names, log  # names of the searched options
        self.started_s = self.shown_s = time.monotonic()
        self.known_epochs = sum(row["epochs"] for row in self.read_rows())
        self.failed: list[Any] = []

    def read_rows(self) -> list[dict[str, Any]]:
        """Return a row per trial, read from the folder of the search."""
        return [self._to_row(trial) for trial in self.plan.search.read_trials()]

    def _to_row(self, trial: Trial) -> dict[str, Any]:
        return to_row(
            trial.number,
            trial.chosen,
            trial.end,
            trial.num_parameters,
            self.plan.search.run_of(trial).read_history(),
            self.plan.config.objective,
        )

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if time.monotonic() - self.shown_s >= TABLE_INTERVAL_S:
            self.show()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        search, number = self.plan.search, trial.config["trial"]["number"]
        record = search.read_trial(number)
        if record.end is None:
            success = search.run_of(record).read_success()
            end = success["stopped"] if success else f"stopped by {self.plan.config.scheduler}"
            self.write_end(replace(record, end=end))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.failed.append(trial)  # Ray Tune stores the error in it only after this call

    def write_failures(self) -> None:
        """Store why trials failed, once Ray Tune has finished."""
        for trial in self.failed:
            record = self.plan.search.read_trial(trial.config["trial"]["number"])
            self.write_end(replace(record, end=f"{FAILED}: {find_cause(trial.get_error())}"))

    def write_end(self, record: Trial) -> None:
        """Store and log why a trial ended."""
        self.plan.search.write_trial(record)
        row = self._to_row(record)
        objective = self.plan.config.objective
        best = "" if row[objective] is None else f", {objective} {row[objective]:.4f}"
        self.log(f"tune: trial {record.number}, {row['epochs']} epochs{best}: {record.end}")

    def show(self) -> None:
        """Log the table of all trials, and how long the rest takes if no trial is stopped."""
        self.shown_s = time.monotonic()
        rows, num_epochs = self.read_rows(), self.plan.options["epochs"]
        trained = sum(row["epochs"] for row in rows) - self.known_epochs
        open_rows = [row for row in rows if row["end"] is None]
        left = sum(num_epochs - row["epochs"] for row in open_rows)
        line = f"tune: {len(rows) - len(open_rows)} of {self.plan.config.trials} trials over"
        if left and trained:
            left_s = left * (self.shown_s - self.started_s) / trained
            line += f", at most {math.ceil(left_s / 60)} min left"
        self.log(line)
        width = shutil.get_terminal_size((120, 0)).columns
        objective = self.plan.config.objective
        for line in format_trials(rows, self.names, objective, width).splitlines():
            self.log(line)
