"""Read headers and upright RGB pixels from encoded bytes: the one decode policy of the project.

`decode_image` and `inspect_image` raise `ImageError`, whose `error` is one of
`core.schema.IMAGE_ERRORS`.
"""

from __future__ import annotations

import logging
import re
import struct
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import simplejpeg
from PIL import Image, ImageFile, ImagePalette, JpegImagePlugin, UnidentifiedImageError

from cifake_ray.core.imaging.color_profile import convert_to_srgb, is_srgb
from cifake_ray.core.imaging.formats import ALLOWED_FORMATS, explain_unidentified
from cifake_ray.core.imaging.jpeg_header import count_scans, estimate_quality, scan_jpeg
from cifake_ray.core.imaging.limits import (
    BoundedReader,
    check_frames,
    count_tiff_pages,
    is_cut_short,
)
from cifake_ray.core.imaging.png_chunks import drop_text
from cifake_ray.core.imaging.tiff_pages import find_page, is_tiff, put_first
from cifake_ray.core.imaging.tiff_pixels import (
    COLOR_MAP,
    TiffLayout,
    has_8_bit_color_map,
    read_pixels,
)
from cifake_ray.errors import ImageError

_T = TypeVar("_T")

MAX_IMAGE_BYTES = 64 * 2**20
MAX_IMAGE_PIXELS = 64_000_000
# Larger JPEGs are decoded at half size, which needs the memory of one of MAX_IMAGE_PIXELS. If they
# have several scans, libjpeg keeps the coefficients of all pixels as well.
MAX_JPEG_PIXELS = 4 * MAX_IMAGE_PIXELS
MAX_PROGRESSIVE_PIXELS = 2 * MAX_IMAGE_PIXELS
# Each scan of a JPEG visits all its pixels again, at about 0.1 s for 64 million. Encoders write 10
# scans, optimisers up to 64; a file of 400 kB can hold thousands.
MAX_SCANNED_PIXELS = 24 * MAX_IMAGE_PIXELS

# To be raised when the pixels of a file change: decoded images of before are not used again.
DECODE_POLICY = 2

_PILLOW_MODES = {1: "L", 3: "RGB", 4: "CMYK"}
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
_XMP = ("xmp", "XML:com.adobe.xmp")  # keys of Image.info
_PILLOW_FILTER = ("ignore", None, Warning, re.compile(r"PIL\."), 0)

# Without a handler, Pillow's logs about broken files would go to stderr.
logging.getLogger("PIL").addHandler(logging.NullHandler())


@dataclass(frozen=True)
class ImageHeader:
    """The header of one image."""

    width: int  # pixels, as stored: before EXIF orientation
    height: int  # pixels, as stored: before EXIF orientation
    format: str  # Pillow's name: one of ALLOWED_FORMATS or MPO
    mode: str  # Pillow's mode of the first frame: RGB, L, P, RGBA, CMYK, I;16, ...
    jpeg_quality: int | None  # nearest IJG quality 1..100, see `estimate_quality`; None if no JPEG
    num_frames: int  # frames or pages; 1 for stills


def inspect_image(data: bytes) -> ImageHeader:
    """Read the header; no pixel is decoded, so a truncated or corrupt body is not noticed.

    Raises ImageError: empty, too_large, too_many_pixels, not_an_image, format_not_allowed,
    truncated (inside the header), decode_failed.
    """
    return _call_decoder(_read_header, data)


def decode_image(data: bytes) -> np.ndarray:
    """Decode the first frame to upright RGB: uint8[H, W, 3], 0..255, C-contiguous, writable.

    - EXIF orientation (in JPEG XMP's, where EXIF has none) is applied; unreadable EXIF counts as
      none.
    - Colours with an embedded ICC profile are converted to sRGB (relative colorimetric, black point
      compensation) unless that moves none by more than 2; a profile that is broken or for other
      colours is ignored. Without one, CMYK, YCCK, YCbCr, LAB, palette, 1-bit and grey are converted
      as Pillow does.
    - Alpha and transparent colours are composited over white. A BMP without one opaque pixel has no
      alpha.
    - 16-bit grey is round(v / 257); 16-bit colour keeps its high byte, as Pillow reads it (at most
      1 from v / 257), and a 16-bit colour key is ignored. 32-bit integers are read as 16-bit if all
      lie in 0..65535, floats as round(255 v) if all lie in 0..1; else decode_failed. Nothing is
      clipped.
    - GIF, WebP, APNG, AVIF, HEIF, MPO: the frame shown without seeking. TIFF: the first page that
      is no reduced copy of another; raw files are refused.
    - JPEGs of more than MAX_IMAGE_PIXELS, up to MAX_JPEG_PIXELS, are decoded at half size.
    - The caps on bytes and pixels are checked from the header, before anything is decoded.

    Raises ImageError: empty, too_large, too_many_pixels, not_an_image, format_not_allowed,
    truncated, decode_failed. `truncated`: decoding failed and the container's own end is missing. A
    file that lacks only what follows its last pixel (PNG's IEND, a later frame) decodes.
    """
    return _call_decoder(_decode_pixels, data)


