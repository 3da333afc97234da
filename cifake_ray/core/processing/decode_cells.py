"""Decode images once, and perturb and fit each for every cell of a grid.

torch is not imported, since with a GPU other processes do this.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from cifake_ray.config.grid import Grid
from cifake_ray.core.imaging.decode import ImageHeader, map_images
from cifake_ray.core.imaging.perturbation import perturb_image, seed_noise
from cifake_ray.core.imaging.preprocessing import Preprocessing
from cifake_ray.core.processing.decode_batch import Decoded
from cifake_ray.errors import ImageError


@dataclass(frozen=True)
class DecodedCells:
    """N images, of which K could be decoded, each under C cells."""

    clean: Decoded
    pixels: np.ndarray  # uint8[M, S, S, 3], of all cells that were possible
    image: np.ndarray  # int64[M], the row of each, 0..N-1
    cell: np.ndarray  # int64[M], 0..C-1


def decode_cells(
    preprocessing: Preprocessing, grid: Grid, images: Iterable[bytes | ImageError]
) -> DecodedCells:
    """Decode the images once, and perturb and fit each for every cell."""
    size = preprocessing.image_size

    def load(data: bytes) -> tuple[ImageHeader, np.ndarray, list[np.ndarray | None]]:
        header, clean, whole = preprocessing.load_whole(data)
        seed = seed_noise(data)
        perturbed = (perturb_image(whole, cell, seed) for cell in grid.values())
        cells = [None if p is None else preprocessing.fit_pixels(p) for p in perturbed]
        return header, clean, cells

    loaded = map_images(load, images)
    good = [(row, each) for row, each in enumerate(loaded) if not isinstance(each, ImageError)]
    places = [
        (row, number, pixels)
        for row, (_, _, cells) in good
        for number, pixels in enumerate(cells)
        if pixels is not None
    ]
    return DecodedCells(
        clean=Decoded(
            _stack([each[1] for _, each in good], size),
            headers=[None if isinstance(each, ImageError) else each[0] for each in loaded],
            errors=[each if isinstance(each, ImageError) else None for each in loaded],
        ),
        pixels=_stack([pixels for _, _, pixels in places], size),
        image=np.array([row for row, _, _ in places], np.int64),
        cell=np.array([number for _, number, _ in places], np.int64),
    )


def _stack(pixels: list[np.ndarray], size: int) -> np.ndarray:
    return np.stack(pixels) if pixels else np.zeros((0, size, size, 3), np.uint8)
