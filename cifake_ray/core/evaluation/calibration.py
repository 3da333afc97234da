"""Turn logits into p_fake and decisions, and fit the temperature and the thresholds for that.

Decisions are `p_fake >= threshold`, as in the score tables. Calibrated thresholds are exact float32
values, so numpy, pyarrow and SQL agree on them, in float32 and in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import expit

from cifake_ray.core.schema import FAKE, REAL

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.integer[Any]]

TEMPERATURE_BOUNDS = (0.05, 100.0)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Temperature and thresholds of a detector. Thresholds are on p_fake, in [0, 1]."""

    temperature: float  # divides the logit, > 0; above 1 the detector was overconfident
    threshold: float  # maximises balanced accuracy
    # At most 1% and 0.1% of REAL at or above it; None if no threshold in [0, 1] keeps that, since
    # more REAL images have p_fake = 1.0.
    threshold_fpr_1: float | None
    threshold_fpr_01: float | None


def compute_p_fake(logit: Floats, temperature: float) -> npt.NDArray[np.float32]:
    """Return sigmoid(logit / temperature): float32[N] in [0, 1], computed in float64.

    Exactly 1.0 from a calibrated logit of about 17 on: no threshold separates such images.
    """
    p_fake: npt.NDArray[np.float64] = expit(logit.astype(np.float64) / temperature)
    return p_fake.astype(np.float32)


def calibrate(logit: Floats, label: Ints) -> Calibration:
    """Fit temperature and thresholds on labelled logits, float[N] and int[N] in {0, 1}.

    Succeeds for whatever finite logits a training ends with; ValueError for an empty or non-finite
    input.
    """
    check_scores(logit, label)
    temperature = fit_temperature(logit, label)
    p_fake = compute_p_fake(logit, temperature)
    return Calibration(
        temperature=temperature,
        threshold=_best_threshold(p_fake, label),
        threshold_fpr_1=_threshold_at_fpr(p_fake, label, 0.01),
        threshold_fpr_01=_threshold_at_fpr(p_fake, label, 0.001),
    )


def fit_temperature(logit: Floats, label: Ints) -> float:
    """Return the temperature of lowest NLL (Guo et al. 2017, section 4.2), in TEMPERATURE_BOUNDS.

    Targets are smoothed as in Platt (1999), (n + 1) / (n + 2) for a class of n images: where a
    validation set is separated perfectly, the plain NLL falls for ever as the temperature goes to
    0 and every p_fake becomes 0 or 1. The smoothing vanishes as n grows.
    """
    from scipy.optimize import minimize_scalar  # takes half a second, which scoring does not need

    z = logit.astype(np.float64)
    num_fake = int(np.sum(label == FAKE))
    num_real = len(label) - num_fake
    target = np.where(label == FAKE, (num_fake + 1) / (num_fake + 2), 1 / (num_real + 2))

    def smoothed_nll(log_temperature: float) -> float:
        scaled = z / np.exp(log_temperature)
        return float(np.mean(np.logaddexp(0.0, scaled) - target * scaled))

    low, high = np.log(TEMPERATURE_BOUNDS)
    found = minimize_scalar(smoothed_nll, bounds=(low, high), options={"xatol": 1e-6})
    return float(np.exp(found.x))


def find_midpoint(below: np.float32, above: np.float32) -> float:
    """Return a float32 t with below < t <= above, half-way if float32 has such a value."""
    middle = np.float32((float(below) + float(above)) / 2)
    return float(middle if middle > below else above)


def _best_threshold(p_fake: npt.NDArray[np.float32], label: Ints) -> float:
    """Return the point half-way between two neighbouring scores with the best balanced accuracy.

    Ties go to the candidate nearest 0.5, then to the higher one (fewer false positives).
    """
    scores, group = np.unique(p_fake, return_inverse=True)
    # Images at or above each distinct score: what a threshold just below that score calls FAKE.
    tp = np.bincount(group, weights=label == FAKE)[::-1].cumsum()[::-1]
    fp = np.bincount(group, weights=label == REAL)[::-1].cumsum()[::-1]
    gain = tp * fp[0] - fp * tp[0]  # TPR - FPR in whole numbers, so that ties compare equal
    candidates = np.flatnonzero(gain == gain.max())
    below = np.concatenate([np.zeros(1, np.float32), scores[:-1]])
    thresholds = [find_midpoint(below[i], scores[i]) for i in candidates]
    return min(thresholds, key=lambda t: (abs(t - 0.5), -t))


def _threshold_at_fpr(p_fake: npt.NDArray[np.float32], label: Ints, fpr: float) -> float | None:
    """Return the lowest threshold with at most `fpr` of REAL at or above it; None if there is none.

    All thresholds between two neighbouring scores decide alike; the middle is returned, so that
    rounding on another machine does not change a decision. With fewer than 1 / fpr REAL images it
    is above the highest of them.
    """
    real = np.sort(p_fake[label == REAL])[::-1]
    allowed = count_allowed(len(real), fpr)
    if not len(real) or real[allowed] == 1.0:
        return None
    below = real[allowed]  # the highest score that must be called REAL
    above = p_fake[p_fake > below]
    return find_midpoint(below, above.min() if len(above) else np.float32(1.0))


def count_allowed(num_real: int, fpr: float) -> int:
    """Return how many of `num_real` images are at most the share `fpr` of them."""
    return int(fpr * num_real + 1e-9)  # the addend repairs products that end in .999999


def check_scores(logit: Floats, label: Ints) -> None:
    """Raise ValueError unless logits and labels are finite, valid and equally many."""
    if logit.ndim != 1 or logit.shape != label.shape:
        raise ValueError(f"logit {logit.shape} and label {label.shape} must be [N] both")
    if len(logit) == 0:
        raise ValueError("no image to measure: give at least one with a label and a logit")
    if bad := int(np.sum(~np.isfinite(logit))):
        raise ValueError(f"{bad} of {len(logit)} logits are NaN or infinite: drop such rows first")
    if not np.isin(label, (REAL, FAKE)).all():
        raise ValueError(f"labels are 0 (REAL) and 1 (FAKE), not {np.unique(label)[:5].tolist()}")
