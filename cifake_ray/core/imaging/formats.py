"""Define the formats that are decoded, and name what other files are."""

from __future__ import annotations

import re
import struct
from io import BytesIO

import pillow_heif
from PIL import Image

from cifake_ray.core.imaging.containers import name_container
from cifake_ray.core.imaging.limits import is_cut_short
from cifake_ray.core.imaging.tiff_pages import find_page, is_tiff
from cifake_ray.core.imaging.tiff_pixels import TiffLayout
from cifake_ray.errors import ImageError

# What the web serves and browsers decode, most frequent first, since Pillow tries them in this
# order; TIFF and BMP for archives. JPEG covers MPO (several JPEGs in one file). AVIF is in: sites
# convert uploads to it, and libavif and dav1d are fuzzed as browser code. JPEG 2000 is out: rare on
# the web, and OpenJPEG has a long record of memory errors. So are formats that run programs (EPS,
# WMF) or whose parsers are little used (PCX, TGA, PSD, FLI, ...). HEIF is what telephones write.
ALLOWED_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "HEIF", "TIFF", "BMP")

_HEAD_BYTES = 4096

# Pictures and films; Pillow names further ones.
_FOREIGN = {
    "JPEG XL": rb"\xff\x0a|\x00\x00\x00\x0cJXL \r\n\x87\n",
    "JPEG XR": rb"II\xbc\x01",
    "CR3 (camera raw)": rb".{4}ftypcrx ",
    "RAF (camera raw)": rb"FUJIFILMCCD-RAW",
    "ORF (camera raw)": rb"IIR[OS]\x08|MMOR",
    "RW2 (camera raw)": rb"IIU\x00",
    "X3F (camera raw)": rb"FOVb",
    "MRW (camera raw)": rb"\x00MRM",
    "SVG": (
        rb"(?:\xef\xbb\xbf)?(?:\s++|<\?.*?\?>|<!--.*?-->|<!DOCTYPE\s+svg[^>\[]*(?:\[.*?\]\s*)?>)*+"
        rb"<(?:svg:)?svg[\s>/]"
    ),
    "PDF": rb"\s{0,4}%PDF-",
    "PSD": rb"8BPS",
    "XCF": rb"gimp xcf",
    "OpenEXR": rb"v/1\x01",
    "Radiance HDR": rb"#\?R(?:ADIANC|GB)E",
    "DICOM": rb".{128}DICM",
    "DjVu": rb"AT&TFORM",
    "Matroska or WebM video": rb"\x1aE\xdf\xa3",
    "AVI video": rb"RIFF.{4}AVI ",
    "MPEG video": rb"\x00\x00\x01[\xba\xb3]|G.{187}G.{187}G",
    "Flash video": rb"FLV\x01",
    "Windows Media video": rb"0&\xb2u\x8ef\xcf\x11",
    "Ogg video": rb"OggS",
    "MP4 or QuickTime video": rb".{4}(?:ftyp|moov|mdat.{8}|wide)[\x00-\x7f]{4}",
}
# A worker has one core. Only the picture itself is read.
pillow_heif.register_heif_opener(
    decode_threads=1, thumbnails=False, depth_images=False, aux_images=False
)


def explain_unidentified(data: bytes, max_pixels: int) -> ImageError:
    """Return the error for a broken header of an allowed format, another format or no image."""
    for size in re.findall(rb"ispe\0{4}(.{8})", data[: 2**16], re.DOTALL):  # of AVIF and HEIF
        width, height = struct.unpack(">II", size)
        if data[4:8] == b"ftyp" and width * height > max_pixels:
            return ImageError("too_many_pixels", f"{width} x {height}, at most {max_pixels}")
    for name in ALLOWED_FORMATS:
        accept = Image.OPEN[name][1]
        if name == "AVIF" and b"avi" not in data[8:64]:
            continue  # Pillow accepts all of its family
        if name != "BMP" and accept and accept(data[:16]):  # BM begins many a text
            if is_cut_short(data):
                return ImageError("truncated", f"{name} signature, unreadable header")
            detail = f"unreadable header, or a layout that is not read ({_describe(data)})"
            return ImageError("decode_failed", f"{name} signature, {detail}")
    allowed = f"allowed are {', '.join(ALLOWED_FORMATS)}"
    if container := name_container(data):
        return ImageError("not_an_image", container)
    if foreign := _find_name(_FOREIGN, data):
        return ImageError("format_not_allowed", f"{foreign}, {allowed}")
    Image.init()
    # Formats without a signature (TGA, ...) would take noise for an image.
    others = [n for n in Image.ID if n not in ALLOWED_FORMATS and Image.OPEN[n][1]]
    try:
        # The first 64 KiB only: some parsers of text formats read line by line to the end.
        other = Image.open(BytesIO(data[: 2**16]), formats=others)
    except (OSError, ValueError):  # UnidentifiedImageError is an OSError
        return ImageError("not_an_image", f"no decoder knows the first bytes {data[:8]!r}")
    return ImageError("format_not_allowed", f"{other.format}, {allowed}")


def _describe(data: bytes) -> str:
    try:
        return str(TiffLayout(find_page(data))) if is_tiff(data) else repr(data[:16])
    except (struct.error, ImageError, IndexError):
        return repr(data[:16])


def _find_name(patterns: dict[str, bytes], data: bytes) -> str | None:
    head = data[:_HEAD_BYTES]
    return next((name for name, p in patterns.items() if re.match(p, head, re.DOTALL)), None)
