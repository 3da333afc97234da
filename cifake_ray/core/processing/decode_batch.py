"""Decode images to a batch of a detector's input: the half of scoring without a detector.

torch is not imported, since with a GPU other processes do this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from cifake_ray.core.imaging.decode import ImageHeader, map_images
from cifake_ray.core.imaging.preprocessing import Preprocessing
from cifake_ray.core.imaging.thumbnail import make_thumbnail
from cifake_ray.core.provenance.read_provenance import Provenance
from cifake_ray.errors import ImageError


@dataclass(frozen=True)
class Decoded:
    """N images, of which K could be decoded."""

    pixels: np.ndarray  # uint8[M, S, S, 3], M = K but for crops
    headers: list[ImageHeader | None]  # N; None if it could not be decoded
    errors: list[ImageError | None]  # N; None if it could
    provenance: list[Provenance | None] | None = None  # N, if it is asked for
    thumbnails: list[bytes | None] | None = None  # N, WebP, likewise
    num_crops: np.ndarray | None = None  # int64[K], M in all, if the detector sees crops


def decode_batch(
    preprocessing: Preprocessing,
    images: Iterable[bytes | ImageError],
    read_provenance: Callable[[bytes, str], Provenance] | None = None,
    max_thumbnail_bytes: int | None = None,
) -> Decoded:
    """Decode the images in order; an error takes the place of an image that fails."""

    def load(data: bytes) -> tuple[ImageHeader, np.ndarray, Provenance | None, bytes | None]:
        header, pixels = preprocessing.load_with_header(data)
        provenance = read_provenance(data, header.format) if read_provenance else None
        return header, pixels, provenance, load_thumbnail(data)

    def load_thumbnail(data: bytes) -> bytes | None:
        if max_thumbnail_bytes is None:
            return None
        with suppress(ImageError):  # it has a score all the same
            return make_thumbnail(data, max_thumbnail_bytes)[0]
        return None

    decoded = map_images(load, images)
    pixels, num_crops = preprocessing.stack_images(
        [each[1] for each in decoded if not isinstance(each, ImageError)]
    )
    return Decoded(
        pixels,
        headers=[None if isinstance(each, ImageError) else each[0] for each in decoded],
        errors=[each if isinstance(each, ImageError) else None for each in decoded],
        provenance=[None if isinstance(each, ImageError) else each[2] for each in decoded]
        if read_provenance
        else None,
        thumbnails=[None if isinstance(each, ImageError) else each[3] for each in decoded]
        if max_thumbnail_bytes is not None
        else None,
        num_crops=num_crops,
    )
