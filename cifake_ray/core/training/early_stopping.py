"""Keep the best epochs, and decide when to stop waiting for a better one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from cifake_ray.config import Monitor, TrainConfig


def to_score(row: dict[str, Any], monitor: Monitor) -> float:
    """Return the monitored value of a row of the history, negated if less is better."""
    value = float(row[monitor])
    return -value if monitor == "val_loss" else value


class KeptEpoch(NamedTuple):
    """An epoch's weights, and their score and logits on validation."""

    epoch: int  # from 1
    score: float
    logit: torch.Tensor  # float32[N]
    weights: dict[str, torch.Tensor]  # on the CPU


def keep_best(
    kept: list[KeptEpoch],
    score: float,
    epoch: int,
    logit: torch.Tensor,
    network: nn.Module,
    num_kept: int,
) -> list[KeptEpoch]:
    """Return the best `num_kept` epochs with the new one, best first, of equals the earliest."""
    if len(kept) == num_kept and score <= kept[-1].score:
        return kept
    weights = {name: t.detach().cpu().clone() for name, t in network.state_dict().items()}
    new = KeptEpoch(epoch, score, logit, weights)
    return sorted([*kept, new], key=lambda e: (-e.score, e.epoch))[:num_kept]


def average_weights(weights: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the mean of each tensor; counters, which are whole numbers, are the first one's."""
    return {
        name: torch.stack([each[name] for each in weights]).mean(0) if t.is_floating_point() else t
        for name, t in weights[0].items()
    }


@dataclass
class Patience:
    """How long no epoch has been better: plain numbers, stored in the checkpoint."""

    mark: float = -math.inf  # what the next epoch must exceed, by --min-delta, to end the wait
    num_waited: int = 0  # epochs since one did

    def watch(self, score: float, min_delta: float) -> None:
        """Count an epoch."""
        if score > self.mark + min_delta:
            self.mark, self.num_waited = score, 0
        else:
            self.num_waited += 1

    def is_over(self, patience: int | None) -> bool:
        return patience is not None and self.num_waited >= patience


def explain_end(history: list[dict[str, Any]], config: TrainConfig) -> str:
    """Return why a finished run ended, for its summary."""
    if len(history) == config.epochs:
        return f"all {config.epochs} epochs done"
    return f"{config.monitor} no better for {config.patience} epochs"
