"""Measure how far scores can be trusted: metrics with 95% intervals, as plain JSON types.

FAKE = 1 is the positive class. Ranking metrics (AUROC, average precision, EER, TPR at an FPR) rank
by `logit`: `p_fake` is float32 and saturates, so that ranking by it would invent ties. Decisions
are `p_fake >= threshold`.

scikit-learn is imported where it is used: it takes 0.7 s, and a training's first step needs none.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from cifake_ray.core.evaluation.calibration import (
    Floats,
    Ints,
    check_scores,
    compute_p_fake,
    count_allowed,
)
from cifake_ray.core.schema import FAKE, LABEL_NAMES, REAL

RATES = {"tpr_at_fpr_1pct": 0.01, "tpr_at_fpr_0.1pct": 0.001}
RANKING_METRICS = ("auroc", "average_precision", "eer", *RATES)  # of both classes
MIN_RESTING_IMAGES = 5  # that a TPR at an FPR rests on, of either class; below, one image decides
RELIABILITY_EDGES = np.linspace(0, 1, 16)  # 15 bins: Guo et al. 2017, section 2
NUM_HISTOGRAM_BINS = 50
MAX_ROC_POINTS = 500
MAX_BOOTSTRAP_CELLS = 4096  # rounds a replicate's ranks to 1/4096 of the images; see _Cells
Z_95 = 1.959963984540054  # two-sided 95% of the normal distribution


def compute_metrics(
    logit: Floats,
    label: Ints,
    *,
    temperature: float,
    threshold: float,
    p_fake: Floats | None = None,
    num_bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Compute every number of the report, as JSON types.

    A value that is undefined is None and has a "reason": AUROC of one class, a TPR that rests on
    fewer than MIN_RESTING_IMAGES. `p_fake`, in [0, 1], replaces sigmoid(logit / temperature).

    `{"value", "low", "high"}` holds a 95% interval: Wilson's for accuracy; else the percentiles of
    a bootstrap stratified by class, widened to hold the value where resampling is biased (ECE).
    `num_bootstrap=0` leaves low and high of the latter None.

    - auroc, average_precision: in [0, 1]. eer: where FPR = FNR, linear between ROC points
    - tpr_at_fpr_1pct, tpr_at_fpr_0.1pct: highest TPR with an FPR not above that, no interpolation
    - brier: mean (p_fake - label)^2. nll: mean negative log likelihood, nats
    - ece: sum of count/N * |mean p_fake - share of FAKE| over 15 equal-width bins of p_fake,
      ((i-1)/15, i/15], 0 in the first (Guo et al. 2017, eq. 3, on the probability of FAKE)
    - ece_uncalibrated, reliability_bins_uncalibrated: the same at temperature 1

    Raises ValueError for an empty or non-finite input and for labels other than 0 and 1.
    """
    check_scores(logit, label)
    logit = logit.astype(np.float64)  # differences of float32 logits may overflow
    rng = np.random.default_rng(seed)
    if p_fake is None:
        p_fake = compute_p_fake(logit, temperature)
    draws = _draw_replicates(logit, label, temperature, p_fake, num_bootstrap, rng)
    measured = _measure(logit, label, temperature, p_fake)
    blocks = {
        name: _measure_decisions(p_fake >= cut, label, cut, num_bootstrap, rng)
        for name, cut in (("at_0.5", 0.5), ("at_threshold", threshold))
    }
    num_fake = int(np.sum(label == FAKE))
    reasons = explain_undefined(len(label) - num_fake, num_fake)
    return {
        "num_images": len(label),
        "num_real": len(label) - num_fake,
        "num_fake": num_fake,
        "temperature": temperature,
        "threshold": threshold,
        "num_bootstrap": num_bootstrap,
        "accuracy": blocks["at_0.5"]["accuracy"],
        **{
            name: make_interval(value, draws.get(name), reasons.get(name))
            for name, value in measured.items()
        },
        **blocks,
        "roc_points": _thin_roc(logit, label) if 0 < num_fake < len(label) else None,
        "reliability_bins": _bin_reliability(p_fake, label),
        "reliability_bins_uncalibrated": _bin_reliability(compute_p_fake(logit, 1.0), label),
        "score_histogram": _count_scores(p_fake, label),
    }


