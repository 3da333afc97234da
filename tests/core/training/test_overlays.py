"""Overlays: text and logos of random form, the same for one seed, and only over a part."""

from __future__ import annotations

import numpy as np
import pytest

from cifake_ray.core.training.overlays import draw_overlay


@pytest.mark.parametrize("side", [8, 32, 128, 500])
def test_an_overlay_covers_a_part_of_an_image(side: int) -> None:
    pixels = np.full((side, side, 3), 128, np.uint8)
    shares = []
    for seed in range(200):
        drawn = draw_overlay(pixels, seed)
        assert drawn.shape == pixels.shape
        assert drawn.dtype == np.uint8
        shares.append((drawn != pixels).any(axis=2).mean())
    assert (pixels == 128).all()
    assert np.count_nonzero(shares) >= 190
    assert 0.02 < np.median(shares) < 0.4


def test_a_seed_gives_one_overlay_and_seeds_differ() -> None:
    pixels = np.full((64, 64, 3), 128, np.uint8)
    drawn = [draw_overlay(pixels, seed).tobytes() for seed in range(100)]
    assert [draw_overlay(pixels, seed).tobytes() for seed in range(100)] == drawn
    assert len(set(drawn)) >= 98


def test_overlays_have_every_opacity_and_lie_everywhere() -> None:
    pixels = np.zeros((64, 64, 3), np.uint8)
    drawn = np.stack([draw_overlay(pixels, seed) for seed in range(400)])
    brightest = drawn.max(axis=(1, 2, 3))
    assert (np.histogram(brightest, [64, 96, 160, 224, 256])[0] > 10).all()
    covered = (drawn > 0).any(axis=3).mean(axis=0)
    assert (covered > 0.01).all()
