"""Add a grid to an evaluation: its cells are scored in the same workers, and measured."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from cifake_ray.config.grid import Grid, name_column, parse_grid
from cifake_ray.core.evaluation.calibration import Calibration
from cifake_ray.core.evaluation.grid import measure_grid
from cifake_ray.core.processing.processor import Processor
from cifake_ray.stages.resources import Placement
from cifake_ray.stages.score import MakeScoreProcessor
from cifake_ray.storage.io.records import parse_record
from cifake_ray.storage.runs.run import Run


@dataclass(frozen=True)
class MakeGridProcessor:
    """Makes a processor that scores each image under every cell, inside the worker."""

    make_scorer: MakeScoreProcessor
    grid: Grid = field(hash=False)

    def __call__(self, placement: Placement) -> Processor:
        from cifake_ray.core.processing.grid import GridProcessor  # it imports torch

        return GridProcessor(self.make_scorer(placement), self.grid)


def measure_cells(run: Run, scored: pa.Table, calibration: Calibration) -> dict[str, Any] | None:
    """Return what `grid` of metrics.json holds, None for a run without a grid."""
    if not (text := run.settings.get("grid")):
        return None
    grid = parse_grid(json.loads(text))
    columns = {cell: scored.column(name_column(cell)).to_numpy() for cell in grid}
    return measure_grid(
        grid,
        scored.column("logit").to_numpy(),
        columns,
        scored.column("label").to_numpy(),
        temperature=calibration.temperature,
        threshold=calibration.threshold,
    )


@dataclass(frozen=True)
class _Share:
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class GridSummary:
    """What a summary says of `grid` of metrics.json: all but its cells."""

    threshold: float
    num_cells: int
    clean_accuracy: _Share
    worst_cell: str | None
    worst_accuracy: _Share | None
    mean_accuracy: float | None


def summarise_grid(grid: object) -> dict[str, Any]:
    """Return what a summary adds for `grid` of metrics.json, which `read_metrics` has checked."""
    return {} if grid is None else {"grid": asdict(parse_record(GridSummary, grid))}
