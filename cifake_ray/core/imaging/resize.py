"""Resize images as timm and transformers do for their classifiers, then crop the centre."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from cifake_ray.config import MAX_IMAGE_SIZE

# How half of an odd margin becomes a whole pixel: torchvision's way, half to even, and
# transformers' way.
Rounding = Literal["even", "down"]
RESAMPLES = tuple(method.name.lower() for method in Image.Resampling)
MAX_RATIO = 64  # of still longer images whose shorter side is fitted only the middle is resized


@dataclass(frozen=True, kw_only=True)
class Resize:
    """A resize with Pillow, as a classifier's own preprocessing does it."""

    side: int  # pixels, 1..MAX_IMAGE_SIZE
    keeps_aspect: bool  # the shorter side becomes `side`, else both do
    resample: str  # one of RESAMPLES
    crop_rounding: Rounding

    def __post_init__(self) -> None:
        if type(self.side) is not int or not 1 <= self.side <= MAX_IMAGE_SIZE:
            raise ValueError(f"resize to {self.side!r} pixels: not a number in 1..{MAX_IMAGE_SIZE}")
        if type(self.keeps_aspect) is not bool:
            raise ValueError(f"keeps_aspect={self.keeps_aspect!r} must be true or false")
        if self.resample not in RESAMPLES:
            raise ValueError(f"resample={self.resample!r} must be one of {RESAMPLES}")
        if self.crop_rounding not in get_args(Rounding):
            raise ValueError(f"crop_rounding={self.crop_rounding!r}: {get_args(Rounding)}")

    def fit(self, pixels: np.ndarray, size: int) -> np.ndarray:
        """Map uint8[H, W, 3] to uint8[size, size, 3]; `size` is at most `side`."""
        scaled = (self.side, self.side)
        if self.keeps_aspect:
            short = min(pixels.shape[:2])
            pixels = self._crop(pixels, MAX_RATIO * short)
            height, width = pixels.shape[:2]
            scaled = (int(self.side * width // short), int(self.side * height // short))
        method = Image.Resampling[self.resample.upper()]
        resized = np.asarray(Image.fromarray(pixels).resize(scaled, method))
        return np.array(self._crop(resized, size))

    def _crop(self, pixels: np.ndarray, side: int) -> np.ndarray:
        """Return a view of the centre, neither side longer than `side`."""
        margins = [max(length - side, 0) for length in pixels.shape[:2]]
        top, left = (
            round(margin / 2) if self.crop_rounding == "even" else margin // 2 for margin in margins
        )
        return pixels[top : top + side, left : left + side]


def parse_resize(values: Any) -> Resize | None:
    """Return what a bundle's config holds. ValueError or TypeError if it is malformed."""
    return None if values is None else Resize(**values)
