"""Measure a detector under the cells of a grid, against the same images as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from cifake_ray.config.grid import Grid
from cifake_ray.core.evaluation.calibration import Floats, Ints, compute_p_fake
from cifake_ray.core.evaluation.metrics import Z_95, wilson_interval
from cifake_ray.core.schema import FAKE, REAL

Interval = dict[str, float | None]


def measure_grid(
    grid: Grid,
    clean: Floats,
    logits: Mapping[str, Floats],
    label: Ints,
    *,
    temperature: float,
    threshold: float,
) -> dict[str, Any]:
    """Compute what a page shows of a grid, as JSON types; None if undefined (FPR without REAL).

    `clean` and each of `logits`, float[N]: a NaN is an image that its cell was impossible for. All
    verdicts are `p_fake >= threshold`, which was fitted on clean images.

    - accuracy, tpr, fpr, flips: shares with Wilson's 95% intervals; flips is the share of images
      whose verdict is not that of the clean image
    - auroc: with DeLong's 95% interval
    - fpr_drift: FPR less that of the same images when clean
    - worst_cell, worst_accuracy, mean_accuracy: over the cells, without `clean`
    """
    is_fake_clean = compute_p_fake(clean, temperature) >= threshold
    cells: dict[str, dict[str, Any]] = {}
    for name, logit in {"clean": clean, **logits}.items():
        known = np.isfinite(logit)
        is_fake = compute_p_fake(logit[known], temperature) >= threshold
        before, real = is_fake_clean[known], label[known] == REAL
        fpr, fpr_before = (_share(called[real])["value"] for called in (is_fake, before))
        cells[name] = {
            "steps": grid.get(name, {}),
            "num_images": int(known.sum()),
            "accuracy": _share(is_fake == ~real),
            "auroc": measure_auroc(logit[known], label[known]),
            "tpr": _share(is_fake[~real]),
            "fpr": _share(is_fake[real]),
            "fpr_drift": None if fpr is None or fpr_before is None else fpr - fpr_before,
            "flips": _share(is_fake != before),
        }
    accuracies = {
        name: cell["accuracy"]
        for name, cell in cells.items()
        if name != "clean" and cell["num_images"]
    }
    worst = min(accuracies, key=lambda name: accuracies[name]["value"], default=None)
    return {
        "threshold": threshold,
        "num_cells": len(logits),
        "clean_accuracy": cells["clean"]["accuracy"],
        "worst_cell": worst,
        "worst_accuracy": accuracies[worst] if worst else None,
        "mean_accuracy": float(np.mean([a["value"] for a in accuracies.values()]))
        if accuracies
        else None,
        "cells": cells,
    }


def _share(hits: np.ndarray) -> Interval:
    if not len(hits):
        return {"value": None, "low": None, "high": None}
    return wilson_interval(int(hits.sum()), len(hits))


def measure_auroc(logit: Floats, label: Ints) -> Interval:
    """Return the AUROC with its 95% interval (DeLong 1988, by ranks as Sun and Xu 2014)."""
    from scipy.stats import rankdata

    fake, real = logit[label == FAKE], logit[label == REAL]
    if not len(fake) or not len(real):
        return {"value": None, "low": None, "high": None}
    ranks = rankdata(np.concatenate([fake, real]))
    # Of each FAKE the share of REAL below it, of each REAL the share of FAKE above it.
    below = (ranks[: len(fake)] - rankdata(fake)) / len(real)
    above = 1 - (ranks[len(fake) :] - rankdata(real)) / len(fake)
    variance = sum(v.var(ddof=1) / len(v) for v in (below, above) if len(v) > 1)
    value, spread = float(below.mean()), float(Z_95 * np.sqrt(variance))
    return {"value": value, "low": max(value - spread, 0.0), "high": min(value + spread, 1.0)}
