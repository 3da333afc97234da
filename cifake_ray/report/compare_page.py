"""Render a comparison: its figure and its page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cifake_ray.report.compare_table import list_notes, list_table, name_row
from cifake_ray.report.figures import COLOURS, INK, MUTED, encode_figure, new_figure, shorten
from cifake_ray.report.html import render_page
from cifake_ray.report.numbers import format_interval

CAPTIONS = {"comparison": "Each detector with its 95% interval; dotted: the baseline."}
AXES = {"auroc": "AUROC", "accuracy": "Accuracy at 0.5"}
ROW_HEIGHT = 0.35  # inches
MAX_COLUMNS = 4  # detectors beside each other


def draw_comparison(result: Mapping[str, Any]) -> bytes:
    """Draw AUROC and accuracy of each row with their intervals."""
    drawn = [[row for row in result["rows"] if row[name]["value"] is not None] for name in AXES]
    heights = [ROW_HEIGHT * max(len(rows), 1) + 0.9 for rows in drawn]
    figure, all_axes = new_figure(height=sum(heights), height_ratios=heights)
    for axes, rows, (name, title) in zip(all_axes, drawn, AXES.items(), strict=True):
        for place, row in enumerate(rows):
            value, low, high = (row[name][part] for part in ("value", "low", "high"))
            errors = None if low is None else [[value - low], [high - value]]
            is_baseline = row["name"] == result["baseline"]
            colour = COLOURS["REAL"] if is_baseline else INK
            axes.errorbar([value], [place], xerr=errors, fmt="o", color=colour, capsize=3)
            if is_baseline:
                axes.axvline(value, color=MUTED, linestyle=":", linewidth=1.2)
        names = [shorten(name_row(row)) for row in rows]
        # parse_math off: a name with $x$ is no formula.
        axes.set_yticks(range(len(rows)), names, fontsize=9, parse_math=False)
        axes.invert_yaxis()
        axes.margins(y=0.2)
        axes.locator_params(axis="x", nbins=5)
        axes.grid(axis="y", visible=False)
        axes.set_title(title if rows else f"{title}: not measured")
    all_axes[1].xaxis.set_major_formatter("{x:.1%}")
    return encode_figure(figure)


def render_comparison(result: Mapping[str, Any], command: str) -> str:
    """Return the page, to be written as UTF-8. `result` is that of the stage."""
    titles, rows = list_table(result)
    num_detectors = len(rows)
    if num_detectors <= MAX_COLUMNS:  # on its side it fits without scrolling
        titles, *rows = (list(column) for column in zip(titles, *rows, strict=True))
    images = f"{result['num_images']:,} images"
    sentence = f"{num_detectors} detectors on {images}."
    ranked = [row for row in result["rows"] if row["auroc"]["value"] is not None]
    if ranked:
        best = max(ranked, key=lambda row: row["auroc"]["value"])
        sentence = (
            f"Of {num_detectors} detectors on {images}, {name_row(best)} has the highest AUROC:"
            f" {format_interval(best['auroc'])}."
        )
    return render_page(
        "compare.html.j2",
        title="Comparison",
        sentence=sentence,
        titles=titles,
        rows=rows,
        figures={"comparison": draw_comparison(result)},
        captions=CAPTIONS,
        notes=list_notes(result),
        facts={"Command": command, **{r["name"]: ", ".join(r["reports"]) for r in result["rows"]}},
    )
