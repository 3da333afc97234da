"""Draw what each pixel adds to a logit over the image, as PNG."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageColor

from cifake_ray.report.figures import COLOURS


def draw_gradient_image(pixels: np.ndarray, added: np.ndarray) -> bytes:
    """Colour pale grey uint8[S, S, 3] by float32[S, S]: for FAKE above 0, for REAL below.

    Smoothed over a fiftieth of the side, since single pixels are noise; full colour from the 99th
    percentile on.
    """
    from scipy.ndimage import gaussian_filter

    smooth = gaussian_filter(added, len(added) / 50)
    strength = np.clip(np.abs(smooth) / max(np.quantile(np.abs(smooth), 0.99), 1e-12), 0, 1)
    grey = np.asarray(Image.fromarray(pixels).convert("L"), np.float32) / 2 + 127
    colours = np.array([ImageColor.getrgb(COLOURS[name]) for name in ("REAL", "FAKE")])
    share = strength[..., None]
    mixed = (1 - share) * grey[..., None] + share * colours[(smooth > 0).astype(int)]
    buffer = io.BytesIO()
    Image.fromarray(mixed.astype(np.uint8)).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
