"""Decode encoded images to a batch of a detector's input: the half of scoring without a detector.

torch is not imported, since beside a GPU other processes do this.
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
    headers: list[ImageHeader | None]  # N; None if it could not be decoded
    errors: list[ImageError | None]  # N; None if it could


def decode_batch(preprocessing: Preprocessing, images: Iterable[bytes | ImageError]) -> Decoded:
    """Decode the images in order; an error takes the place of an image that fails."""
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
