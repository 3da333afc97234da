"""Encoded images in, a batch of a detector's input out: the half of scoring that needs no detector.

Floor: core. torch is not imported: where a GPU scores, other processes do this.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from cifake_ray.core.imaging.decode import ImageHeader, inspect_image
from cifake_ray.core.imaging.preprocessing import Preprocessing
from cifake_ray.errors import ImageError


@dataclass(frozen=True)
class Decoded:
    """N images, of which K could be decoded."""

    pixels: np.ndarray  # uint8[K, S, S, 3]
    headers: list[ImageHeader | None]  # N; None of those that could not
    errors: list[ImageError | None]  # N; None of those that could


def decode_batch(preprocessing: Preprocessing, images: Iterable[bytes | ImageError]) -> Decoded:
    """The images, one after the other as they come; what went wrong stands in its place."""
    pixels: list[np.ndarray] = []
    headers: list[ImageHeader | None] = []
    errors: list[ImageError | None] = []
    for image in images:
        try:
            if isinstance(image, ImageError):
                raise image
            found = inspect_image(image)
            pixels.append(preprocessing.load_image(image))
            headers.append(found)
            errors.append(None)
        except ImageError as error:
            headers.append(None)
            errors.append(error)
    side = preprocessing.image_size
    stacked = np.stack(pixels) if pixels else np.zeros((0, side, side, 3), np.uint8)
    return Decoded(stacked, headers, errors)
