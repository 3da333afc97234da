"""Score each image as it is and under every cell of a grid: the processor of `evaluate --grid`."""

from __future__ import annotations

from functools import partial

import numpy as np
import pyarrow as pa
import torch

from cifake_ray.config.grid import Grid, name_column
from cifake_ray.core.processing.decode_cells import DecodedCells, decode_cells
from cifake_ray.core.processing.processor import Prepare
from cifake_ray.core.processing.score import ScoreProcessor, predict_logit
from cifake_ray.core.schema import SCORE_FIELDS
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
        for start in range(0, len(prepared.image), self.scorer.batch_size):
            some = slice(start, start + self.scorer.batch_size)
            # What another process decoded is read-only memory; torch wants it writable.
            pixels = torch.from_numpy(np.require(prepared.pixels[some], requirements="W"))
            found = predict_logit(self.scorer.detector, pixels, self.scorer.device)
            logit[prepared.cell[some], prepared.image[some]] = found
        scored = table.column("error").is_null().to_numpy()
        for number, name in enumerate(names):
            missing = ~(scored & np.isfinite(logit[number]))
            values = pa.array(logit[number], pa.float32(), mask=missing)
            table = table.add_column(len(SCORE_FIELDS) + number, name, values)
        return table

    def count_unlike(self, rows: pa.Table) -> dict[str, int]:
        return self.scorer.count_unlike(rows)
