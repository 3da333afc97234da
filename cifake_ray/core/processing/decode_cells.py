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
    pixels: np.ndarray  # uint8[L, S, S, 3], of all M cells that were possible; L = M but for crops
    image: np.ndarray  # int64[M], the row of each, 0..N-1
    cell: np.ndarray  # int64[M], 0..C-1
    num_crops: np.ndarray | None  # int64[M], L in all, if the detector sees crops


def decode_cells(
    preprocessing: Preprocessing, grid: Grid, images: Iterable[bytes | ImageError]
) -> DecodedCells:
    """Decode the images once, and perturb and fit each for every cell."""

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
    clean, clean_crops = preprocessing.stack_images([each[1] for _, each in good])
    pixels, num_crops = preprocessing.stack_images([pixels for _, _, pixels in places])
    return DecodedCells(
        clean=Decoded(
            clean,
            headers=[None if isinstance(each, ImageError) else each[0] for each in loaded],
            errors=[each if isinstance(each, ImageError) else None for each in loaded],
            num_crops=clean_crops,
        ),
        pixels=pixels,
        image=np.array([row for row, _, _ in places], np.int64),
        cell=np.array([number for _, number, _ in places], np.int64),
        num_crops=num_crops,
    )