def explain_undefined(num_real: int, num_fake: int) -> dict[str, str]:
    """Return why ranking metrics of so many images are no numbers, by name; {} if all are.

    A TPR at an FPR rests on the REAL images that may be called FAKE, and on the FAKE ones.
    """
    for name, count in zip(LABEL_NAMES, (num_real, num_fake), strict=True):
        if not count:
            return dict.fromkeys(RANKING_METRICS, f"there are no {name} images")
    reasons = {}
    for metric, rate in RATES.items():
        if count_allowed(num_real, rate) < MIN_RESTING_IMAGES:
            least = round(MIN_RESTING_IMAGES / rate)
            reasons[metric] = f"needs {least:,} REAL images, there are {num_real:,}"
        elif num_fake < MIN_RESTING_IMAGES:
            reasons[metric] = f"needs {MIN_RESTING_IMAGES} FAKE images, there are {num_fake:,}"
    return reasons


def _log_loss(logit: Floats, label: Ints, temperature: float) -> npt.NDArray[np.float64]:
    """Compute the NLL per image from the logit: log(p_fake) of a saturated score is infinite."""
    z = logit.astype(np.float64) / temperature
    return np.logaddexp(0.0, np.where(label == FAKE, -z, z))


def _measure(
    logit: Floats, label: Ints, temperature: float, p_fake: Floats
) -> dict[str, float | None]:
    """Compute the metrics that get a bootstrap interval, as `_Cells.measure` names them."""
    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

    exact = p_fake.astype(np.float64)
    ranking: dict[str, float | None] = dict.fromkeys(RANKING_METRICS)
    if 0 < np.sum(label == FAKE) < len(label):
        fpr, tpr, _ = roc_curve(label, logit, drop_intermediate=False)
        ranking = {
            "auroc": float(roc_auc_score(label, logit)),
            "average_precision": float(average_precision_score(label, logit)),
            "eer": float(np.interp(0.0, fpr + tpr - 1, fpr)),  # FPR = FNR where FPR + TPR = 1
        }
        ranking |= {name: _read_tpr(fpr, tpr, rate) for name, rate in RATES.items()}
    return ranking | {
        "brier": float(np.mean((exact - label) ** 2)),
        "ece": _measure_ece(exact, label),
        "ece_uncalibrated": _measure_ece(compute_p_fake(logit, 1.0).astype(np.float64), label),
        "nll": float(np.mean(_log_loss(logit, label, temperature))),
    }


def find_tpr(logit: Floats, label: Ints, rate: float) -> float:
    """Return the highest TPR with an FPR of at most `rate`; needs both classes."""
    from sklearn.metrics import roc_curve

    fpr, tpr, _ = roc_curve(label, logit, drop_intermediate=False)
    return _read_tpr(fpr, tpr, rate)


def _read_tpr(fpr: Floats, tpr: Floats, rate: float) -> float:
    return float(tpr[np.searchsorted(fpr, rate, side="right") - 1])


def _measure_ece(p_fake: npt.NDArray[np.float64], label: Ints) -> float:
    gap = np.bincount(_bin_index(p_fake), weights=p_fake - label)
    return float(np.abs(gap).sum() / len(label))


def find_cells(logit: Floats) -> npt.NDArray[np.int64]:
    """Return the cell of each image, at most MAX_BOOTSTRAP_CELLS by rank, 0 the highest logits."""
    num_above = len(logit) - np.searchsorted(np.sort(logit), logit, side="right")
    cells: npt.NDArray[np.int64] = num_above * MAX_BOOTSTRAP_CELLS // len(logit)
    return cells


