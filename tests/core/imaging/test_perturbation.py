"""Perturbations: every step does what it says, the same each time, and not to its input."""

from __future__ import annotations

import colorsys
import io

import numpy as np
import pytest
from PIL import Image

from cifake_ray.config.grid import Cell
from cifake_ray.core.imaging.perturbation import MAX_SIDE, perturb_image, seed_noise


def make_image(height: int = 48, width: int = 64) -> np.ndarray:
    """A coloured ramp with noise on top, so that every step changes something."""
    rng = np.random.default_rng(4)
    ramp = np.linspace(30, 200, width)[None, :, None] + np.array([0, 20, -20])
    noise = rng.integers(-20, 20, (height, width, 3))
    return (ramp + noise).clip(0, 255).astype(np.uint8)


CELLS: dict[str, Cell] = {
    "jpeg": {"jpeg": 50},
    "webp": {"webp": 50},
    "blur": {"blur": 1},
    "noise": {"noise": 10},
    "rescale": {"rescale": 0.5},
    "brightness": {"brightness": 0.5},
    "contrast": {"contrast": 0.5},
    "saturation": {"saturation": 0},
    "logo": {"logo": 0.25},
    "text": {"text": "SAMPLE"},
}


@pytest.mark.parametrize("name", CELLS)
def test_a_step_changes_pixels_keeps_the_size_and_leaves_its_input(name: str) -> None:
    image = make_image()
    before = image.copy()
    found = perturb_image(image, CELLS[name], 7)
    assert found is not None
    assert found.shape == image.shape
    assert found.dtype == np.uint8
    assert (image == before).all()
    assert (found != image).any()
    again = perturb_image(image, CELLS[name], 7)
    assert again is not None
    assert (found == again).all()


@pytest.mark.parametrize(
    ("cell", "shape"),
    [
        ({"resize": 1.5}, (72, 96)),
        ({"crop": 0.75}, (36, 48)),
        ({"max_side": 32}, (24, 32)),
        ({"max_side": 64}, (48, 64)),
        ({"crop": 0.05, "rescale": 0.01}, (2, 3)),
        ({"resize": 0.5, "crop": 0.5, "max_side": 8}, (6, 8)),
    ],
)
def test_sizes_follow_from_the_steps_in_their_order(cell: Cell, shape: tuple[int, int]) -> None:
    found = perturb_image(make_image(), cell, 7)
    assert found is not None
    assert found.shape == (*shape, 3)


def test_the_centre_is_cropped() -> None:
    image = make_image()
    found = perturb_image(image, {"crop": 0.5}, 7)
    assert found is not None
    assert (found == image[12:36, 16:48]).all()


def test_brightness_multiplies_the_hsv_value_and_nothing_else() -> None:
    image = make_image(4, 5)
    found = perturb_image(image, {"brightness": 0.5}, 7)
    assert found is not None
    for before, after in zip(image.reshape(-1, 3), found.reshape(-1, 3), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*(before / 255.0))
        wanted = np.array(colorsys.hsv_to_rgb(hue, saturation, value * 0.5)) * 255
        assert np.abs(after - wanted).max() < 1


def test_grey_has_no_colour_left() -> None:
    found = perturb_image(make_image(), {"saturation": 0}, 7)
    assert found is not None
    assert (found == found[:, :, :1]).all()


def test_noise_has_its_deviation_in_every_row_and_another_seed_is_other_noise() -> None:
    image = np.full((3000, 500, 3), 128, np.uint8)  # more rows than are made at once
    found, other = (perturb_image(image, {"noise": 10}, seed) for seed in (1, 2))
    assert found is not None
    assert other is not None
    rows = found.astype(float).reshape(3000, -1)
    assert np.abs(rows.std(axis=1) - 10).max() < 1.5
    assert abs(rows.mean() - 128) < 0.1
    assert (found != other).mean() > 0.9
    assert seed_noise(b"one") != seed_noise(b"two")


def test_a_jpeg_is_what_pillow_writes() -> None:
    image, buffer = make_image(), io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=50)
    found = perturb_image(image, {"jpeg": 50}, 7)
    assert found is not None
    assert (found == np.asarray(Image.open(buffer))).all()


def test_what_a_format_or_the_decode_policy_cannot_hold_is_no_image() -> None:
    strip = np.zeros((1, MAX_SIDE["webp"] + 1, 3), np.uint8)
    assert perturb_image(strip, {"webp": 50}, 7) is None
    assert perturb_image(strip, {"jpeg": 50}, 7) is not None
    assert perturb_image(np.zeros((1100, 1000, 3), np.uint8), {"resize": 8}, 7) is None


def test_every_step_takes_an_image_of_one_pixel() -> None:
    image = np.full((1, 1, 3), 128, np.uint8)
    for cell in CELLS.values():
        found = perturb_image(image, cell, 7)
        assert found is not None
        assert found.shape == (1, 1, 3)