def map_images(
    function: Callable[[bytes], _T], images: Iterable[bytes | ImageError]
) -> list[_T | ImageError]:
    """Call a function on each image; an ImageError, given or raised, is the result of its image."""
    results: list[_T | ImageError] = []
    for image in images:
        try:
            results.append(image if isinstance(image, ImageError) else function(image))
        except ImageError as error:
            results.append(error)
    return results


def _call_decoder(decode: Callable[[bytes], _T], data: bytes) -> _T:
    """Call a decoder; every exception becomes an ImageError."""
    if not data:
        raise ImageError("empty", "zero bytes")
    if len(data) > MAX_IMAGE_BYTES:
        raise ImageError("too_large", f"{len(data)} bytes, at most {MAX_IMAGE_BYTES}")
    try:
        return decode(data)
    except ImageError:
        raise
    except Image.DecompressionBombError:
        raise ImageError("too_many_pixels", f"more than {MAX_IMAGE_PIXELS}") from None
    except Exception as error:
        # The one broad except of the project: decoders of untrusted bytes raise anything
        # (SyntaxError, struct.error, KeyError, ...), and no image may end a run.
        is_truncated = is_cut_short(data) or "truncat" in str(error).lower()
        detail = f"{type(error).__name__}: {error}"[:200].strip()
        raise ImageError("truncated" if is_truncated else "decode_failed", detail) from error


def _read_header(data: bytes) -> ImageHeader:
    header = scan_jpeg(data)
    quality = estimate_quality(header.luminance_table) if header else None
    if header and not header.is_multi_picture:
        _check_pixels(header.width, header.height, MAX_JPEG_PIXELS)
        mode = _PILLOW_MODES[header.num_components]
        return ImageHeader(header.width, header.height, "JPEG", mode, quality, 1)
    if is_tiff(data):
        return _read_tiff_header(data)
    image = _open_image(data)
    width, height = image.size
    num_frames = getattr(image, "n_frames", 1)
    check_frames(num_frames)
    return ImageHeader(width, height, str(image.format), image.mode, quality, num_frames)


def _read_tiff_header(data: bytes) -> ImageHeader:
    page = find_page(data)
    layout = TiffLayout(page)
    _check_pixels(layout.width, layout.height, MAX_IMAGE_PIXELS)
    try:
        mode = _open_image(put_first(page)).mode
    except ImageError:
        if not layout.is_known:
            raise
        mode = layout.mode
    return ImageHeader(layout.width, layout.height, "TIFF", mode, None, count_tiff_pages(data))


def _decode_pixels(data: bytes) -> np.ndarray:
    pixels = _decode_fast(data)
    return _decode_slow(data) if pixels is None else pixels


