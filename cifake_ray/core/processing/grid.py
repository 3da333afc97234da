"""Score each image as it is and under every cell of a grid: the processor of `evaluate --grid`."""

from __future__ import annotations

from functools import partial

import numpy as np
import pyarrow as pa

from cifake_ray.config.grid import Grid, name_column
from cifake_ray.core.processing.decode_cells import DecodedCells, decode_cells
from cifake_ray.core.processing.processor import Prepare
from cifake_ray.core.processing.score import ScoreProcessor
from cifake_ray.errors import UsageError


class GridProcessor:
    """Add a column `logit_CELL` for every cell to the rows of a `ScoreProcessor`."""

    decodes = True

    def __init__(self, scorer: ScoreProcessor, grid: Grid) -> None:
        self.scorer, self.grid = scorer, grid
        # One forward pass takes the cells of all images of a batch.
        self.batch_size = max(1, scorer.batch_size // len(grid))
        self.footer = scorer.footer
        self.prepare: Prepare = partial(decode_cells, scorer.detector.preprocessing, grid)
        self.image_bytes = scorer.image_bytes * (1 + len(grid))

    def finish(self, rows: pa.Table, prepared: DecodedCells) -> pa.Table:
        names = [name_column(cell) for cell in self.grid]
        if taken := set(names) & set(rows.schema.names):
            raise UsageError(
                f"--grid: the shards have columns of their own called {', '.join(sorted(taken))};"
                " give these cells other names"
            )
        table = self.scorer.finish(rows, prepared.clean)
        logit = np.full((len(self.grid), rows.num_rows), np.nan, np.float32)
        found, _ = self.scorer.predict(prepared.pixels, prepared.num_crops)
        logit[prepared.cell, prepared.image] = found
        scored = table.column("error").is_null().to_numpy()
        for number, name in enumerate(names):
            missing = ~(scored & np.isfinite(logit[number]))
            values = pa.array(logit[number], pa.float32(), mask=missing)
            table = table.add_column(len(self.scorer.fields) + number, name, values)
        return table

    def count_unlike(self, rows: pa.Table) -> dict[str, int]:
        return self.scorer.count_unlike(rows)
