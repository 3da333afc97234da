"""Show how well detectors that were trained without a source find it: CSV rows and a page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cifake_ray.report.html import render_page
from cifake_ray.report.numbers import format_interval
from cifake_ray.report.slices_text import COUNTS, INTERVALS, SUFFIXES

Matrix = Mapping[str, Any]


def list_cells(matrix: Matrix) -> list[dict[str, Any]]:
    """Return a row for each detector and source that it was measured on."""
    return [
        {
            "left_out": row["left_out"],
            "source": name,
            "label": found["label"],
            **{count: found[count] for count in COUNTS},
            **{
                metric + suffix: found[metric].get(part)
                for metric in INTERVALS
                for part, suffix in SUFFIXES.items()
            },
        }
        for row in matrix["rows"]
        for name, found in row["slices"].items()
    ]


def render_matrix(matrix: Matrix, command: str) -> str:
    """Return the page of a matrix: a row for each detector, a column for each source."""
    measured: dict[str, str] = {}
    for row in matrix["rows"]:
        measured |= {name: found["label"] for name, found in row["slices"].items()}
    columns = sorted(measured, key=lambda name: (measured[name] == "REAL", name))
    own = [row["slices"].get(row["left_out"]) for row in matrix["rows"][1:]]
    large = [one for one in own if one and not one["is_small"]]
    values = [one["auroc"]["value"] for one in large if one["auroc"]["value"] is not None]
    sentence = f"{len(own)} generators, each left out of a training."
    if values:
        sentence += f" AUROC on the one left out: {min(values):.3f} to {max(values):.3f}."
    return render_page(
        "matrix.html.j2",
        title="A detector without each generator",
        sentence=sentence,
        matrix=matrix,
        columns=columns,
        labels=measured,
        format_interval=format_interval,
        facts={"Command": command},
    )
