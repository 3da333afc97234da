"""Show how a detector fares under the cells of a grid: a sentence, rows of a table, figures."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from cifake_ray.config.grid import STEPS, describe_cell
from cifake_ray.report.figures import COLOURS, INK, encode_figure, new_figure
from cifake_ray.report.numbers import format_interval, format_share

Grid = Mapping[str, Any]  # `grid` of metrics.json

# Columns of the heat map: all are 100% for a detector without fault. Field, title, taken from 1.
MEASURES = (
    ("accuracy", "Accuracy", False),
    ("tpr", "FAKE found", False),
    ("fpr", "REAL kept", True),
    ("auroc", "AUROC", False),
    ("flips", "Verdict kept", True),
)
# Steps that differ in strength, and what the axis of their curve says.
AXES = {
    "jpeg": "JPEG quality",
    "webp": "WebP quality",
    "blur": "Blur: deviation, pixels",
    "noise": "Noise: deviation, grey levels of 255",
    "rescale": "Rescaled to this share of the side, and back",
    "resize": "Multiple of the side",
    "max_side": "Longest side, pixels",
    "crop": "Share of the side that is kept",
    "brightness": "Brightness: factor",
    "contrast": "Contrast: factor",
    "saturation": "Saturation: factor",
    "logo": "Logo: share of the shorter side",
}
# Captions and alt texts, by the names of draw_grid_figures.
GRID_CAPTIONS = {
    "grid": (
        "Under each perturbation, worst first: the darker, the more is lost. All columns are 100%"
        " for a detector without fault."
    ),
    **{
        f"grid_{step}": f"{axis}: with 95% intervals, at the threshold set on clean images."
        for step, axis in AXES.items()
    },
}
PALEST_LOSS = 0.5  # and worse has the darkest colour


def describe_grid(grid: Grid | None) -> list[str]:
    """Return a sentence on the worst cell and the mean; none without a grid."""
    if grid is None or grid["worst_cell"] is None:
        return []
    return [
        f"Under {grid['num_cells']} perturbations at p_fake >= {grid['threshold']:.3g}: worst"
        f" {grid['worst_cell']}, accuracy {format_interval(grid['worst_accuracy'], percent=True)};"
        f" mean {format_share(grid['mean_accuracy'])}; clean"
        f" {format_interval(grid['clean_accuracy'], percent=True)}."
    ]


def list_grid_rows(grid: Grid) -> list[tuple[str, list[str]]]:
    """Return rows of a cell, with its steps if its name is another, and numbers; the worst first.

    The first row is `clean`.
    """
    rows = []
    for title, cell in _sort_cells(grid):
        drift = cell["fpr_drift"]
        shares = [
            format_interval(cell[field], percent=True) for field in ("accuracy", "tpr", "fpr")
        ]
        numbers = [
            *shares,
            "-" if drift is None else f"{100 * drift:+.1f}",
            format_interval(cell["flips"], percent=True),
            format_interval(cell["auroc"]),
        ]
        steps = describe_cell(cell["steps"])
        is_named_so = re.sub(r"\W", "_", steps) == title
        rows.append((f"{title}: {steps}" if steps and not is_named_so else title, numbers))
    return rows


def _sort_cells(grid: Grid) -> list[tuple[str, Any]]:
    def order(item: tuple[str, Any]) -> tuple[bool, float]:
        value = item[1]["accuracy"]["value"]
        return item[0] != "clean", 2.0 if value is None else value

    return sorted(grid["cells"].items(), key=order)


def draw_grid_figures(grid: Grid) -> dict[str, bytes]:
    """Draw the heat map, and a curve for each step that has two strengths: file stem -> SVG."""
    curves = {
        f"grid_{step}": _draw_curve(AXES[step], points)
        for step, points in _find_families(grid).items()
    }
    return {"grid": draw_heat_map(grid), **curves}


def draw_heat_map(grid: Grid) -> bytes:
    """Draw the cells as rows and MEASURES as columns, paler where less is lost."""
    from matplotlib.patches import Rectangle

    cells = _sort_cells(grid)
    figure, (axes,) = new_figure(height=0.6 + 0.24 * len(cells))
    for row, (_, cell) in enumerate(cells):
        for column, (field, _, is_loss) in enumerate(MEASURES):
            value = cell[field]["value"]
            if value is None:
                axes.text(column, row, "-", ha="center", va="center", fontsize=9, color=INK)
                continue
            share = 1 - value if is_loss else value
            alpha = 0.85 * min((1 - share) / PALEST_LOSS, 1.0)
            box = Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=COLOURS["FAKE"], alpha=alpha)
            axes.add_patch(box)
            text = f"{100 * share:.1f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=9, color=INK)
    axes.set_xlim(-0.5, len(MEASURES) - 0.5)
    axes.set_ylim(len(cells) - 0.5, -0.5)
    axes.set_xticks(range(len(MEASURES)), [title for _, title, _ in MEASURES], fontsize=9)
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(cells)), [name for name, _ in cells], fontsize=9)
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    return encode_figure(figure)


def _find_families(grid: Grid) -> dict[str, list[tuple[str, Any]]]:
    """Return the points of each step's curve, by strength, with clean among them.

    Only cells of a single step count, and of steps that have at least two.
    """
    found: dict[str, dict[float, tuple[str, Any]]] = {}
    for cell in grid["cells"].values():
        if len(cell["steps"]) == 1 and cell["num_images"]:
            ((step, value),) = cell["steps"].items()
            if step in AXES:
                found.setdefault(step, {})[value] = (f"{value:g}", cell)
    return {
        step: [
            point
            for _, point in sorted(
                {STEPS[step].neutral: ("clean", grid["cells"]["clean"]), **points}.items()
            )
        ]
        for step, points in found.items()
        if len(points) > 1
    }


def _draw_curve(title: str, points: list[tuple[str, Any]]) -> bytes:
    figure, (axes,) = new_figure(height=2.6)
    places = range(len(points))
    for field, name, is_loss in MEASURES[:3]:
        shares = [cell[field] for _, cell in points]
        if any(share["value"] is None for share in shares):  # one class alone
            continue
        values, low, high = ([share[end] for share in shares] for end in ("value", "low", "high"))
        if is_loss:
            values, low, high = ([1 - v for v in ends] for ends in (values, high, low))
        colour = {"tpr": COLOURS["FAKE"], "fpr": COLOURS["REAL"]}.get(field, INK)
        style = {"tpr": "s--", "fpr": "^:"}.get(field, "o-")
        errors = [
            [value - end for value, end in zip(values, low, strict=True)],
            [end - value for value, end in zip(values, high, strict=True)],
        ]
        axes.errorbar(
            places,
            values,
            yerr=errors,
            fmt=style,
            color=colour,
            markersize=4,
            capsize=2,
            label=name,
        )
    axes.set_xticks(places, [name for name, _ in points])
    axes.set_xlabel(title)
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.legend(loc="best", fontsize=9)
    return encode_figure(figure)
