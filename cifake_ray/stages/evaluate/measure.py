"""Measure stored predictions: all of them, slice by slice, and one REAL source against another."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa

from cifake_ray.core.evaluation.buckets import MISSING, name_buckets
from cifake_ray.core.evaluation.calibration import Calibration
from cifake_ray.core.evaluation.metrics import compute_metrics, wilson_interval
from cifake_ray.core.evaluation.ranking import Ranking
from cifake_ray.core.schema import FAKE, LABEL_NAMES, REAL

MIN_SLICE_IMAGES = 30  # with fewer, a slice is marked: its intervals are wide
MAX_REAL_SOURCES = 30  # compared with each other, the largest: 435 pairs
MAX_PAIR_INTERVALS = 20


def measure(scored: pa.Table, calibration: Calibration, num_bootstrap: int) -> dict[str, Any]:
    """Return the metrics of some predictions."""
    return compute_metrics(
        scored.column("logit").to_numpy(),
        scored.column("label").to_numpy(),
        temperature=calibration.temperature,
        threshold=calibration.threshold,
        p_fake=scored.column("p_fake").to_numpy(),
        num_bootstrap=num_bootstrap,
    )


def measure_slices(
    scored: pa.Table, columns: Sequence[str], threshold: float, num_bootstrap: int
) -> dict[str, list[dict[str, Any]]]:
    """Return the slices of `source`, if there are two, and of each column, by column.

    A list of slices is complete: those of MIN_SLICE_IMAGES or more, lowest AUROC first, then the
    small ones. A slice is

        value                    the text of its value or bucket; MISSING for null
        label                    REAL, FAKE or both: the classes in it
        num_images, num_real, num_fake     in it
        is_small                 fewer than MIN_SLICE_IMAGES
        accuracy, accuracy_at_threshold    of its own images, at 0.5 and at the threshold
        ranked_real, ranked_fake           images that the following compare: a slice of one class
                                 with all images of the other, one of both classes within itself
        auroc, average_precision, tpr_at_fpr_1pct, tpr_at_fpr_0.1pct

    with {"value", "low", "high"} of each metric, and "reason" where the value is None.
    """
    label = scored.column("label").to_numpy()
    p_fake = scored.column("p_fake").to_numpy()
    ranking = Ranking(scored.column("logit").to_numpy(), num_bootstrap)
    everything = [ranking.group(np.flatnonzero(label == value)) for value in (REAL, FAKE)]
    slices: dict[str, list[dict[str, Any]]] = {}
    for name in dict.fromkeys(("source", *columns)):
        codes, values = name_buckets(scored, name)
        if name == "source" and len(values) < 2:
            continue
        found = []
        for value, rows in zip(values, _split_rows(codes, len(values)), strict=True):
            own, is_fake = label[rows], p_fake[rows]
            groups, counts = list(everything), [int(np.sum(own == kind)) for kind in (REAL, FAKE)]
            kinds = [kind for kind in (REAL, FAKE) if counts[kind]]
            for kind in kinds:
                groups[kind] = ranking.group(rows[own == kind])
            found.append(
                {
                    "value": value,
                    "label": LABEL_NAMES[kinds[0]] if len(kinds) == 1 else "both",
                    "num_images": len(rows),
                    "num_real": counts[REAL],
                    "num_fake": counts[FAKE],
                    "is_small": len(rows) < MIN_SLICE_IMAGES,
                    "accuracy": _measure_accuracy(is_fake >= 0.5, own),
                    "accuracy_at_threshold": _measure_accuracy(is_fake >= threshold, own),
                    "ranked_real": groups[REAL].size,
                    "ranked_fake": groups[FAKE].size,
                    **ranking.compare(groups[FAKE], groups[REAL]),
                }
            )
        slices[name] = sorted(found, key=_order_slice)
    return slices


def _split_rows(codes: np.ndarray, num: int) -> list[np.ndarray]:
    """Return the numbers of the rows of each code."""
    order = np.argsort(codes, kind="stable")
    return np.split(order, np.cumsum(np.bincount(codes, minlength=num))[:-1])


def _measure_accuracy(is_fake: np.ndarray, label: np.ndarray) -> dict[str, Any]:
    return wilson_interval(int(np.sum(is_fake == (label == FAKE))), len(label))


def _order_slice(found: dict[str, Any]) -> tuple[bool, float, float, str]:
    auroc = found["auroc"]["value"]
    worst = (2.0 if auroc is None else auroc, found["accuracy"]["value"])
    return (found["is_small"], *worst, found["value"])


def compare_real_sources(scored: pa.Table, num_bootstrap: int) -> dict[str, Any] | None:
    """Return how well the logit tells REAL sources apart; None with fewer than two to compare.

    `pairs`, worst first, have the AUROC of the source with the higher logits against the other,
    0.5 to 1; the first MAX_PAIR_INTERVALS have intervals. `auroc` is that of REAL against FAKE. A
    detector that tells two cameras apart as well as REAL from FAKE looks at the source.
    """
    label = scored.column("label").to_numpy()
    codes, values = name_buckets(scored, "source")
    ranking = Ranking(scored.column("logit").to_numpy(), num_bootstrap)
    every_row = zip(values, _split_rows(codes, len(values)), strict=True)
    rows = {value: rows[label[rows] == REAL] for value, rows in every_row if value != MISSING}
    rows = {value: found for value, found in rows.items() if len(found)}
    large = [value for value in rows if len(rows[value]) >= MIN_SLICE_IMAGES]
    chosen = sorted(large, key=lambda value: (-len(rows[value]), value))[:MAX_REAL_SOURCES]
    if len(chosen) < 2:
        return None
    groups = {value: ranking.group(rows[value]) for value in chosen}

    def compare(higher: str, lower: str, *, has_interval: bool) -> dict[str, Any]:
        found = ranking.compare(groups[higher], groups[lower], has_interval=has_interval)
        sizes = {"num_higher": groups[higher].size, "num_lower": groups[lower].size}
        return {"higher": higher, "lower": lower, **sizes, "auroc": found["auroc"]}

    pairs = []
    for first, second in combinations(chosen, 2):
        pair = compare(first, second, has_interval=False)
        if pair["auroc"]["value"] < 0.5:
            pair = compare(second, first, has_interval=False)
        pairs.append(pair)
    pairs.sort(key=lambda pair: (-pair["auroc"]["value"], pair["higher"], pair["lower"]))
    shown = pairs[:MAX_PAIR_INTERVALS]
    fake, real = (ranking.group(np.flatnonzero(label == kind)) for kind in (FAKE, REAL))
    return {
        "num_sources": len(chosen),
        "left_out": len(rows) - len(chosen),
        "auroc": ranking.compare(fake, real)["auroc"],
        "pairs": [
            *(compare(pair["higher"], pair["lower"], has_interval=True) for pair in shown),
            *pairs[MAX_PAIR_INTERVALS:],
        ],
    }
