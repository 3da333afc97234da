"""Draw what each pixel adds to a logit over the image, as PNG."""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image, ImageColor

from cifake_ray.report.figures import COLOURS


def draw_gradient_image(pixels: np.ndarray, added: np.ndarray) -> bytes:
    """Colour pale grey uint8[S, S, 3] by float32[S, S]: for FAKE above 0, for REAL below.

    Crops, uint8[k, S, S, 3] by float32[k, S, S], stand side by side in their order. Smoothed over a
    fiftieth of the side, since single pixels are noise; full colour from the 99th percentile on.
    """
    from scipy.ndimage import gaussian_filter

    size = added.shape[-1]
    smooth = gaussian_filter(added, (0, size / 50, size / 50)[-added.ndim :])
    if added.ndim == 3:  # after that, so that neighbours do not run into each other
        pixels, smooth = _join_crops(pixels), _join_crops(smooth)
    strength = np.clip(np.abs(smooth) / max(np.quantile(np.abs(smooth), 0.99), 1e-12), 0, 1)
    grey = np.asarray(Image.fromarray(pixels).convert("L"), np.float32) / 2 + 127
    colours = np.array([ImageColor.getrgb(COLOURS[name]) for name in ("REAL", "FAKE")])
    share = strength[..., None]
    mixed = (1 - share) * grey[..., None] + share * colours[(smooth > 0).astype(int)]
    buffer = io.BytesIO()
    Image.fromarray(mixed.astype(np.uint8)).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _join_crops(crops: np.ndarray) -> np.ndarray:
    """Lay [k, S, S, ...] out on a canvas about as wide as high; what stays free is 0."""
    columns = math.ceil(math.sqrt(len(crops)))
    rows, size = math.ceil(len(crops) / columns), crops.shape[1]
    canvas = np.zeros((rows * size, columns * size, *crops.shape[3:]), crops.dtype)
    for number, crop in enumerate(crops):
        top, left = (size * n for n in divmod(number, columns))
        canvas[top : top + size, left : left + size] = crop
    return canvas
