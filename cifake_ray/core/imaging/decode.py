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
from io import BytesIO
from typing import TypeVar

import numpy as np
import simplejpeg
from PIL import Image, ImageFile, UnidentifiedImageError

from cifake_ray.core.imaging.containers import name_container
from cifake_ray.core.imaging.jpeg_header import count_scans, estimate_quality, scan_jpeg
from cifake_ray.core.imaging.limits import (
    BoundedReader,
    check_frames,
    count_tiff_pages,
    is_cut_short,
)
from cifake_ray.errors import ImageError

_T = TypeVar("_T")

MAX_IMAGE_BYTES = 64 * 2**20
MAX_IMAGE_PIXELS = 64_000_000
# Each scan of a JPEG visits all its pixels again, at about 0.1 s for 64 million. Encoders write 10
# scans, optimisers up to 64; a file of 400 kB can hold thousands.
MAX_SCANNED_PIXELS = 24 * MAX_IMAGE_PIXELS

# What the web serves and browsers decode, most frequent first, since Pillow tries them in this
# order; TIFF and BMP for archives. JPEG covers MPO (several JPEGs in one file). AVIF is in: sites
# convert uploads to it, and libavif and dav1d are fuzzed as browser code. JPEG 2000 is out: rare on
# the web, and OpenJPEG has a long record of memory errors. So are formats that run programs (EPS,
# WMF) or whose parsers are little used (PCX, TGA, PSD, FLI, ...).
ALLOWED_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "TIFF", "BMP")

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

    - EXIF orientation (or XMP's, where EXIF has none) is applied; unreadable EXIF counts as none.
    - Alpha and transparent colours are composited over white. CMYK, YCCK, YCbCr, LAB, palette,
      1-bit and grey are converted as Pillow does; colour profiles are ignored.
    - 16-bit grey is round(v / 257); 16-bit colour keeps its high byte, as Pillow reads it (at most
      1 from v / 257), and a 16-bit colour key is ignored. 32-bit integers are read as 16-bit if all
      lie in 0..65535, floats as round(255 v) if all lie in 0..1; else decode_failed. Nothing is
      clipped.
    - GIF, WebP, APNG, AVIF, TIFF, MPO: the frame shown without seeking.
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
        detail = f"{type(error).__name__}: {error}"[:200]
        raise ImageError("truncated" if is_truncated else "decode_failed", detail) from error


def _read_header(data: bytes) -> ImageHeader:
    header = scan_jpeg(data)
    quality = estimate_quality(header.luminance_table) if header else None
    if header and not header.is_multi_picture:
        _check_pixels(header.width, header.height)
        mode = _PILLOW_MODES[header.num_components]
        return ImageHeader(header.width, header.height, "JPEG", mode, quality, 1)
    image = _open_image(data)
    width, height = image.size
    if image.format == "TIFF":  # Pillow has swapped them already where the orientation says so
        tags = image.tag_v2  # type: ignore[attr-defined]
        width, height = int(tags[256]), int(tags[257])
        num_frames = count_tiff_pages(data)
    else:
        num_frames = getattr(image, "n_frames", 1)
        check_frames(num_frames)
    return ImageHeader(width, height, str(image.format), image.mode, quality, num_frames)


def _decode_pixels(data: bytes) -> np.ndarray:
    pixels = _decode_fast(data)
    return _decode_slow(data) if pixels is None else pixels


def _decode_fast(data: bytes) -> np.ndarray | None:
    """Decode with libjpeg-turbo alone; None at any failure or doubt."""
    if not data.endswith(b"\xff\xd9"):
        return None
    header = scan_jpeg(data)
    if not header or not header.is_plain_ycbcr or header.width * header.height > MAX_IMAGE_PIXELS:
        return None
    if header.width * header.height * count_scans(data) > MAX_SCANNED_PIXELS:
        return None
    try:
        # Exact DCT and smooth upsampling, as Pillow's defaults.
        pixels: np.ndarray = simplejpeg.decode_jpeg(
            data, fastdct=False, fastupsample=False, strict=True
        )
    except ValueError:  # also for what libjpeg only warns of; Pillow decides
        return None
    return pixels


def _decode_slow(data: bytes) -> np.ndarray:
    """Decode with Pillow, whose errors decide what is wrong with a file."""
    image = _open_image(data)
    if image.format in ("JPEG", "MPO"):
        num_scans, (width, height) = count_scans(data), image.size
        if width * height * num_scans > MAX_SCANNED_PIXELS:
            raise ImageError("decode_failed", f"{num_scans} scans of {width} x {height} pixels")
    return convert_image(image)


def convert_image(image: Image.Image) -> np.ndarray:
    """Return an image opened by Pillow as `decode_image` returns it: upright RGB, uint8[H, W, 3].

    Raises ImageError (decode_failed) for values that have no place in 0..255, and what Pillow
    raises for a broken file.
    """
    image.load()
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


def _convert_to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        key = image.info.get("transparency")
        if isinstance(key, tuple) and max(key) > 255:
            # A 16-bit colour key: Pillow would compare its low bytes with the pixels' high bytes.
            del image.info["transparency"]
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))
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
    return np.repeat(grey[:, :, None], 3, axis=2)


def _open_image(data: bytes) -> ImageFile.ImageFile:
    """Open with Pillow and check the caps. Raises ImageError, or what a parser raises."""
    # A filter on Pillow's modules that stays, and not catch_warnings: that one is not safe in
    # threads. It also keeps DecompressionBombWarning from preceding our own cap.
    if warnings.filters[:1] != [_PILLOW_FILTER]:
        warnings.filterwarnings("ignore", module=r"PIL\.")
    # Other libraries switch it on for training; half an image must never be scored.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        image = Image.open(BoundedReader(data), formats=ALLOWED_FORMATS)
    except UnidentifiedImageError:
        raise _explain_unidentified(data) from None
    _check_pixels(*image.size)
    return image


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_IMAGE_PIXELS:
        raise ImageError("too_many_pixels", f"{width} x {height}, at most {MAX_IMAGE_PIXELS}")


def _explain_unidentified(data: bytes) -> ImageError:
    """Return the error for a broken header of an allowed format, another format or no image."""
    for name in ALLOWED_FORMATS:
        accept = Image.OPEN[name][1]
        if name != "BMP" and accept and accept(data[:16]):  # BM begins many a text
            error = "truncated" if is_cut_short(data) else "decode_failed"
            return ImageError(error, f"UnidentifiedImageError: {name} signature, unreadable header")
    if container := name_container(data):
        return ImageError("not_an_image", container)
    Image.init()
    # Formats without a signature (TGA, ...) would take noise for an image.
    others = [n for n in Image.ID if n not in ALLOWED_FORMATS and Image.OPEN[n][1]]
    try:
        # The first 64 KiB only: some parsers of text formats read line by line to the end.
        other = Image.open(BytesIO(data[: 2**16]), formats=others)
    except (OSError, ValueError):  # UnidentifiedImageError is an OSError
        return ImageError("not_an_image", f"no decoder knows the first bytes {data[:8]!r}")
    allowed = ", ".join(ALLOWED_FORMATS)
    return ImageError("format_not_allowed", f"{other.format}, allowed are {allowed}")
