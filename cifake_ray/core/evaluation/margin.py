"""Find how far scores are from a decision; without scipy, so that `export` starts at once."""

from __future__ import annotations

import numpy as np


def find_margin(p_fake: np.ndarray, threshold: np.ndarray | float) -> np.ndarray:
    """Return float64[N], the distance of p_fake to the threshold in log-odds, 0 or more.

    Both are in [0, 1]; NaN where one is NaN.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        score, limit = (
            np.log(p) - np.log1p(-p)
            for p in (p_fake.astype(np.float64), np.asarray(threshold, np.float64))
        )
        margin: np.ndarray = np.abs(score - limit)
    return margin
