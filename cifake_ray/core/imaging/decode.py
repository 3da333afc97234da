"""Read headers and upright RGB pixels from encoded bytes: the one decode policy of the project.

`decode_image` and `inspect_image` raise `ImageError`, whose `error` is one of
`core.schema.IMAGE_ERRORS`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
import simplejpeg
from PIL import Image, ImageFile, ImagePalette, JpegImagePlugin, UnidentifiedImageError

from cifake_ray.core.imaging.color_profile import is_srgb
from cifake_ray.core.imaging.formats import ALLOWED_FORMATS, explain_unidentified
from cifake_ray.core.imaging.jpeg_header import count_scans, estimate_quality, scan_jpeg
from cifake_ray.core.imaging.limits import (
    BoundedReader,
    check_frames,
    count_tiff_pages,
    is_cut_short,
)
from cifake_ray.core.imaging.pillow_pixels import (
    convert_image,
    load_rgb,
    read_orientation,
    silence_pillow,
    turn_upright,
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


class StoredPixels(NamedTuple):
    """A decoded image, before its EXIF orientation is applied."""

    pixels: np.ndarray | Image.Image  # RGB
    orientation: int
    # Width and height of a JPEG that was decoded at a smaller scale, in pixels of that scale; they
    # may end within the last column and row. None if it was not.
    scaled: tuple[float, float] | None = None

    def to_array(self) -> np.ndarray:
        """Return the image upright: uint8[H, W, 3], C-contiguous, writable."""
        pixels = self.pixels if isinstance(self.pixels, np.ndarray) else np.array(self.pixels)
        return turn_upright(pixels, self.orientation)


class _File:
    """The bytes of an image, and its header, of which each part is read once."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.jpeg = scan_jpeg(data)

    @cached_property
    def tiff(self) -> TiffLayout | None:
        return TiffLayout(find_page(self.data)) if is_tiff(self.data) else None

    @cached_property
    def image(self) -> ImageFile.ImageFile:
        """As Pillow opens it; of a TIFF the page that is decoded."""
        return _open_image(put_first(self.tiff.page) if self.tiff else self.data)


def inspect_image(data: bytes) -> ImageHeader:
    """Read the header; no pixel is decoded, so a truncated or corrupt body is not noticed.

    Raises ImageError: empty, too_large, too_many_pixels, not_an_image, format_not_allowed,
    truncated (inside the header), decode_failed.
    """
    return call_decoder(lambda data: _read_header(_File(data)), data)


def read_info(data: bytes) -> dict[str | tuple[int, int], Any]:
    """Return what Pillow finds beside the pixels: exif, xmp, ... Raises ImageError."""
    return call_decoder(lambda data: _open_image(data).info, data)


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

    return decode_stored(data).to_array()


def decode_stored(data: bytes, min_side: int | None = None) -> StoredPixels:
    """Decode as `decode_image` does, but do not turn the image.

    With `min_side` JPEGs up to 4:1 are decoded at the smallest of the scales 1/2, 1/4 and 1/8 that
    leaves the shorter side so many pixels.
    """
    return call_decoder(lambda data: _decode(_File(data), min_side), data)


def decode_with_header(data: bytes, min_side: int | None) -> tuple[ImageHeader, StoredPixels]:
    """Return and raise what `inspect_image` and then `decode_stored` do, in one pass."""

    def decode(data: bytes) -> tuple[ImageHeader, StoredPixels]:
        file = _File(data)
        return _read_header(file), _decode(file, min_side)

    return call_decoder(decode, data)


def open_image(data: bytes) -> ImageFile.ImageFile:
    """Open with Pillow; no pixel is decoded. Raises ImageError."""
    return call_decoder(_open_image, data)


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


def call_decoder(decode: Callable[[bytes], _T], data: bytes) -> _T:
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


