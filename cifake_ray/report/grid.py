"""Show how a detector fares under the cells of a grid: a sentence, figures, rows of a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cifake_ray.report.numbers import format_interval, format_share


def describe_grid(grid: Mapping[str, Any] | None) -> list[str]:
    """Return a sentence on the worst cell and the mean; none without a grid."""
    if grid is None or grid["worst_cell"] is None:
        return []
    return [
        f"Under {grid['num_cells']} perturbations at p_fake >= {grid['threshold']:.3g}: worst"
        f" {grid['worst_cell']}, accuracy {format_interval(grid['worst_accuracy'], percent=True)};"
        f" mean {format_share(grid['mean_accuracy'])}; clean"
        f" {format_interval(grid['clean_accuracy'], percent=True)}."
    ]
