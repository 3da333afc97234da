"""Crops of native resolution: which are chosen, what they hold, what hostile images cost."""

from __future__ import annotations

import io
import tracemalloc
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cifake_ray.core.imaging.crops import (
    choose_crops,
    cut_crops,
    find_difference,
    pad_to,
    pool_logits,
)
from cifake_ray.core.imaging.preprocessing import Preprocessing

CROPS: dict[str, Any] = {
    "image_size": 32,
    "fit": "crops",
    "num_crops": 4,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
}


def make_noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize(
    ("height", "width", "num_crops", "expected"),
    [
        (32, 32, 4, [(0, 0)]),
        (64, 64, 4, [(0, 0), (0, 32), (32, 0), (32, 32)]),
        (64, 64, 1, [(0, 0)]),  # the four are as near to the centre
        (40, 100, 4, [(0, 0), (0, 32), (0, 64)]),
        (20, 70, 4, [(0, 0), (0, 32)]),  # (0, 38), but on the block grid
        (1, 1, 4, [(0, 0)]),
        (320, 320, 1, [(64, 64)]),
        (320, 320, 2, [(64, 104), (224, 264)]),
    ],
)
def test_crops_stand_on_a_grid_over_the_image(
    height: int, width: int, num_crops: int, expected: list[tuple[int, int]]
) -> None:
    found = choose_crops(make_noise(height, width), size=32, num_crops=num_crops)
    assert found == expected


@pytest.mark.parametrize("shape", [(200, 300), (97, 1003), (2000, 40), (777, 555), (1500, 2000)])
def test_crops_lie_inside_on_the_block_grid_and_reach_every_quarter(
    shape: tuple[int, int],
) -> None:
    found = choose_crops(make_noise(*shape), size=32, num_crops=12)
    assert 9 <= len(found) == len(set(found)) <= 12
    assert all(not (top % 8 or left % 8) for top, left in found)
    assert all(top + 32 <= shape[0] and left + 32 <= shape[1] for top, left in found)
    for axis, side in enumerate(shape):
        middles = [offset[axis] + 16 for offset in found]
        assert side < 64 or min(middles) <= side / 4 + 16
        assert side < 64 or max(middles) >= side * 3 / 4 - 16


def test_flat_crops_are_skipped_for_others() -> None:
    pixels = make_noise(320, 320)
    pixels[:, :160] = 200  # of 100 places half are flat
    found = choose_crops(pixels, size=32, num_crops=8)
    assert len(found) == 8
    assert all(left >= 160 - 32 for _, left in found)
    assert all(
        find_difference(pixels[top : top + 32, left : left + 32]) >= 1 for top, left in found
    )


def test_of_a_flat_image_the_least_flat_crop_is_taken() -> None:
    pixels = np.full((320, 320, 3), 200, np.uint8)
    assert len(choose_crops(pixels, size=32, num_crops=8)) == 1
    pixels[250, 250] = 0
    ((top, left),) = choose_crops(pixels, size=32, num_crops=64)
    assert top <= 250 < top + 32
    assert left <= 250 < left + 32


def test_cut_crops_are_native_and_reflected_where_the_image_ends() -> None:
    pixels = make_noise(20, 70)
    crops = cut_crops(pixels, [(0, 0), (0, 32)], size=32)
    assert crops.shape == (2, 32, 32, 3)
    np.testing.assert_array_equal(crops[:, :20], [pixels[:, :32], pixels[:, 32:64]])
    np.testing.assert_array_equal(crops[:, 20:], crops[:, 19:7:-1])
    np.testing.assert_array_equal(pad_to(pixels[:1, :1], 5), np.tile(pixels[:1, :1], (5, 5, 1)))
    assert pad_to(pixels, 32).shape == (32, 70, 3)


@pytest.mark.parametrize("shape", [(1, 60_000_000), (60_000_000, 1), (8000, 8000)])
def test_large_images_and_long_strips_cost_little(shape: tuple[int, int]) -> None:
    pixels = np.zeros((*shape, 3), np.uint8)
    tracemalloc.start()
    crops = Preprocessing(**{**CROPS, "image_size": 128, "num_crops": 12}).fit_pixels(pixels)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert crops.shape == (1, 128, 128, 3)
    assert peak_bytes < 5 * 2**20


@pytest.mark.parametrize("shape", [(100, 90), (5, 90), (1, 1)])
def test_every_way_to_load_gives_the_same_crops(shape: tuple[int, int]) -> None:
    made = Preprocessing(**CROPS)
    pixels = make_noise(*shape)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    data = buffer.getvalue()
    crops = made.load_image(data)
    assert crops.dtype == np.uint8
    assert crops.shape[1:] == (32, 32, 3)
    assert 1 <= len(crops) <= 4
    header, again = made.load_with_header(data)
    assert (header.height, header.width) == shape
    _, fitted, whole = made.load_whole(data)
    np.testing.assert_array_equal(whole, pixels)
    for other in (again, fitted, made.fit_pixels(pixels)):
        np.testing.assert_array_equal(other, crops)


def test_the_number_of_crops_is_kept_by_bundles_that_have_one() -> None:
    made = Preprocessing(**CROPS)
    assert Preprocessing.from_dict(made.to_dict()) == made
    other = Preprocessing(**{**CROPS, "fit": "crop", "num_crops": None})
    assert "num_crops" not in other.to_dict(), "the fingerprints of bundles of before"
    assert Preprocessing.from_dict(other.to_dict()) == other


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_crops": None},
        {"num_crops": 0},
        {"num_crops": 65},
        {"num_crops": 2.0},
        {"num_crops": True},
        {"fit": "crop"},
        {"jpeg_scale": True},
    ],
)
def test_a_wrong_number_of_crops_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"num_crops|jpeg_scale"):
        Preprocessing(**{**CROPS, **wrong})
    with pytest.raises(ValueError, match="image is uint8"):
        Preprocessing(**CROPS).fit_pixels(np.zeros((4, 4)))


def test_logits_are_pooled_by_image() -> None:
    logit = np.array([1, 3, 7, -2, -2, np.nan, 5], np.float32)
    mean, std = pool_logits(logit, np.array([2, 1, 2, 2]))
    np.testing.assert_array_equal(mean, np.array([2, 7, -2, np.nan], np.float32))
    np.testing.assert_array_equal(std, np.array([1, 0, 0, np.nan], np.float32))
    assert [len(each) for each in pool_logits(logit[:0], np.zeros(0, np.int64))] == [0, 0]
