"""Make small copies of images to look at."""

from __future__ import annotations

import io

from PIL import Image

from cifake_ray.core.imaging.decode import decode_stored
from cifake_ray.errors import ImageError

# Longest side in pixels and WebP's quality; the first that is small enough is taken.
SIZES = ((256, 75), (192, 65), (128, 55), (96, 45), (64, 35), (48, 25), (32, 20))
MAX_PIXELS_PER_BYTE = 5
SMALL_SIDE = 64  # up to it an image is kept as it is, without loss if that fits


def make_thumbnail(data: bytes, max_bytes: int) -> tuple[bytes, int]:
    """Return an image as WebP of at most `max_bytes`, and its longer side in pixels.

    ImageError when it does not decode, or nothing is small enough.
    """
    image = Image.fromarray(decode_stored(data, 2 * SIZES[0][0]).to_array())
    side = max(image.size)
    if side <= SMALL_SIDE and len(found := _encode(image, lossless=True)) <= max_bytes:
        return found, side
    for size, quality in SIZES:
        if size**2 > MAX_PIXELS_PER_BYTE * max_bytes:  # hopeless, and encoding takes long
            continue
        image.thumbnail((size, size), reducing_gap=2.0)
        if len(found := _encode(image, quality=quality)) <= max_bytes:
            return found, max(image.size)
    raise ImageError("too_large", f"no thumbnail has less than {max_bytes} bytes")


def _encode(image: Image.Image, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", method=2, **options)
    return buffer.getvalue()
