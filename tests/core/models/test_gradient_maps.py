"""Gradient maps: the pixels of an image add up to its logit, and a planted trace is found."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from cifake_ray.core.imaging.preprocessing import Preprocessing
from cifake_ray.core.models import gradient_maps
from cifake_ray.core.models.detector import Detector, build_detector
from cifake_ray.core.models.gradient_maps import attribute_logits, check_captum
from cifake_ray.errors import UsageError


@pytest.mark.parametrize("architecture", ["cnn", "small_cnn_w8_d1", "small_cnn_w8_d1_residual"])
def test_what_pixels_add_is_the_logit_less_that_of_a_plain_image(architecture: str) -> None:
    pytest.importorskip("captum")
    torch.manual_seed(0)
    detector = build_detector(architecture).eval()
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    (added,) = attribute_logits(detector, [image])
    plain = 255 * torch.tensor(detector.preprocessing.mean).expand(1, 32, 32, 3)
    with torch.inference_mode():
        wanted = detector.find_logit(torch.from_numpy(image)[None]) - detector.find_logit(plain)
    assert added.shape == (32, 32)
    assert added.sum() == pytest.approx(wanted.item(), rel=0.05)


class Corner(nn.Module):
    """FAKE by how bright the upper left corner is, REAL by the lower right one."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.stack(
            [images[:, :, -4:, -4:].sum((1, 2, 3)), images[:, :, :4, :4].sum((1, 2, 3))], 1
        )


def test_the_pixels_that_decide_are_found() -> None:
    pytest.importorskip("captum")
    half = (0.5, 0.5, 0.5)
    preprocessing = Preprocessing(image_size=16, fit="resize", mean=half, std=half)
    (added,) = attribute_logits(
        Detector("corner", Corner(), preprocessing), [np.full((16, 16, 3), 255, np.uint8)]
    )
    assert added[:4, :4] == pytest.approx(np.full((4, 4), 3.0), rel=1e-4)
    assert added[-4:, -4:] == pytest.approx(np.full((4, 4), -3.0), rel=1e-4)
    assert np.count_nonzero(added) == 32


def test_without_captum_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_maps, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r'pip install "cifake-ray\[explain\]"'):
        check_captum()
