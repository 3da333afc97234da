"""Summarise trials: a row for each, the best of them, and the importance of each option."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cifake_ray.config import Monitor
from cifake_ray.core.evaluation.metrics import wilson_interval
from cifake_ray.core.training.early_stopping import to_score

MIN_TRIALS = 8  # below, importance would be noise


def to_row(
    number: int,
    chosen: Mapping[str, Any],
    end: str | None,
    num_parameters: int | None,
    history: Sequence[Mapping[str, Any]],
    objective: Monitor,
) -> dict[str, Any]:
    """Return a row of the table of trials; the objective is that of its best epoch."""
    best = max(history, key=lambda row: to_score(dict(row), objective), default=None)
    return {
        "trial": number,
        "end": end,
        "epochs": len(history),
        objective: None if best is None else best[objective],
        "best_epoch": None if best is None else best["epoch"],
        "num_parameters": num_parameters,
        "steps": history[-1]["step"] if history else 0,
        "train_s": round(sum(row["train_s"] for row in history), 3),
        **chosen,
    }


def find_best(rows: Sequence[dict[str, Any]], objective: Monitor) -> dict[str, Any] | None:
    """Return the row of the best trial, of equals the first; None if none has trained an epoch."""
    trained = [row for row in rows if row[objective] is not None]
    return max(trained, key=lambda row: to_score(row, objective), default=None)


def find_interval(row: Mapping[str, Any], objective: Monitor, num_val: int) -> list[float] | None:
    """Return the 95% interval of an accuracy over `num_val` images, None for another objective."""
    if objective != "val_accuracy":
        return None
    interval = wilson_interval(round(row[objective] * num_val), num_val)
    return [round(interval[end] or 0.0, 6) for end in ("low", "high")]


def measure_importance(
    rows: Sequence[dict[str, Any]], names: Sequence[str], objective: Monitor, seed: int = 0
) -> dict[str, float]:
    """Return the share of the objective's variance that each option explains, largest first.

    Permutation importance of a random forest (Breiman 2001), which covers interactions; negative
    ones, which are noise, are 0. Empty for fewer than MIN_TRIALS trials or equal objectives.
    """
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance

    trained = [row for row in rows if row[objective] is not None]
    scores = np.array([to_score(row, objective) for row in trained])
    varied = [name for name in names if len({str(row[name]) for row in trained}) > 1]
    if len(trained) < MIN_TRIALS or not varied or np.ptp(scores) == 0:
        return {}
    inputs = np.column_stack([to_axis([row[name] for row in trained])[0] for name in varied])
    forest = RandomForestRegressor(n_estimators=200, random_state=seed).fit(inputs, scores)
    found = permutation_importance(forest, inputs, scores, n_repeats=20, random_state=seed)
    shares = np.maximum(found.importances_mean, 0)
    shares = shares / shares.sum() if shares.sum() > 0 else shares
    order = np.argsort(-shares, kind="stable")
    return {varied[i]: float(shares[i]) for i in order}


def to_axis(values: Sequence[Any]) -> tuple[np.ndarray, dict[float, str]]:
    """Map values of an option to float64[N] in [0, 1]; return the axis labels by position too.

    All values have labels, of more than six different numbers the lowest, the middle and the
    highest. Those keep their distances, on a log scale if they span a factor of 20; others are
    spaced evenly.
    """
    is_number = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    different = sorted(set(values), key=lambda v: v if is_number else str(v))
    if len(different) == 1:
        return np.full(len(values), 0.5), {0.5: format_value(different[0])}
    if not is_number or len(different) <= 6:
        place = {value: i / (len(different) - 1) for i, value in enumerate(different)}
        return np.array([place[v] for v in values]), {p: format_value(v) for v, p in place.items()}
    low, high = different[0], different[-1]
    is_log = low > 0 and high / low >= 20
    scale = math.log if is_log else float
    spread = scale(high) - scale(low)
    middle = math.sqrt(low * high) if is_log else (low + high) / 2
    marks = {0.0: format_value(low), 0.5: format_value(middle), 1.0: format_value(high)}
    return np.array([(scale(v) - scale(low)) / spread for v in values]), marks


def format_value(value: Any) -> str:
    """Format a chosen value; fractions get three digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