def _decode_fast(data: bytes) -> np.ndarray | None:
    """Decode with libjpeg-turbo alone; None at any failure or doubt."""
    if not data.endswith(b"\xff\xd9"):
        return None
    header = scan_jpeg(data)
    if not header or not header.is_plain_ycbcr or not is_srgb(header.profile):
        return None
    if _explain_costly_jpeg(data, header.width, header.height):
        return None
    options = {}
    if header.width * header.height > MAX_IMAGE_PIXELS:
        sides = {"min_width": -(-header.width // 2), "min_height": -(-header.height // 2)}
        options = {"min_factor": 2, **sides}
    try:
        # Exact DCT and smooth upsampling, as Pillow's defaults.
        pixels: np.ndarray = simplejpeg.decode_jpeg(
            data, fastdct=False, fastupsample=False, strict=True, **options
        )
    except ValueError:  # also for what libjpeg only warns of; Pillow decides
        return None
    return pixels


def _decode_slow(data: bytes) -> np.ndarray:
    """Decode with Pillow, whose errors decide what is wrong with a file."""
    if is_tiff(data):
        return _decode_tiff(data)
    image = _open_image(data)
    if image.format in ("JPEG", "MPO"):
        width, height = image.size
        if error := _explain_costly_jpeg(data, width, height):
            raise error
        if width * height > MAX_IMAGE_PIXELS:
            image.draft(image.mode, (width // 2, height // 2))
    return convert_image(image)


def _decode_tiff(data: bytes) -> np.ndarray:
    page = find_page(data)
    layout = TiffLayout(page)
    _check_pixels(layout.width, layout.height, MAX_IMAGE_PIXELS)
    if layout.is_known and layout.is_misread:
        return convert_image(read_pixels(layout))
    try:
        image = _open_image(put_first(page))
    except ImageError:
        if not layout.is_known:
            raise
        return convert_image(read_pixels(layout))
    if image.mode in ("P", "PA") and has_8_bit_color_map(page):
        image.palette = ImagePalette.raw("RGB;L", bytes(image.tag_v2[COLOR_MAP]))  # type: ignore[attr-defined]
    try:
        return convert_image(image)
    except OSError as error:  # "decoder error -2"
        raise OSError(f"{error} ({layout})") from error


def _explain_costly_jpeg(data: bytes, width: int, height: int) -> ImageError | None:
    """Return the error for a JPEG that costs too much memory or time."""
    if width * height > MAX_JPEG_PIXELS:
        return ImageError("too_many_pixels", f"{width} x {height}, at most {MAX_JPEG_PIXELS}")
    num_scans = count_scans(data)
    if num_scans > 1 and width * height > MAX_PROGRESSIVE_PIXELS:
        detail = f"{width} x {height} in {num_scans} scans, at most {MAX_PROGRESSIVE_PIXELS}"
        return ImageError("too_many_pixels", detail)
    if width * height * num_scans > MAX_SCANNED_PIXELS:
        return ImageError("decode_failed", f"{num_scans} scans of {width} x {height} pixels")
    return None


def convert_image(image: Image.Image) -> np.ndarray:
    """Return an image opened by Pillow as `decode_image` returns it: upright RGB, uint8[H, W, 3].

    Raises ImageError (decode_failed) for values that have no place in 0..255, and what Pillow
    raises for a broken file.
    """
    _ignore_xmp(image)  # Pillow turns a TIFF while it loads it
    image.load()
    _ignore_xmp(image)
    pixels = _convert_to_rgb(image)
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except (SyntaxError, struct.error, ValueError, TypeError, OSError):
        orientation = 1
    swap_axes, flip_rows, flip_columns = _UPRIGHT.get(orientation, (False, False, False))
    if swap_axes:
        pixels = pixels.swapaxes(0, 1)
    pixels = pixels[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]
    return np.ascontiguousarray(pixels)


def _ignore_xmp(image: Image.Image) -> None:
    """Forget an orientation in XMP, which only readers of JPEG apply."""
    if image.format not in ("JPEG", "MPO"):
        for key in _XMP:
            image.info.pop(key, None)


def _convert_to_rgb(image: Image.Image) -> np.ndarray:
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
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


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


def _open_image(data: bytes) -> ImageFile.ImageFile:
    """Open with Pillow and check the caps. Raises ImageError, or what a parser raises."""
    # A filter on Pillow's modules that stays, and not catch_warnings: that one is not safe in
    # threads. It also keeps DecompressionBombWarning from preceding our own cap.
    if warnings.filters[:1] != [_PILLOW_FILTER]:
        warnings.filterwarnings("ignore", module=r"PIL\.")
    # Other libraries switch it on for training; half an image must never be scored.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    profile = None
    if data.startswith(b"\x89PNG"):
        data, profile = drop_text(data)
    try:
        image = Image.open(BoundedReader(data), formats=ALLOWED_FORMATS)
    except UnidentifiedImageError:
        raise explain_unidentified(data, MAX_IMAGE_PIXELS) from None
    except Image.DecompressionBombError:
        if not data.startswith(b"\xff\xd8"):
            raise
        image = JpegImagePlugin.jpeg_factory(BoundedReader(data))
    if profile:
        image.info["icc_profile"] = profile
    is_jpeg = image.format in ("JPEG", "MPO")
    _check_pixels(*image.size, MAX_JPEG_PIXELS if is_jpeg else MAX_IMAGE_PIXELS)
    return image


def _check_pixels(width: int, height: int, most: int) -> None:
    if width * height > most:
        raise ImageError("too_many_pixels", f"{width} x {height}, at most {most}")