class _Cells:
    """Images in at most MAX_BOOTSTRAP_CELLS cells of neighbouring rank, highest logits first.

    A replicate then is two rows of counts, and costs the same for a thousand images and for a
    million, without sorting again. Tied logits share a cell; up to 4096 images every distinct logit
    has its own and the numbers are scikit-learn's (tests/core/evaluation/test_metrics.py).
    """

    def __init__(self, logit: Floats, label: Ints, temperature: float, p_fake: Floats) -> None:
        cells, cell = np.unique(find_cells(logit), return_inverse=True)
        p_fake = p_fake.astype(np.float64)
        slot = (label, cell)
        self.counts = np.zeros((2, len(cells)), np.int64)  # row REAL, row FAKE
        np.add.at(self.counts, slot, 1)

        def average(values: Floats) -> npt.NDArray[np.float64]:
            sums = np.zeros(self.counts.shape)
            np.add.at(sums, slot, values)
            return sums / np.maximum(self.counts, 1)

        self.brier = average((p_fake - label) ** 2)
        self.nll = average(_log_loss(logit, label, temperature))
        self.gaps = {}  # of each ECE: the bin of a cell, and mean p_fake - label in its slots
        raw = compute_p_fake(logit, 1.0).astype(np.float64)
        for name, scores in (("ece", p_fake), ("ece_uncalibrated", raw)):
            index = _bin_index(np.bincount(cell, weights=scores) / self.counts.sum(0))
            self.gaps[name] = (index, average(scores - label))

    def measure(self, counts: Ints) -> dict[str, float]:
        """Compute the metrics for `counts`, int[2, cells], with the same class totals."""
        num_real, num_fake = (int(total) for total in counts.sum(1))
        num = num_real + num_fake
        values = {
            "brier": float(np.vdot(counts, self.brier)) / num,
            "nll": float(np.vdot(counts, self.nll)) / num,
        }
        for name, (index, gap) in self.gaps.items():
            in_bin = np.bincount(index, weights=(counts * gap).sum(0))
            values[name] = float(np.abs(in_bin).sum()) / num
        if not num_real or not num_fake:
            return values
        fp, tp = counts.cumsum(1)
        values["auroc"] = float(counts[REAL] @ (tp - counts[FAKE] / 2)) / (num_real * num_fake)
        precision = tp / np.maximum(tp + fp, 1)
        values["average_precision"] = float(counts[FAKE] @ precision) / num_fake
        fpr = fp / num_real
        start = np.zeros(1)  # the curve begins at (0, 0), where nothing is called FAKE
        fpr, tpr = np.append(start, fpr), np.append(start, tp / num_fake)
        values["eer"] = float(np.interp(0.0, fpr + tpr - 1, fpr))
        for name, rate in RATES.items():
            reached = int(np.searchsorted(fp, count_allowed(num_real, rate), side="right"))
            values[name] = float(tp[reached - 1]) / num_fake if reached else 0.0
        return values


def _draw_replicates(
    logit: Floats,
    label: Ints,
    temperature: float,
    p_fake: Floats,
    num_bootstrap: int,
    rng: np.random.Generator,
) -> dict[str, npt.NDArray[np.float64]]:
    """Return each metric in each replicate, float64[num_bootstrap]; empty without replicates."""
    if not num_bootstrap:
        return {}
    cells = _Cells(logit, label, temperature, p_fake)
    totals = cells.counts.sum(1)
    share = cells.counts / np.maximum(totals, 1)[:, None]
    share[totals == 0, 0] = 1.0  # a missing class draws zero images
    drawn = [cells.measure(rng.multinomial(totals, share)) for _ in range(num_bootstrap)]
    return {name: np.array([values[name] for values in drawn]) for name in drawn[0]}


def make_interval(
    value: float | None, draws: Floats | None, reason: str | None = None
) -> dict[str, Any]:
    """Return a value with the percentiles of its replicates; with a reason it has neither."""
    if reason is not None:
        return {"value": None, "low": None, "high": None, "reason": reason}
    if value is None or draws is None:
        return {"value": value, "low": None, "high": None}
    low, high = np.percentile(draws, (2.5, 97.5))
    return {"value": value, "low": min(float(low), value), "high": max(float(high), value)}


