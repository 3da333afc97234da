"""Order the images of an epoch so that an image and its twin stand beside each other.

A couple is an image and one of its twins, or two other images. Batches and ranks take whole
couples, so nothing tears a pair apart, and the order follows from the generator alone.
"""

from __future__ import annotations

import numpy as np

from cifake_ray.core.schema import FAKE, REAL
from cifake_ray.core.training.sampling import Draw


def count_coupled(twin_of: np.ndarray) -> int:
    """Return the images of an epoch; `twin_of` int64[N] is each twin's image, else -1."""
    num_images = int((twin_of < 0).sum())
    num_pairs = len(np.unique(twin_of[twin_of >= 0]))
    return 2 * (num_pairs + (num_images - num_pairs) // 2)


def draw_couples(order: np.ndarray, twin_of: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return int64[count_coupled(twin_of)] images, couple by couple.

    `order` int64[N] is a permutation of images and twins. An image with several twins gets the one
    that comes first in it; of an odd number of images without any, the last one is left out.
    """
    twins = order[twin_of[order] >= 0]
    paired, first = np.unique(twin_of[twins], return_index=True)
    singles = order[(twin_of[order] < 0) & ~np.isin(order, paired)]
    couples = np.concatenate(
        [
            np.stack([paired, twins[first]], axis=1),
            singles[: len(singles) // 2 * 2].reshape(-1, 2),
        ]
    )
    drawn: np.ndarray = rng.permutation(couples).ravel()
    return drawn


def draw_shared_couples(
    labels: np.ndarray,
    twin_of: np.ndarray,
    num_couples: int,
    twin_share: float,
    draw: Draw,
    rng: np.random.Generator,
) -> np.ndarray:
    """Return int64[2 * num_couples] images, couple by couple, a share of them with a twin.

    The others are one REAL and one FAKE of the images that are no twins. `draw` chooses all images;
    one with several twins gets any of them each time.
    """
    num_pairs = round(twin_share * num_couples)
    twins = np.flatnonzero(twin_of >= 0)
    twins = twins[np.argsort(twin_of[twins], kind="stable")]
    paired, first, num_twins = np.unique(twin_of[twins], return_index=True, return_counts=True)
    owners = draw(paired, num_pairs)
    places = np.searchsorted(paired, owners)
    chosen = twins[first[places] + rng.integers(num_twins[places])]
    num_others = num_couples - num_pairs
    others = (
        draw(np.flatnonzero((twin_of < 0) & (labels == label)), num_others)
        for label in (REAL, FAKE)
    )
    couples = np.concatenate([np.stack([owners, chosen], axis=1), np.stack([*others], axis=1)])
    drawn: np.ndarray = rng.permutation(couples).ravel()
    return drawn
