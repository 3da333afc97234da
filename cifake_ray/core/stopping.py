"""Which epoch is the best, and when to stop waiting for a better one.

Floor: core.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from cifake_ray.config import Monitor, TrainConfig


def to_score(row: dict[str, Any], monitor: Monitor) -> float:
    """The monitored value of a row of the history, as a number of which more is better."""
    value = float(row[monitor])
    return -value if monitor == "val_loss" else value


def best_epoch(history: list[dict[str, Any]], monitor: Monitor) -> int:
    """The first epoch of the highest score."""
    best = max(history, key=lambda row: (to_score(row, monitor), -row["epoch"]))
    return int(best["epoch"])


@dataclass
class Patience:
    """How long the wait has been: plain numbers, a part of the checkpoint."""

    best_score: float = -math.inf  # of any epoch
    mark: float = -math.inf  # what the next epoch must exceed, by --min-delta, to end the wait
    num_waited: int = 0  # epochs since one did

    def watch(self, score: float, min_delta: float) -> bool:
        """Take notice of an epoch; whether it is the best so far."""
        if score > self.mark + min_delta:
            self.mark, self.num_waited = score, 0
        else:
            self.num_waited += 1
        is_best = score > self.best_score
        self.best_score = max(score, self.best_score)
        return is_best

    def is_over(self, patience: int | None) -> bool:
        return patience is not None and self.num_waited >= patience


def explain_end(history: list[dict[str, Any]], config: TrainConfig) -> str:
    """Why a finished run ended, for its summary."""
    if len(history) == config.epochs:
        return f"all {config.epochs} epochs done"
    return f"{config.monitor} no better for {config.patience} epochs"
