"""Rank one group of images against another: a generator against all REAL, a source against another.

The numbers are those of `metrics.compute_metrics`. All groups of a table share cells and resamples,
so that a hundred slices cost little more than one.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from cifake_ray.core.evaluation.calibration import Floats, Ints, count_allowed
from cifake_ray.core.evaluation.metrics import (
    MIN_RESTING_IMAGES,
    RATES,
    explain_undefined,
    find_cells,
    make_interval,
)

Draws = npt.NDArray[np.int64]


class Group:
    """Some images of a table, and resamples of them."""

    def __init__(self, ranks: Ints, cells: Ints, num_bootstrap: int, seed: int) -> None:
        """Take the rank (0 for the highest logit, ties alike) and the cell of each image."""
        self.size, self.num_bootstrap, self.seed = len(ranks), num_bootstrap, seed
        self.exact = _Counts(*_count(ranks))
        self._cells = cells

    @cached_property
    def drawn(self) -> _Counts:
        """Return the counts in `num_bootstrap` resamples, by cell."""
        cells, counts = _count(self._cells)
        rng = np.random.default_rng(self.seed)
        return _Counts(cells, rng.multinomial(self.size, counts[0] / self.size, self.num_bootstrap))


class _Counts:
    """How many images are at each place: places[C] ascending, counts[B, C]."""

    def __init__(self, places: Ints, counts: Draws) -> None:
        self.places, self.counts = places, counts

    @cached_property
    def _totals(self) -> Draws:
        return np.pad(self.counts.cumsum(1), ((0, 0), (1, 0)))

    def count_from(self, places: Ints) -> Draws:
        """Count the images at each of some places or higher ones, int[B, len(places)]."""
        return self._totals[:, np.searchsorted(self.places, places, side="right")]

    def count_above(self, places: Ints) -> Draws:
        return self._totals[:, np.searchsorted(self.places, places, side="left")]


def _count(places: Ints) -> tuple[Ints, Draws]:
    found, counts = np.unique(places, return_counts=True)
    return found, counts[None, :]


class Ranking:
    """The logits of a table, for comparing groups of its rows."""

    def __init__(self, logit: Floats, num_bootstrap: int, seed: int = 0) -> None:
        logit = logit.astype(np.float64)
        self.num_bootstrap, self.seed = num_bootstrap, seed
        self.ranks = len(logit) - np.searchsorted(np.sort(logit), logit, side="right")
        self.cells = find_cells(logit)

    def group(self, rows: Ints) -> Group:
        """Return the rows with these numbers as a group."""
        # Groups of the same size must not draw alike: their errors would cancel.
        self.seed += 1
        return Group(self.ranks[rows], self.cells[rows], self.num_bootstrap, self.seed)

    def compare(self, fake: Group, real: Group, *, has_interval: bool = True) -> dict[str, Any]:
        """Return AUROC, average precision and TPR at each FPR of two groups, with intervals.

        Groups below MIN_RESTING_IMAGES have no interval: resampling three images says nothing.
        """
        reasons = explain_undefined(real.size, fake.size)
        values = {name: float(v[0]) for name, v in _rank(fake, real, is_drawn=False).items()}
        draws: dict[str, Floats] = {}
        is_large = min(fake.size, real.size) >= MIN_RESTING_IMAGES
        if has_interval and is_large and self.num_bootstrap:
            draws = _rank(fake, real, is_drawn=True)
        names = ("auroc", "average_precision", *RATES)
        return {
            name: make_interval(values.get(name), draws.get(name), reasons.get(name))
            for name in names
        }


def _rank(fake: Group, real: Group, *, is_drawn: bool) -> dict[str, Floats]:
    """Compute the metrics of each resample, float64[B]; {} if a group is empty."""
    if not fake.size or not real.size:
        return {}
    ours, others = (fake.drawn, real.drawn) if is_drawn else (fake.exact, real.exact)
    tp = ours.counts.cumsum(1)
    above, fp = others.count_above(ours.places), others.count_from(ours.places)
    lower = real.size - (above + fp) / 2  # half of those with the same rank
    values = {
        "auroc": (ours.counts * lower).sum(1) / (fake.size * real.size),
        "average_precision": (ours.counts * (tp / np.maximum(tp + fp, 1))).sum(1) / fake.size,
    }
    for name, rate in RATES.items():
        found = fp <= count_allowed(real.size, rate)
        values[name] = (ours.counts * found).sum(1) / fake.size
    return values
