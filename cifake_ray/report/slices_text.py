"""Say what slices show: the worst source, and whether a detector tells REAL sources apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cifake_ray.report.numbers import format_interval

Slices = Mapping[str, Sequence[Mapping[str, Any]]]
INTERVALS = (
    *("accuracy", "accuracy_at_threshold", "auroc", "average_precision"),
    *("tpr_at_fpr_1pct", "tpr_at_fpr_0.1pct"),
)
COUNTS = ("num_images", "num_real", "num_fake", "is_small", "ranked_real", "ranked_fake")
SUFFIXES = {"value": "", "low": "_low", "high": "_high", "reason": "_reason"}
ROW_NAMES = (
    *("column", "value", "label", *COUNTS),
    *(name + suffix for name in INTERVALS for suffix in SUFFIXES.values()),
)


def list_rows(slices: Slices) -> Iterator[dict[str, Any]]:
    """Yield a flat row, of ROW_NAMES, for each slice of `measure_slices`."""
    for column, found in slices.items():
        for one in found:
            row = {"column": column, **{name: one[name] for name in ("value", "label", *COUNTS)}}
            for name in INTERVALS:
                row |= {name + suffix: one[name].get(part) for part, suffix in SUFFIXES.items()}
            yield row


def find_worst_source(slices: Slices) -> Mapping[str, Any] | None:
    """Return the source of the lowest AUROC, a small one only if all are; None without sources."""
    return next(iter(slices.get("source", ())), None)


def describe_worst(source: Mapping[str, Any] | None) -> str:
    """Format the worst source as a sentence; nothing for None, or where no AUROC is defined."""
    if source is None or source["auroc"]["value"] is None:
        return ""
    name, both = source["label"], source["label"] == "both"
    other = "fake" if name == "REAL" else "real"
    against = "" if both else f" against {source[f'ranked_{other}']:,} {other.upper()}"
    images = f"{source['num_images']:,} {'images' if both else name}"
    small = ", few images" if source["is_small"] else ""
    return (
        f"Worst source: {source['value']} ({images}{small}): AUROC"
        f" {format_interval(source['auroc'])}{against}, accuracy"
        f" {format_interval(source['accuracy'], percent=True)} at 0.5."
    )


def describe_floor(floor: Mapping[str, Any] | None) -> str:
    """Say in a sentence how well REAL sources are told apart; nothing for None."""
    if floor is None or not floor["pairs"]:
        return ""
    worst, overall = floor["pairs"][0], floor["auroc"]
    found, names = format_interval(worst["auroc"]), f"{worst['higher']} and {worst['lower']}"
    if overall["value"] is None:
        return f"REAL against REAL: {names} are told apart with AUROC {found}."
    both = format_interval(overall)
    if worst["auroc"]["value"] < overall["value"]:
        return f"REAL against REAL: AUROC at most {found}, of {names}; REAL against FAKE {both}."
    return (
        f"REAL against REAL: {names} are told apart with AUROC {found}, as well as REAL from FAKE"
        f" ({both}): the detector looks at the source."
    )


def describe_matrix(result: Mapping[str, Any]) -> list[str]:
    """Say for each source that was left out what its detector reaches, and one that knew it."""
    sentences = []
    for cell in sorted(result["cells"], key=lambda cell: cell["auroc"] or 0.0):
        known = result["seen"].get(cell["source"])
        before = f", {known['auroc']:.3f} when trained on it" if known and known["auroc"] else ""
        sentences.append(
            f"Without {cell['source']} ({cell['num_images']:,} {cell['label']}): AUROC"
            f" {_format_cell(cell)} on it{before}."
        )
    return [
        *sentences,
        f"{result['elapsed_s']:,.1f} s, {result['detectors']} detectors.",
        f"Report: {result['report']}",
    ]


def _format_cell(cell: Mapping[str, Any]) -> str:
    parts = ("", "_low", "_high")
    value, low, high = (cell[f"auroc{part}"] for part in parts)
    return format_interval({"value": value, "low": low, "high": high})
