"""Choose how often an epoch has each image: by class and source, in whole copies."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cifake_ray.core.schema import FAKE, REAL

Draw = Callable[[np.ndarray, int], np.ndarray]  # from int64[N] and a count to int64[count]


def draw_by_source(
    images: np.ndarray, count: int, source: np.ndarray, balance: float, rng: np.random.Generator
) -> np.ndarray:
    """Return int64[count] of `images` int64[N], in random order; `source` has that of each image.

    A source of n images is drawn in proportion to n ** (1 - balance), and its images alike: never
    more than one draw off, as systematic sampling does (Madow 1949). Its random start and the
    order of the images give each its exact probability.
    """
    shuffled = rng.permutation(images)
    shuffled = shuffled[np.argsort(source[shuffled], kind="stable")]
    _, inverse, sizes = np.unique(source[shuffled], return_inverse=True, return_counts=True)
    ends = np.cumsum(sizes[inverse] ** -balance)
    ticks = (rng.random() + np.arange(count)) / count * ends[-1:]
    places = np.minimum(np.searchsorted(ends, ticks, side="right"), len(images) - 1)
    drawn: np.ndarray = rng.permutation(shuffled[places])
    return drawn


def draw_both_classes(
    labels: np.ndarray, count: int, draw: Draw, rng: np.random.Generator
) -> np.ndarray:
    """Return int64[count] images in random order, half of them REAL; the odd one is FAKE."""
    real = draw(np.flatnonzero(labels == REAL), count // 2)
    fake = draw(np.flatnonzero(labels == FAKE), count - count // 2)
    drawn: np.ndarray = rng.permutation(np.concatenate([real, fake]))
    return drawn
