"""Read how a file was encoded and what it carries beside its pixels, without decoding them."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass

from PIL import JpegImagePlugin

from cifake_ray.core.imaging.decode import open_image
from cifake_ray.core.imaging.limits import MAX_READS
from cifake_ray.errors import ImageError

_SAMPLINGS = {"2x2 1x1 1x1": "4:2:0", "2x1 1x1 1x1": "4:2:2", "1x1 1x1 1x1": "4:4:4"}
_ENTRIES = ("exif", "xmp", "icc", "text")
_XMP_KEYWORD = b"XML:com.adobe.xmp\0"
_WEBP_CODECS = {b"VP8 ": "lossy", b"VP8L": "lossless"}


@dataclass(frozen=True)
class EncodingFacts:
    """What an encoder has left in a file; the sizes are those of whole entries in bytes."""

    quantization: str | None = None  # digest of a JPEG's tables; of WebP lossy or lossless
    subsampling: str | None = None  # of a JPEG: 4:2:0, 4:2:2, 4:4:4, or factors by component
    is_progressive: bool = False
    exif_bytes: int = 0
    xmp_bytes: int = 0
    icc_bytes: int = 0
    text_bytes: int = 0  # comments, and PNG's text chunks


def read_encoding(data: bytes) -> EncodingFacts:
    """Return the facts of an image that decodes; those of a container that is broken are empty."""
    if data.startswith(b"\x89PNG"):
        return _read_png(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _read_webp(data)
    try:
        image = open_image(data)
    except ImageError:  # such as a TIFF that only our own reader understands
        return EncodingFacts()
    tables = subsampling = None
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        tables = hashlib.sha256(repr(sorted(image.quantization.items())).encode()).hexdigest()[:12]
        factors = " ".join(f"{layer[1]}x{layer[2]}" for layer in image.layer)
        subsampling = _SAMPLINGS.get(factors, factors)
    found = (image.info.get(name) for name in ("exif", "xmp", "icc_profile", "comment"))
    sizes = (len(value) if isinstance(value, bytes | str) else 0 for value in found)
    return EncodingFacts(tables, subsampling, bool(image.info.get("progressive")), *sizes)


def _read_png(data: bytes) -> EncodingFacts:
    sizes, start = Counter[str](), 8
    for _ in range(MAX_READS):
        length, name = int.from_bytes(data[start : start + 4], "big"), data[start + 4 : start + 8]
        if name in (b"", b"IEND"):
            break
        if name == b"iTXt" and data.startswith(_XMP_KEYWORD, start + 8):
            sizes["xmp"] += length
        elif name in (b"tEXt", b"zTXt", b"iTXt"):
            sizes["text"] += length
        sizes["exif"] += length * (name == b"eXIf")
        sizes["icc"] += length * (name == b"iCCP")
        start += length + 12
    return EncodingFacts(None, None, data[28:29] == b"\1", *(sizes[name] for name in _ENTRIES))


def _read_webp(data: bytes) -> EncodingFacts:
    sizes, start, codec = Counter[str](), 12, None
    for _ in range(MAX_READS):
        name, length = (
            data[start : start + 4],
            int.from_bytes(data[start + 4 : start + 8], "little"),
        )
        if not name:
            break
        if name == b"ANMF":  # a frame: 16 bytes, then chunks of its own
            name = data[start + 24 : start + 28]
        codec = codec or _WEBP_CODECS.get(name)
        for entry, chunk in zip(_ENTRIES, (b"EXIF", b"XMP ", b"ICCP"), strict=False):
            sizes[entry] += length * (name == chunk)
        start += 8 + length + length % 2
    return EncodingFacts(codec, None, False, *(sizes[name] for name in _ENTRIES))
