"""Convert colours to sRGB by the ICC profile that an image carries.

Little CMS does it, by way of Pillow. Transforms are cached, since a data set has few profiles.
"""

from __future__ import annotations

from functools import lru_cache
from io import BytesIO

import numpy as np
from PIL import Image, ImageCms

MAX_PROFILE_BYTES = 4 * 2**20  # those of printing presses have up to 3 MB
MAX_SRGB_DIFFERENCE = 2  # of 255: cameras and editors round sRGB differently

# Colours of which the profile speaks, by mode; alpha and palettes are put aside.
_COLORS = {"1": "L", "L": "L", "LA": "L", "CMYK": "CMYK", "LAB": "LAB"}


def is_srgb(profile: bytes) -> bool:
    """Return whether RGB pixels with this profile stay as they are: sRGB, none, or unusable."""
    return not profile or _find_transform(profile, "RGB") is None


def convert_to_srgb(image: Image.Image) -> Image.Image:
    """Return an image in sRGB, with its alpha; the image itself where its colours stay."""
    profile = image.info.get("icc_profile")
    mode = _COLORS.get(image.mode, "RGB")
    if not isinstance(profile, bytes) or not profile:
        return image
    transform = _find_transform(profile, mode)
    if transform is None:
        return image
    converted = transform.apply(image if image.mode == mode else image.convert(mode))
    if image.has_transparency_data:
        converted.putalpha(image.convert("RGBA").getchannel("A"))
    return converted


@lru_cache(maxsize=16)
def _find_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    if len(profile) > MAX_PROFILE_BYTES:
        return None
    try:
        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return None  # broken, or for colours of another kind
    if mode not in ("L", "RGB"):
        return transform
    steps = np.arange(0, 256, 15, dtype=np.uint8)
    grid = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(-1, len(steps), 3)
    if mode == "L":
        grid = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    colors = Image.fromarray(grid)
    converted = np.asarray(transform.apply(colors.convert(mode)))
    difference = np.abs(converted.astype(int) - grid).max()
    return transform if difference > MAX_SRGB_DIFFERENCE else None
