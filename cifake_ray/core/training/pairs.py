"""Order the images of an epoch so that an image and its twin stand beside each other.

A couple is an image and one of its twins, or two images without any. Batches and ranks take whole
couples, so nothing tears a pair apart, and the order follows from the generator alone.
"""

from __future__ import annotations

import numpy as np


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
