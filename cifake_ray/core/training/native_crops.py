"""Keep what random crops need of native pixels, and cut them.

Nothing is enlarged. Of a large image a few windows are kept, so that its share of memory and of the
cache is bounded; the crops that are scored are chosen from the whole image before.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image

from cifake_ray.config import MAX_CROP_SIZE, Augmentation
from cifake_ray.core.imaging.crops import pad_to
from cifake_ray.core.imaging.decode import decode_image
from cifake_ray.core.imaging.preprocessing import Preprocessing

# The sides of a window: those of the largest crop. Four windows are 4 megapixels: 12.6 MB of a
# photograph of any size, 256 crops of 128 pixels beside each other, and room for a crop shrunk to
# an eighth.
WINDOW_SIDE = MAX_CROP_SIZE
MAX_WHOLE_PIXELS = 4 * WINDOW_SIDE**2


class NativeImage(NamedTuple):
    """What training keeps of an image."""

    windows: np.ndarray  # uint8[N, H, W, 3]: the whole image, or parts of a large one
    scored: np.ndarray  # uint8[K, S, S, 3]: the crops of a large image that are scored; else K = 0


def load_native(data: bytes, preprocessing: Preprocessing) -> NativeImage:
    """Decode bytes, and keep what random crops and the crops that are scored need of the pixels.

    Raises ImageError.
    """
    pixels = decode_image(data)
    windows, size = cut_windows(pixels), preprocessing.image_size
    is_whole = windows[0].shape == pixels.shape
    scored = (
        np.empty((0, size, size, 3), np.uint8) if is_whole else preprocessing.fit_pixels(pixels)
    )
    return NativeImage(windows, scored)


def cut_scored(image: NativeImage, preprocessing: Preprocessing) -> np.ndarray:
    """Return the crops that `Preprocessing.load_image` chooses: uint8[K, S, S, 3]."""
    return image.scored if len(image.scored) else preprocessing.fit_pixels(image.windows[0])


def cut_windows(pixels: np.ndarray) -> np.ndarray:
    """Return uint8[N, H, W, 3] of uint8[H', W', 3]: all of it, or the middles of its quarters.

    The places follow from the size alone, so that an image and its twin keep the same ones.
    """
    height, width = pixels.shape[:2]
    if height * width <= MAX_WHOLE_PIXELS:
        return pixels[None]
    tops, lefts = _place_windows(height), _place_windows(width)
    rows, columns = min(height, WINDOW_SIDE), min(width, WINDOW_SIDE)
    windows = [pixels[top : top + rows, left : left + columns] for top in tops for left in lefts]
    return np.stack(windows)


def _place_windows(length: int) -> list[int]:
    """Return where windows start on an axis: around its first and its third quarter, once each."""
    most = max(length - WINDOW_SIDE, 0)
    starts = (quarter * length // 4 - WINDOW_SIDE // 2 for quarter in (1, 3))
    return sorted({min(max(start, 0), most) for start in starts})


def cut_random_crop(
    image: NativeImage, size: int, policy: Augmentation, u: dict[str, float]
) -> np.ndarray:
    """Cut uint8[size, size, 3] where the image's random numbers in [0, 1) say.

    Images of one size with the same numbers are cut at the same place.
    """
    count, height, width, _ = image.windows.shape
    side = size
    if u["downscale_share"] < policy.downscale_share:
        side = round(size / (1 - policy.downscale * u["downscale"]))
        side = max(size, min(side, height, width))
    top = int(u["top"] * (max(height - side, 0) + 1))
    left = int(u["left"] * (max(width - side, 0) + 1))
    region = image.windows[int(u["window"] * count), top : top + side, left : left + side]
    if side > size:
        region = np.asarray(Image.fromarray(region).resize((size, size), Image.Resampling.BICUBIC))
    return pad_to(region, size)
