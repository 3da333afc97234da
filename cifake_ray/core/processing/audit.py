"""Measure what may give the label of an image away: the processor of audit."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from functools import partial
from typing import Any

import imagehash
import numpy as np
import pyarrow as pa
from PIL import Image

from cifake_ray.core.imaging.decode import ImageHeader, decode_with_header, map_images
from cifake_ray.core.imaging.encoding_facts import read_encoding
from cifake_ray.core.processing.processor import Prepare, assemble_rows
from cifake_ray.core.schema import AUDIT_FIELDS, MEASURED_FIELDS
from cifake_ray.errors import ImageError

MAX_MEASURED_SIDE = 1024  # pixels: statistics are those of the centre of larger images
THUMBNAIL_SIDE = 8  # pixels: two images with near hashes are compared by these
MAX_GREY_SPREAD = 4  # of 255, between the channels of a pixel that counts as grey

Measured = list[tuple[ImageHeader, dict[str, Any]] | ImageError]


class AuditProcessor:
    """Decode each image and keep facts on its file and its pixels: the `Processor` of audit."""

    batch_size = 256
    decodes = True
    image_bytes = 2048  # what is measured of an image, without its pixels

    def __init__(self) -> None:
        self.footer: dict[str, str] = {}
        self.prepare: Prepare = partial(map_images, measure_image)

    def finish(self, rows: pa.Table, prepared: Measured) -> pa.Table:
        done = [None if isinstance(each, ImageError) else each for each in prepared]
        columns: dict[str, Any] = {
            field.name: [each and each[1][field.name] for each in done] for field in MEASURED_FIELDS
        }
        return assemble_rows(
            AUDIT_FIELDS,
            rows,
            columns,
            headers=[each and each[0] for each in done],
            errors=[each if isinstance(each, ImageError) else None for each in prepared],
        )

    def count_unlike(self, rows: pa.Table) -> dict[str, int]:
        return {}  # there is no detector


def measure_image(data: bytes) -> tuple[ImageHeader, dict[str, Any]]:
    """Return the header and MEASURED_FIELDS of an image. Raises ImageError."""
    header, stored = decode_with_header(data, None)
    pixels = stored.to_array()
    shape = np.array(pixels.shape[:2], "<i4").tobytes()
    image = Image.fromarray(pixels)
    thumbnail = image.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BOX)
    bits = imagehash.phash(image).hash
    return header, {
        "size_bytes": len(data),
        **asdict(read_encoding(data)),
        **measure_pixels(pixels),
        "sha256": hashlib.sha256(data).digest(),
        "pixels_sha256": hashlib.sha256(shape + pixels.tobytes()).digest(),
        "phash": int.from_bytes(np.packbits(bits).tobytes(), "big"),
        "thumbnail": thumbnail.tobytes(),
    }


def measure_pixels(pixels: np.ndarray) -> dict[str, float]:
    """Return ten statistics of the centre of uint8[H, W, 3] that need no understanding of it.

    Mean and deviation of each channel in 0..255, the mean square of the Laplacian of grey, the mean
    of (max - min) / max, and the shares of pixels that are grey and of values at 0 or 255.
    """
    top, left = (max(side - MAX_MEASURED_SIDE, 0) // 2 for side in pixels.shape[:2])
    pixels = pixels[top : top + MAX_MEASURED_SIDE, left : left + MAX_MEASURED_SIDE]
    planes = np.ascontiguousarray(pixels.transpose(2, 0, 1))  # three times as fast by plane
    red, green, blue = planes
    highest = np.maximum(np.maximum(red, green), blue)
    spread = highest - np.minimum(np.minimum(red, green), blue)
    grey = np.pad(planes.mean(axis=0, dtype=np.float32), 1, mode="edge")
    laplacian = 4 * grey[1:-1, 1:-1] - grey[:-2, 1:-1] - grey[2:, 1:-1]
    laplacian -= grey[1:-1, :-2] + grey[1:-1, 2:]
    names = ("red", "green", "blue")
    means = [plane.mean() for plane in planes]
    deviations = [plane.std(dtype=np.float32) for plane in planes]
    return {
        **{f"mean_{name}": float(value) for name, value in zip(names, means, strict=True)},
        **{f"std_{name}": float(value) for name, value in zip(names, deviations, strict=True)},
        "laplacian": float(np.square(laplacian).mean()),
        "saturation": float((spread / np.maximum(highest, 1, dtype=np.float32)).mean()),
        "grey_share": float((spread <= MAX_GREY_SPREAD).mean()),
        "clipped_share": float(((planes == 0) | (planes == 255)).mean()),
    }