def _read_header(file: _File) -> ImageHeader:
    header = file.jpeg
    quality = estimate_quality(header.luminance_table) if header else None
    if header and not header.is_multi_picture:
        _check_pixels(header.width, header.height, MAX_JPEG_PIXELS)
        mode = _PILLOW_MODES[header.num_components]
        return ImageHeader(header.width, header.height, "JPEG", mode, quality, 1)
    if file.tiff:
        return _read_tiff_header(file, file.tiff)
    image = file.image
    width, height = image.size
    num_frames = getattr(image, "n_frames", 1)
    check_frames(num_frames)
    if image.format == "GIF":  # its frames were sought to be counted
        del file.image
    return ImageHeader(width, height, str(image.format), image.mode, quality, num_frames)


def _read_tiff_header(file: _File, layout: TiffLayout) -> ImageHeader:
    _check_pixels(layout.width, layout.height, MAX_IMAGE_PIXELS)
    try:
        mode = file.image.mode
    except ImageError:
        if not layout.is_known:
            raise
        mode = layout.mode
    num_pages = count_tiff_pages(file.data)
    return ImageHeader(layout.width, layout.height, "TIFF", mode, None, num_pages)


def _decode(file: _File, min_side: int | None) -> StoredPixels:
    return _decode_fast(file, min_side) or _decode_slow(file, min_side)


def _decode_fast(file: _File, min_side: int | None) -> StoredPixels | None:
    """Decode with libjpeg-turbo alone; None at any failure or doubt."""
    if not file.data.endswith(b"\xff\xd9"):
        return None
    header = file.jpeg
    if not header or not header.is_plain_ycbcr or not is_srgb(header.profile):
        return None
    width, height = header.width, header.height
    orientation = read_orientation(header)
    if orientation is None or _explain_costly_jpeg(file.data, width, height):
        return None
    factor, scaled = _choose_scale(width, height, min_side)
    options = {}
    if factor > 1:
        sides = {"min_width": -(-width // factor), "min_height": -(-height // factor)}
        options = {"min_factor": factor, **sides}
    try:
        # Exact DCT and smooth upsampling, as Pillow's defaults.
        pixels: np.ndarray = simplejpeg.decode_jpeg(
            file.data, fastdct=False, fastupsample=False, strict=True, **options
        )
    except ValueError:  # also for what libjpeg only warns of; Pillow decides
        return None
    return StoredPixels(pixels, orientation, scaled)


def _decode_slow(file: _File, min_side: int | None) -> StoredPixels:
    """Decode with Pillow, whose errors decide what is wrong with a file."""
    if file.tiff:
        return StoredPixels(_decode_tiff(file, file.tiff), 1)
    image, scaled = file.image, None
    if image.format in ("JPEG", "MPO"):
        width, height = image.size
        if error := _explain_costly_jpeg(file.data, width, height):
            raise error
        factor, scaled = _choose_scale(width, height, min_side)
        if factor > 1:
            image.draft(image.mode, (width // factor, height // factor))
    return StoredPixels(*load_rgb(image), scaled)


def _choose_scale(
    width: int, height: int, min_side: int | None
) -> tuple[int, tuple[float, float] | None]:
    """Return by what a JPEG's sides are divided, and `StoredPixels.scaled`."""
    factor, short = 1, min(width, height)
    if min_side and max(width, height) <= 4 * short:
        factor = next((factor for factor in (8, 4, 2) if short >= factor * min_side), 1)
    scaled = None if factor == 1 else (width / factor, height / factor)
    if width * height > MAX_IMAGE_PIXELS:
        factor = max(factor, 2)
    return factor, scaled


def _decode_tiff(file: _File, layout: TiffLayout) -> np.ndarray:
    _check_pixels(layout.width, layout.height, MAX_IMAGE_PIXELS)
    if layout.is_known and layout.is_misread:
        return convert_image(read_pixels(layout))
    try:
        image = file.image
    except ImageError:
        if not layout.is_known:
            raise
        return convert_image(read_pixels(layout))
    if image.mode in ("P", "PA") and has_8_bit_color_map(layout.page):
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


def _open_image(data: bytes) -> ImageFile.ImageFile:
    """Open with Pillow and check the caps. Raises ImageError, or what a parser raises."""
    silence_pillow()  # also of DecompressionBombWarning, which would precede our own cap
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
