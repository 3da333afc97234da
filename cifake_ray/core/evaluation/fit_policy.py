"""Choose the thresholds of a policy on the scores of REAL images, with a promise.

The promise, for images drawn as those REAL ones were: with the given confidence, at most
`target_fpr` of them are called FAKE. The threshold is the order statistic for which that holds
(the one-sided Clopper-Pearson bound, which is Wilks' tolerance bound), so it is conservative.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from scipy.special import bdtr, bdtrc, betaincinv

from cifake_ray.core.evaluation.calibration import find_midpoint
from cifake_ray.core.evaluation.policy import Cut, Scores

FEW = 5  # a threshold that rests on fewer images above it says so


def count_needed(target_fpr: float, confidence: float) -> int:
    """Return the least number of REAL images that can promise a false-positive rate."""
    return math.ceil(math.log1p(-confidence) / math.log1p(-target_fpr) - 1e-9)


def find_least_fpr(num_real: int, confidence: float) -> float:
    """Return the least false-positive rate that so many REAL images can promise."""
    return float(-math.expm1(math.log1p(-confidence) / num_real)) if num_real else 1.0


def fit_cut(
    p_fake: Scores, target_fpr: float, confidence: float, unsure_fpr: float | None = None
) -> Cut | None:
    """Return the lowest thresholds that keep the promise on REAL images with these scores.

    `unsure_from` is the other end: with the same confidence, more than `target_fpr`, or
    `unsure_fpr`, of REAL images are at or above it. So images that are unsure are those of which
    this many REAL images cannot say on which side they belong. None when they are too few, or too
    many of them have p_fake = 1.0.
    """
    real, count = np.sort(p_fake)[::-1], len(p_fake)
    above = np.arange(count)  # so many of the images at or above the threshold
    # The true rate beyond the k-th highest score is distributed as Beta(k + 1, n - k).
    num_allowed = int(np.sum(bdtr(above, count, target_fpr) <= 1 - confidence))
    if not num_allowed or real[num_allowed - 1] == 1.0:
        return None
    below = real[num_allowed - 1]  # the highest score that must not be called FAKE
    higher = real[real > below]
    threshold = find_midpoint(below, higher.min() if len(higher) else np.float32(1.0))
    is_low = bdtrc(above, count, unsure_fpr or target_fpr) <= 1 - confidence
    unsure_from = float(real[np.argmax(is_low)]) if is_low.any() else 0.0
    low, high = measure_interval(len(higher), count, confidence)
    return Cut(threshold, min(unsure_from, threshold), count, len(higher), (low, high))


def measure_interval(hits: int, count: int, confidence: float) -> tuple[float, float]:
    """Return the two-sided Clopper-Pearson interval of a share."""
    tail = (1 - confidence) / 2
    low = float(betaincinv(hits, count - hits + 1, tail)) if hits else 0.0
    high = float(betaincinv(hits + 1, count - hits, 1 - tail)) if hits < count else 1.0
    return low, high


def fit_groups(
    groups: Mapping[str, Scores], target_fpr: float, confidence: float, unsure_fpr: float | None
) -> tuple[dict[str, Cut], dict[str, int]]:
    """Return the thresholds of each group, and how many images the others have."""
    cuts = {
        name: fit_cut(p_fake, target_fpr, confidence, unsure_fpr)
        for name, p_fake in sorted(groups.items())
    }
    fitted = {name: cut for name, cut in cuts.items() if cut is not None}
    return fitted, {name: len(groups[name]) for name, cut in cuts.items() if cut is None}
