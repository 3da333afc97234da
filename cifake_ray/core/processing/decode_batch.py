"""Decode images to a batch of a detector's input: the half of scoring without a detector.

torch is not imported, since with a GPU other processes do this.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from cifake_ray.core.imaging.decode import ImageHeader, map_images
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
    decoded = map_images(preprocessing.load_with_header, images)
    pixels = [each[1] for each in decoded if not isinstance(each, ImageError)]
    side = preprocessing.image_size
    return Decoded(
        np.stack(pixels) if pixels else np.zeros((0, side, side, 3), np.uint8),
        headers=[None if isinstance(each, ImageError) else each[0] for each in decoded],
        errors=[each if isinstance(each, ImageError) else None for each in decoded],
    )