def wilson_interval(num_right: int, num_all: int) -> dict[str, float | None]:
    """Return Wilson's 95% score interval of a proportion (Wilson 1927)."""
    value = num_right / num_all
    centre = (value + Z_95**2 / (2 * num_all)) / (1 + Z_95**2 / num_all)
    variance = value * (1 - value) / num_all + Z_95**2 / (4 * num_all**2)
    spread = Z_95 * float(np.sqrt(variance)) / (1 + Z_95**2 / num_all)
    # At 0% and 100% one end is the value itself, but for rounding.
    return {"value": value, "low": min(centre - spread, value), "high": max(centre + spread, value)}


def _measure_decisions(
    is_fake: npt.NDArray[np.bool_],
    label: Ints,
    threshold: float,
    num_bootstrap: int,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """Compute metrics at a threshold. `confusion[i][j]`: labelled i, called j; REAL then FAKE."""
    counts = np.bincount(2 * label + is_fake, minlength=4).reshape(2, 2)
    per_class: dict[str, dict[str, float | None]] = {}
    for value, name in enumerate(LABEL_NAMES):
        hit, called, actual = counts[value, value], counts[:, value].sum(), counts[value].sum()
        per_class[name] = {
            "precision": float(hit / called) if called else None,
            "recall": float(hit / actual) if actual else None,
            "f1": float(2 * hit / (called + actual)) if called + actual else None,
            "num_images": int(actual),
        }
    balanced, draws = None, None
    if counts.sum(1).all():
        recall = counts.diagonal() / counts.sum(1)
        balanced = float(recall.mean())
        if num_bootstrap:  # resampling a class draws its hits from a binomial: no loop needed
            hits = rng.binomial(counts.sum(1), recall, size=(num_bootstrap, 2))
            draws = (hits / counts.sum(1)).mean(1)
    return {
        "threshold": threshold,
        "accuracy": wilson_interval(int(counts.trace()), len(label)),
        "balanced_accuracy": make_interval(balanced, draws),
        "per_class": per_class,
        "confusion": counts.tolist(),
    }


def _thin_roc(logit: Floats, label: Ints) -> dict[str, list[float]]:
    """Return at most MAX_ROC_POINTS points by fpr; half are spaced evenly over log FPR."""
    from sklearn.metrics import roc_curve

    fpr, tpr, _ = roc_curve(label, logit)
    if len(fpr) > MAX_ROC_POINTS:
        half = MAX_ROC_POINTS // 2 - 1
        lowest = 1 / np.sum(label == REAL)
        grid = np.concatenate([np.geomspace(lowest, 1, half), np.linspace(0, 1, half)])
        kept = np.searchsorted(fpr, grid, side="right") - 1
        keep = np.unique(np.append(kept, [0, len(fpr) - 1]))
        fpr, tpr = fpr[keep], tpr[keep]
    return {"fpr": fpr.tolist(), "tpr": tpr.tolist()}


def _bin_index(p_fake: Floats) -> npt.NDArray[np.intp]:
    return np.searchsorted(RELIABILITY_EDGES[1:-1], p_fake, side="left")


def _bin_reliability(p_fake: Floats, label: Ints) -> list[dict[str, Any]]:
    """Return per bin: low, high, count, mean p_fake and share of FAKE (None if empty)."""
    index = _bin_index(p_fake.astype(np.float64))
    bins = []
    for i, (low, high) in enumerate(pairwise(RELIABILITY_EDGES.tolist())):
        inside = index == i
        count = int(inside.sum())
        p_mean = float(p_fake[inside].mean(dtype=np.float64)) if count else None
        share = float(label[inside].mean()) if count else None
        bins.append(
            {"low": low, "high": high, "count": count, "p_fake": p_mean, "fake_fraction": share}
        )
    return bins


def _count_scores(p_fake: Floats, label: Ints) -> dict[str, list[float]]:
    """Count images per class in 50 bins of p_fake: {"edges": [51], "REAL": [50], "FAKE": [50]}."""
    edges = np.linspace(0, 1, NUM_HISTOGRAM_BINS + 1)
    counts = {
        name: np.histogram(p_fake[label == value], edges)[0].tolist()
        for value, name in enumerate(LABEL_NAMES)
    }
    return {"edges": edges.tolist(), **counts}
