"""Encode the raw pixels of Spark's image schema, so that they are images like all others.

Source: `org.apache.spark.ml.image.ImageSchema`; `mode` is a type of OpenCV, rows are top-down.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from PIL import Image

from cifake_ray.core.imaging.decode import MAX_IMAGE_BYTES
from cifake_ray.errors import ImageError

RAW_FIELDS = {"height", "width", "nChannels", "mode", "data"}
_PILLOW_MODES = {0: ("L", "L"), 16: ("RGB", "BGR"), 24: ("RGBA", "BGRA")}  # CV_8UC1, 8UC3, 8UC4


def encode_pixels(image: Mapping[str, Any]) -> bytes:
    """Return a row of Spark's image schema as PNG, the same bytes each time; else ImageError."""
    width, height, mode, data = (image[name] for name in ("width", "height", "mode", "data"))
    if not data or mode not in _PILLOW_MODES:
        raise ImageError(
            "not_an_image", f"raw pixels of mode {mode}; Spark's 0, 16 and 24 are read"
        )
    if len(data) > MAX_IMAGE_BYTES:
        raise ImageError("too_large", f"{len(data)} bytes; the limit is {MAX_IMAGE_BYTES}")
    pillow, order = _PILLOW_MODES[mode]
    if min(width or 0, height or 0) < 1 or len(data) != width * height * len(order):
        raise ImageError(
            "truncated", f"{len(data)} bytes for {width} x {height} pixels of {len(order)} channels"
        )
    buffer = io.BytesIO()
    pixels = Image.frombytes(pillow, (width, height), data, "raw", order)
    pixels.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
