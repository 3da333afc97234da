"""Compare two detectors on the same images, and variants over several seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cifake_ray.core.evaluation.calibration import Floats, Ints
from cifake_ray.core.evaluation.metrics import explain_undefined, make_interval
from cifake_ray.core.schema import FAKE, REAL

Interval = dict[str, Any]


def compare_pair(
    label: Ints,
    ours: tuple[Floats, Floats],
    baseline: tuple[Floats, Floats],
    num_bootstrap: int,
    seed: int = 0,
) -> dict[str, Any]:
    """Return what differs between two detectors' logit and p_fake of the same images, int[N].

    - accuracy, auroc: ours less the baseline's, with 95% intervals of a paired bootstrap, which is
      stratified by class: both detectors see the same resample
    - only_ours_right, only_baseline_right: images, at 0.5
    - p_value: McNemar's exact test of these two counts (two-sided binomial, McNemar 1947)
    """
    from scipy.stats import binomtest

    right = [(p_fake >= 0.5) == (label == FAKE) for _, p_fake in (ours, baseline)]
    only_ours, only_baseline = int(np.sum(right[0] & ~right[1])), int(np.sum(right[1] & ~right[0]))
    differing = only_ours + only_baseline
    gain = right[0].astype(np.int64) - right[1]
    classes = [np.flatnonzero(label == value) for value in (REAL, FAKE)]
    reason = explain_undefined(*map(len, classes)).get("auroc")
    ranks = [] if reason else [_Ranks(logit, classes) for logit, _ in (ours, baseline)]
    rng = np.random.default_rng(seed)
    draws: dict[str, list[float]] = {"accuracy": [], "auroc": []}
    for _ in range(num_bootstrap):
        weights = [
            np.bincount(rng.integers(0, len(rows), len(rows)), minlength=len(rows))
            for rows in classes
        ]
        gained = sum(w @ gain[rows] for w, rows in zip(weights, classes, strict=True))
        draws["accuracy"].append(float(gained) / len(label))
        if ranks:
            draws["auroc"].append(ranks[0].find_auroc(weights) - ranks[1].find_auroc(weights))
    whole = [np.ones(len(rows), np.int64) for rows in classes]
    auroc = ranks[0].find_auroc(whole) - ranks[1].find_auroc(whole) if ranks else None
    return {
        "accuracy": make_interval(float(gain.mean()), np.array(draws["accuracy"])),
        "auroc": make_interval(auroc, np.array(draws["auroc"]), reason),
        "only_ours_right": only_ours,
        "only_baseline_right": only_baseline,
        "p_value": float(binomtest(only_ours, differing).pvalue) if differing else 1.0,
    }


class _Ranks:
    """The order of the logits of two classes, for AUROCs of resamples without sorting again."""

    def __init__(self, logit: Floats, classes: Sequence[npt.NDArray[np.int64]]) -> None:
        values, codes = np.unique(logit, return_inverse=True)
        self.size = len(values)
        self.codes = [codes[rows] for rows in classes]

    def find_auroc(self, weights: Sequence[npt.NDArray[np.int64]]) -> float:
        """Return the AUROC where each image counts as often as its weight says; ties count half."""
        real, fake = (
            np.bincount(codes, weights=weight, minlength=self.size)
            for codes, weight in zip(self.codes, weights, strict=True)
        )
        return float(fake @ (real.cumsum() - real / 2)) / float(real.sum() * fake.sum())


def average_seeds(values: Sequence[float | None]) -> Interval:
    """Return the mean of a metric over seeds with Student's 95% interval; None if one is None.

    The interval is cut off at 0 and 1, beyond which there is no accuracy, AUROC, rate or ECE.
    """
    from scipy.stats import t

    known = [value for value in values if value is not None]
    mean = float(np.mean(known)) if len(known) == len(values) else None
    if mean is None or len(known) == 1:
        return {"value": mean, "low": None, "high": None}
    spread = float(t.ppf(0.975, len(known) - 1) * np.std(known, ddof=1) / np.sqrt(len(known)))
    return {"value": mean, "low": max(mean - spread, 0.0), "high": min(mean + spread, 1.0)}


def compare_seeds(ours: Sequence[float | None], baseline: Sequence[float | None]) -> Interval:
    """Return the difference of two means over seeds with Welch's 95% interval and p-value.

    The interval is None unless each has two seeds or more and they differ. Source: Welch 1947.
    """
    from scipy.stats import t

    means = [average_seeds(values)["value"] for values in (ours, baseline)]
    if None in means:
        return {"value": None, "low": None, "high": None}
    value = means[0] - means[1]
    difference = {"value": value, "low": None, "high": None}
    if min(len(ours), len(baseline)) < 2:
        return difference
    sizes = np.array([len(ours), len(baseline)])
    shares = np.array([np.var(np.array(v, float), ddof=1) for v in (ours, baseline)]) / sizes
    if not shares.any():
        return difference
    error = float(np.sqrt(shares.sum()))
    freedom = shares.sum() ** 2 / (shares**2 / (sizes - 1)).sum()
    spread = float(t.ppf(0.975, freedom)) * error
    p_value = 2 * float(t.sf(abs(value) / error, freedom))
    return {**difference, "low": value - spread, "high": value + spread, "p_value": p_value}
