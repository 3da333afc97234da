"""Turn images opened by Pillow to upright RGB."""

from __future__ import annotations

import re
import struct
import warnings

import numpy as np
from PIL import Image

from cifake_ray.core.imaging.color_profile import convert_to_srgb
from cifake_ray.core.imaging.jpeg_header import JpegHeader
from cifake_ray.errors import ImageError

# EXIF orientation -> (swap the axes, then flip rows, flip columns). Source: Exif 2.32, tag 0x0112.
_UPRIGHT = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}
_ORIENTATION_TAG = 0x0112
_EXIF_ERRORS = (SyntaxError, struct.error, ValueError, TypeError, OSError)
_XMP = ("xmp", "XML:com.adobe.xmp")  # keys of Image.info
_PILLOW_FILTER = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


def convert_image(image: Image.Image) -> np.ndarray:
    """Return an image opened by Pillow as `decode_image` returns it: upright RGB, uint8[H, W, 3].

    Raises what `load_rgb` raises.
    """
    rgb, orientation = load_rgb(image)
    return turn_upright(np.array(rgb), orientation)


def load_rgb(image: Image.Image) -> tuple[Image.Image, int]:
    """Return an image opened by Pillow as stored, in RGB, and its EXIF orientation.

    Raises ImageError (decode_failed) for values that have no place in 0..255, and what Pillow
    raises for a broken file.
    """
    _ignore_xmp(image)  # Pillow turns a TIFF while it loads it
    image.load()
    _ignore_xmp(image)
    rgb = _convert_to_rgb(image)
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except _EXIF_ERRORS:
        orientation = 1
    return rgb, orientation


def read_orientation(header: JpegHeader) -> int | None:
    """Return the EXIF orientation of a plain JPEG, as `load_rgb` does; None in doubt."""
    orientation = None
    if header.exif:
        silence_pillow()
        exif = Image.Exif()
        try:
            exif.load(header.exif)
            orientation = exif.get(_ORIENTATION_TAG)
        except _EXIF_ERRORS:
            return None
    if orientation is None and header.has_xmp:
        return None
    return 1 if orientation is None else orientation


def turn_upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Return contiguous pixels turned by their EXIF orientation; the same array if it is 1."""
    if orientation not in _UPRIGHT:
        return pixels
    swap_axes, flip_rows, flip_columns = _UPRIGHT[orientation]
    if swap_axes:
        pixels = pixels.swapaxes(0, 1)
    pixels = pixels[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]
    return np.ascontiguousarray(pixels)


def silence_pillow() -> None:
    """Keep Pillow's warnings about broken files from stderr.

    By a filter that stays, and not catch_warnings: that one is not safe in threads.
    """
    if warnings.filters[:1] != [_PILLOW_FILTER]:
        warnings.filterwarnings("ignore", module=r"PIL\.")


def _ignore_xmp(image: Image.Image) -> None:
    """Forget an orientation in XMP, which only readers of JPEG apply."""
    if image.format not in ("JPEG", "MPO"):
        for key in _XMP:
            image.info.pop(key, None)


def _convert_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _scale_deep_grey(image)
    if image.format == "BMP" and image.mode == "RGBA" and not image.getchannel("A").getbbox():
        image = image.convert("RGB")
    key = image.info.get("transparency")
    if isinstance(key, tuple) and max(key) > 255:
        # A 16-bit colour key: Pillow would compare its low bytes with the pixels' high bytes.
        del image.info["transparency"]
    image = convert_to_srgb(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def _scale_deep_grey(image: Image.Image) -> Image.Image:
    """Return 8-bit grey, white where the colour key says so. Raises ImageError (decode_failed)."""
    values = np.asarray(image)
    highest = 1 if image.mode == "F" else 65535
    if not ((values >= 0) & (values <= highest)).all():  # NaN fails too
        raise ImageError("decode_failed", f"mode {image.mode} pixels outside 0..{highest}")
    if image.mode == "F":
        grey = np.rint(values * 255).astype(np.uint8)
    else:
        grey = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
        key = image.info.get("transparency")
        if isinstance(key, int):
            grey[values == key] = 255
    scaled = Image.fromarray(grey)
    scaled.info["icc_profile"] = image.info.get("icc_profile")
    return scaled
