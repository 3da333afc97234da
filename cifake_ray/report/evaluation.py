"""Put the numbers of an evaluation in the order in which its page tells them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cifake_ray.core.evaluation.metrics import wilson_interval
from cifake_ray.core.schema import FAKE, REAL
from cifake_ray.report.numbers import format_interval, format_share
from cifake_ray.report.text import KEY_METRICS, describe_result

HEADLINES = {
    "auroc": "AUROC",
    "tpr_at_fpr_1pct": "FAKE found at 1% FPR",
    "accuracy": "Accuracy at 0.5",
}
BEST_IS = {"eer": 0, "ece": 0, "brier": 0, "nll": 0}  # of the other measures 1
VERDICTS = ((0.98, "Strong"), (0.9, "Good"), (0.8, "Fair"), (0.0, "Weak"))  # from this AUROC on
POINTS = {"fpr_0.01": "1% FPR on validation", "fpr_0.001": "0.1% FPR on validation"}
MAX_SLICES = 50  # rows of a table of the page; slices.csv has all
FEW = 5  # images: a rate that rests on fewer is marked

Metrics = Mapping[str, Any]


def describe_verdict(metrics: Metrics) -> str:
    """Say in a sentence how well the detector tells the two classes apart."""
    auroc, found = metrics["auroc"], metrics["tpr_at_fpr_1pct"]
    if auroc["value"] is None:
        return describe_result(metrics)
    if (auroc["high"] or auroc["value"]) < 0.5:
        verdict = "Worse than chance on these images: are the labels swapped?"
    elif (auroc["low"] or auroc["value"]) <= 0.5:
        verdict = "No better than chance on these images:"
    else:
        word = next(word for least, word in VERDICTS if auroc["value"] >= least)
        verdict = f"{word} on these images:"
    sentence = f"{verdict} AUROC {format_interval(auroc)}"
    if found["value"] is None:
        return f"{sentence}."
    share = format_interval(found, percent=True)
    return f"{sentence}; where 1% of REAL are called FAKE, it finds {share} of FAKE."


def list_headlines(metrics: Metrics) -> list[tuple[str, str, str]]:
    """Return name, value and interval, or why there is none, of the three main numbers."""
    rows = []
    for key, name in HEADLINES.items():
        value, _, interval = format_interval(metrics[key], percent=key != "auroc").partition(" (")
        if metrics[key]["value"] is None:
            rows.append((name, "-", metrics[key].get("reason", "not defined with one class")))
        else:
            rows.append((name, value, f"95%: {interval.rstrip(')')}" if interval else ""))
    return rows


def list_measures(metrics: Metrics) -> list[tuple[str, str, str]]:
    """Return name, value with interval, and best value of the other measures."""
    return [
        (name, format_interval(metrics[key], percent=percent), str(BEST_IS.get(key, 1)))
        for key, name, percent in KEY_METRICS
        if key not in HEADLINES
    ]


def list_operating_points(metrics: Metrics) -> list[dict[str, Any]]:
    """Return a row for each operating point: 0.5, the bundle's own, and those for an FPR."""
    points = {
        "0.5": metrics["at_0.5"],
        "the threshold": metrics["at_threshold"],
        **{POINTS[name]: point for name, point in metrics["operating_points"].items()},
    }
    rows = []
    for name, point in points.items():
        counts = point["confusion"]
        wrong, totals = (counts[REAL][FAKE], counts[FAKE][REAL]), [sum(row) for row in counts]
        hits = (counts[REAL][REAL], counts[FAKE][FAKE])
        called_fake = wrong[REAL] + hits[FAKE]
        recalls = [hit / total for hit, total in zip(hits, totals, strict=True) if total]
        rows.append(
            {
                "name": name,
                "threshold": f"{point['threshold']:.4g}",
                "accuracy": format_interval(wilson_interval(sum(hits), sum(totals)), percent=True),
                "balanced": format_share(sum(recalls) / 2 if len(recalls) == 2 else None),
                "wrong": [
                    _format_count(count, total) for count, total in zip(wrong, totals, strict=True)
                ],
                "precision": format_share(hits[FAKE] / called_fake if called_fake else None),
                "is_few": any(n < FEW for n, total in zip(wrong, totals, strict=True) if total),
            }
        )
    return rows


def _format_count(count: int, total: int) -> str:
    return f"{count:,} ({count / total:.1%})" if total else "-"


def split_slices(slices: Mapping[str, Sequence[Metrics]]) -> list[tuple[str, list[Metrics], int]]:
    """Return heading, rows and how many rows more there are: each class of a column on its own."""
    tables = []
    for column, found in slices.items():
        for label in ("FAKE", "REAL", "both"):
            rows = [row for row in found if row["label"] == label]
            if rows:
                heading = f"{label.replace('both', 'REAL and FAKE')} by {column}"
                tables.append((heading, rows[:MAX_SLICES], max(len(rows) - MAX_SLICES, 0)))
    return tables
