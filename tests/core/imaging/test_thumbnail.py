"""Thumbnails keep the picture's shape and stay below the bytes they are given."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from cifake_ray.core.imaging.thumbnail import make_thumbnail
from cifake_ray.errors import ImageError


def encode(width: int, height: int, format: str = "PNG") -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


@pytest.mark.parametrize("max_bytes", [24_576, 8192, 2000, 524])
@pytest.mark.parametrize("size", [(640, 480), (300, 900), (1500, 50), (70, 70)])
def test_noise_fits_and_keeps_its_shape(size: tuple[int, int], max_bytes: int) -> None:
    data, side = make_thumbnail(encode(*size, "JPEG"), max_bytes)
    assert len(data) <= max_bytes
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, max(image.size)) == ("WEBP", side)
        assert image.size[0] / image.size[1] == pytest.approx(size[0] / size[1], rel=0.6)
        assert side <= min(256, max(size))


def test_a_small_image_is_kept_as_it_is() -> None:
    source = encode(32, 20)
    data, side = make_thumbnail(source, 8192)
    with Image.open(io.BytesIO(data)) as image, Image.open(io.BytesIO(source)) as wanted:
        assert np.array_equal(np.asarray(image.convert("RGB")), np.asarray(wanted))
    assert side == 32


def test_what_cannot_be_shown_says_why() -> None:
    with pytest.raises(ImageError, match="not_an_image"):
        make_thumbnail(b"no image", 8192)
    with pytest.raises(ImageError, match="no thumbnail has less than 10 bytes"):
        make_thumbnail(encode(100, 100), 10)
