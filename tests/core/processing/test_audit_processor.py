"""What audit measures of an image equals what its definition says."""

from __future__ import annotations

import hashlib
import io

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from cifake_ray.core.processing.audit import AuditProcessor, measure_image, measure_pixels
from cifake_ray.core.schema import MANIFEST_FIELDS, PIXEL_STATISTICS
from cifake_ray.errors import ImageError


def encode(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, lossless=True)
    return buffer.getvalue()


def test_the_statistics_are_those_of_their_definitions() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 13, 3), np.uint8)
    pixels[:2] = 128
    pixels[2] = 255
    found = measure_pixels(pixels)
    values = pixels.astype(float)
    grey = np.pad(values.mean(axis=2), 1, mode="edge")
    laplacian = [
        4 * grey[y, x] - grey[y - 1, x] - grey[y + 1, x] - grey[y, x - 1] - grey[y, x + 1]
        for y in range(1, 10)
        for x in range(1, 14)
    ]
    spread = values.max(axis=2) - values.min(axis=2)
    expected = {
        **{f"mean_{n}": values[..., i].mean() for i, n in enumerate(("red", "green", "blue"))},
        **{f"std_{n}": values[..., i].std() for i, n in enumerate(("red", "green", "blue"))},
        "laplacian": np.mean(np.square(laplacian)),
        "saturation": (spread / np.maximum(values.max(axis=2), 1)).mean(),
        "grey_share": (spread <= 4).mean(),
        "clipped_share": np.isin(values, (0, 255)).mean(),
    }
    assert list(found) == list(PIXEL_STATISTICS)
    assert found == pytest.approx(expected, rel=1e-5)


def test_digests_are_of_the_bytes_and_of_the_pixels_with_their_shape() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
    png, webp = encode(pixels), encode(pixels, "WEBP")
    one, other = measure_image(png)[1], measure_image(webp)[1]
    assert one["sha256"] == hashlib.sha256(png).digest() != other["sha256"]
    assert one["pixels_sha256"] == other["pixels_sha256"]
    turned = measure_image(encode(pixels.reshape(12, 8, 3)))[1]
    assert turned["pixels_sha256"] != one["pixels_sha256"]


def test_only_the_centre_of_a_large_image_is_measured() -> None:
    pixels = np.full((1100, 1030, 3), 10, np.uint8)
    pixels[:38] = pixels[1062:] = pixels[:, :3] = pixels[:, 1027:] = 250
    assert measure_pixels(pixels)["mean_red"] == pytest.approx(10)


def test_an_image_that_does_not_decode_is_a_row_with_its_error() -> None:
    processor = AuditProcessor()
    rows = pa.table(
        {
            field.name: pa.array(["a", "b", "c"] if field.name == "key" else [None] * 3, field.type)
            for field in MANIFEST_FIELDS
        }
    )
    images = [encode(np.zeros((4, 4, 3), np.uint8)), b"text", ImageError("not_found", "gone")]
    found = processor.finish(rows, processor.prepare(images)).to_pylist()
    assert [row["error"] for row in found] == [None, "not_an_image", "not_found"]
    assert [row["width"] for row in found] == [4, None, None]
    assert [row["sha256"] is None for row in found] == [False, True, True]
