"""Native crops: cut where the numbers say, never enlarged, and scored as in scoring."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from cifake_ray.config import POLICIES, Augmentation
from cifake_ray.core.imaging.preprocessing import Preprocessing
from cifake_ray.core.training import native_crops
from cifake_ray.core.training.native_crops import (
    MAX_WHOLE_PIXELS,
    NativeImage,
    cut_random_crop,
    cut_scored,
    cut_windows,
    load_native,
)

SIZE = 16
NOTHING = np.empty((0, SIZE, SIZE, 3), np.uint8)
SHRINK = Augmentation(downscale=0.75, downscale_share=1.0)


def make_pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def draw(**values: float) -> dict[str, float]:
    names = ("window", "top", "left", "downscale_share", "downscale")
    return {name: values.get(name, 0.0) for name in names}


def cut(
    pixels: np.ndarray,
    policy: Augmentation = POLICIES["none"],
    **values: float,
) -> np.ndarray:
    image = NativeImage(cut_windows(pixels), NOTHING)
    return cut_random_crop(image, SIZE, policy, draw(**values))


def test_a_crop_is_the_very_pixels_at_any_offset() -> None:
    pixels = make_pixels(40, 50)
    crops = {
        (top, left): cut(pixels, top=top / 25, left=left / 35)
        for top in range(25)
        for left in range(35)
    }
    for (top, left), crop in crops.items():
        row, column = int(top / 25 * 25), int(left / 35 * 35)
        assert np.array_equal(crop, pixels[row : row + SIZE, column : column + SIZE])
    assert np.array_equal(cut(pixels, top=0.9999, left=0.9999), pixels[-SIZE:, -SIZE:])


@pytest.mark.parametrize(("height", "width"), [(5, 40), (40, 5), (3, 3), (1, 1)])
def test_a_small_image_is_padded_by_reflection(height: int, width: int) -> None:
    crop = cut(make_pixels(height, width), top=0.5, left=0.5)
    assert crop.shape == (SIZE, SIZE, 3)
    if height < SIZE:
        assert np.array_equal(crop[height], crop[height - 1])
    if width < SIZE:
        assert np.array_equal(crop[:, width], crop[:, width - 1])


def test_a_larger_region_is_shrunk_with_antialias() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    shrunk = cut(stripes, SHRINK, downscale=1.0)  # 64 to 16 pixels
    assert abs(float(shrunk[:, 2:-2].mean()) - 127.5) < 1
    assert shrunk[:, 2:-2].std() < 3
    corner = cut(make_pixels(64, 64), SHRINK, downscale=0.0)
    assert np.array_equal(corner, make_pixels(64, 64)[:SIZE, :SIZE])


@pytest.mark.parametrize(("height", "width"), [(20, 200), (16, 16), (9, 200)])
def test_nothing_is_enlarged_where_the_image_has_no_larger_region(height: int, width: int) -> None:
    """The region ends at the shorter side: at 20 pixels 20 are shrunk to 16, at 16 nothing is."""
    pixels = make_pixels(height, width)
    crop = cut(pixels, SHRINK, downscale=1.0)
    if height <= SIZE:
        assert np.array_equal(crop[:height], pixels[:SIZE, :SIZE])
    else:
        expected = Image.fromarray(pixels[:20, :20]).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        assert np.array_equal(crop, np.asarray(expected))


@pytest.mark.parametrize(
    ("height", "width", "number"),
    [(2048, 2048, 1), (3000, 4000, 4), (500, 20_000, 2), (1, 10_000_000, 2)],
)
def test_what_is_kept_of_a_large_image_is_bounded(height: int, width: int, number: int) -> None:
    pixels = np.broadcast_to(np.arange(width, dtype=np.uint8)[None, :, None], (height, width, 3))
    windows = cut_windows(pixels)
    assert len(windows) == number
    assert windows[..., 0].size <= MAX_WHOLE_PIXELS
    other = cut_windows(np.zeros_like(pixels))
    assert other.shape == windows.shape, "a twin would be cut elsewhere"


def test_windows_are_around_the_middles_of_the_quarters() -> None:
    rows, columns = np.meshgrid(np.arange(3000) // 16, np.arange(4000) // 16, indexing="ij")
    pixels = np.stack([rows, columns, rows], axis=2).astype(np.uint8)
    windows = cut_windows(pixels)
    middles = windows[:, 512, 512, :2].tolist()
    assert middles == [[46, 62], [46, 187], [140, 62], [140, 187]]  # 750 and 1000 of 16 each, ...
    image = NativeImage(windows, NOTHING)
    for number in range(4):
        crop = cut_random_crop(image, SIZE, Augmentation(), draw(window=number / 4))
        assert np.array_equal(crop, windows[number, :SIZE, :SIZE])


@pytest.mark.parametrize("most", [MAX_WHOLE_PIXELS, 60 * 60])
def test_scored_crops_are_those_of_scoring(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an image that is kept whole and of one that is too large."""
    monkeypatch.setattr(native_crops, "MAX_WHOLE_PIXELS", most)
    monkeypatch.setattr(native_crops, "WINDOW_SIDE", 30)
    preprocessing = Preprocessing(
        image_size=SIZE, fit="crops", num_crops=5, mean=(0.5,) * 3, std=(0.5,) * 3
    )
    buffer = io.BytesIO()
    Image.fromarray(make_pixels(70, 130)).save(buffer, "PNG")
    image = load_native(buffer.getvalue(), preprocessing)
    assert len(image.windows) == (1 if most == MAX_WHOLE_PIXELS else 4)
    expected = preprocessing.load_image(buffer.getvalue())
    assert np.array_equal(cut_scored(image, preprocessing), expected)
    assert expected.shape == (5, SIZE, SIZE, 3)
