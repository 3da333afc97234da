"""Find the metadata of an image where its format keeps it, without decoding a pixel.

Everything that is kept is bounded, whatever lengths the file claims: see the limits below.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from cifake_ray.core.imaging.decode import read_info
from cifake_ray.core.imaging.jpeg_header import iterate_segments
from cifake_ray.core.imaging.limits import MAX_READS
from cifake_ray.core.imaging.png_chunks import MAX_EXIF_BYTES, decompress_head, iterate_chunks
from cifake_ray.core.imaging.tiff_pages import TiffPage, is_tiff
from cifake_ray.core.provenance.c2pa import is_c2pa_store
from cifake_ray.errors import ImageError

MAX_XMP_BYTES = 2**20
MAX_TEXT_BYTES = 2**16  # of one text of a PNG; more of it is not looked at
MAX_STORE_BYTES = 16 * 2**20  # of a C2PA manifest store, whose thumbnails take megabytes

# Texts of a PNG that generators write, and the one of the label of TC260.
SETTINGS_KEYS = ("parameters", "prompt", "workflow", "sd-metadata", "invokeai_metadata")
PROGRAM_KEYS = ("Software", "Source")
FREE_TEXT_KEYS = ("Comment", "Description")
TC260_KEY = "AIGC"
_KEYS = {*SETTINGS_KEYS, *PROGRAM_KEYS, *FREE_TEXT_KEYS, TC260_KEY}

_XMP_KEY = "XML:com.adobe.xmp"
_XMP_SEGMENT = b"http://ns.adobe.com/xap/1.0/\0"
_EXIF_HEAD = b"Exif\0\0"
# Source: C2PA 2.2, section A.5; TIFF tags: XMP part 3 and C2PA, section A.3.
_C2PA_UUID = bytes.fromhex("d8fec3d61b0e483c92975828877ec481")
_TIFF_XMP, _TIFF_C2PA = 700, 52545


@dataclass
class Metadata:
    """What was found in an image; empty where there is none."""

    exif: bytes = b""  # a TIFF of its own; of a TIFF the file itself
    xmp: bytes = b""
    texts: dict[str, str] = field(default_factory=dict)  # of a PNG, by key
    c2pa: bytes | None = b""  # the manifest store; None in a format where it is not looked for
    unread: set[str] = field(default_factory=set)  # exif, xmp, c2pa, container: too large or broken

    def keep_exif(self, exif: bytes) -> None:
        exif = exif.removeprefix(_EXIF_HEAD)
        if len(exif) > MAX_EXIF_BYTES:
            self.unread.add("exif")
        else:
            self.exif = self.exif or exif

    def keep_xmp(self, xmp: bytes, is_whole: bool = True) -> None:
        if len(xmp) > MAX_XMP_BYTES or not is_whole:
            self.unread.add("xmp")
        self.xmp = self.xmp or xmp[:MAX_XMP_BYTES]

    def keep_c2pa(self, store: bytes, size: int | None = None) -> None:
        """Keep a manifest store, or the head of one of `size` bytes; other bytes are left."""
        if not self.c2pa and is_c2pa_store(store):
            if (size or len(store)) > MAX_STORE_BYTES:
                self.unread.add("c2pa")
            self.c2pa = store[:MAX_STORE_BYTES]


def find_metadata(data: bytes) -> Metadata:
    """Find the metadata of an image that was decoded. Never raises."""
    found = Metadata()
    try:
        if data.startswith(b"\xff\xd8"):
            _search_jpeg(data, found)
        elif data.startswith(b"\x89PNG"):
            _search_png(data, found)
        elif data.startswith(b"RIFF"):
            _search_webp(data, found)
        elif is_tiff(data):
            _search_tiff(data, found)
        else:
            _search_others(data, found)
    except (ImageError, struct.error):
        found.unread.add("container")
    return found


def _search_jpeg(data: bytes, found: Metadata) -> None:
    stores: dict[bytes, bytearray] = {}  # by instance number: a box continues in later segments
    for marker, start, end in iterate_segments(data):
        if marker == 0xE1 and data.startswith(_EXIF_HEAD, start):
            found.keep_exif(data[start:end])
        elif marker == 0xE1 and data.startswith(_XMP_SEGMENT, start):
            found.keep_xmp(data[start + len(_XMP_SEGMENT) : end])
        elif marker == 0xEB and data.startswith(b"JP", start):  # ISO 19566-5, annex D
            instance, body = data[start + 2 : start + 4], start + 8
            if instance in stores:  # the header of the box is repeated
                body += 16 if data[body : body + 4] == b"\0\0\0\1" else 8
            stores.setdefault(instance, bytearray()).extend(data[body:end])
    for store in stores.values():
        found.keep_c2pa(bytes(store))


def _search_png(data: bytes, found: Metadata) -> None:
    for name, start, end in iterate_chunks(data):
        body, end = start + 8, end - 4
        if name == b"eXIf":
            found.keep_exif(data[body:end])
        elif name == b"caBX":
            found.keep_c2pa(data[body : min(end, body + MAX_STORE_BYTES)], end - body)
        elif name in (b"tEXt", b"zTXt", b"iTXt"):
            _keep_text(name, data[body:end], found)


def _keep_text(name: bytes, body: bytes, found: Metadata) -> None:
    raw_key, _, rest = body.partition(b"\0")
    key = raw_key[:80].decode("latin-1")
    is_xmp = key == _XMP_KEY
    if (key not in _KEYS and not is_xmp) or key in found.texts:
        return
    is_packed = name == b"zTXt"
    if name == b"iTXt":  # flag, method, language, translated key
        is_packed, pieces = rest[:1] == b"\1", rest[2:].split(b"\0", 2)
        rest = pieces[-1]
    most, is_whole = MAX_XMP_BYTES if is_xmp else MAX_TEXT_BYTES, True
    if is_packed:
        packed = rest if name == b"iTXt" else rest[1:]
        rest, is_whole = decompress_head(packed, most)
    if is_xmp:
        found.keep_xmp(rest, is_whole)
    else:
        # Some write UTF-8 where the standard has Latin-1.
        found.texts[key] = rest[:most].decode("utf-8", "replace")


def _search_webp(data: bytes, found: Metadata) -> None:
    start = 12
    for _ in range(MAX_READS):
        body = start + 8
        size = int.from_bytes(data[start + 4 : body], "little")
        if body + size > len(data) or body > len(data):
            return
        name = data[start : start + 4]
        if name == b"EXIF":
            found.keep_exif(data[body : body + size])
        elif name == b"XMP ":
            found.keep_xmp(data[body : body + size])
        elif name == b"C2PA":
            found.keep_c2pa(data[body : body + min(size, MAX_STORE_BYTES)], size)
        start = body + size + size % 2
    raise ImageError("decode_failed", f"more than {MAX_READS} pieces")


def _search_tiff(data: bytes, found: Metadata) -> None:
    found.exif = data
    page = open_directory(data)
    found.keep_xmp(page.get_bytes(_TIFF_XMP))
    found.keep_c2pa(page.get_bytes(_TIFF_C2PA))


def open_directory(data: bytes) -> TiffPage:
    """Return the first directory of a TIFF, which EXIF is. Raises struct.error."""
    is_big, order = data[2:4] in (b"+\0", b"\0+"), "<" if data[:2] == b"II" else ">"
    (offset,) = struct.unpack_from(order + ("Q" if is_big else "I"), data, 8 if is_big else 4)
    return TiffPage(data, offset)


def _search_others(data: bytes, found: Metadata) -> None:
    """Search HEIF and AVIF, and in what Pillow reads of GIF and BMP, which have no C2PA here."""
    if data[4:8] == b"ftyp":
        _search_boxes(data, found)
    else:
        found.c2pa = None
    info = read_info(data)
    for key, keep in (("exif", found.keep_exif), ("xmp", found.keep_xmp)):
        value = info.get(key)
        if isinstance(value, bytes) and value:
            keep(value)


def _search_boxes(data: bytes, found: Metadata) -> None:
    start = 0
    for _ in range(MAX_READS):
        body, size = start + 8, int.from_bytes(data[start : start + 4], "big")
        if size == 1:
            body, size = start + 16, int.from_bytes(data[start + 8 : start + 16], "big")
        end = start + size if size else len(data)
        if not body <= end <= len(data):
            return
        if data[start + 4 : start + 8] == b"uuid" and data.startswith(_C2PA_UUID, body):
            # Version and flags, the purpose, a zero, an offset.
            purpose = data.find(b"\0", body + 20, min(end, body + 100))
            if purpose > 0:
                store = purpose + 9
                found.keep_c2pa(data[store : min(end, store + MAX_STORE_BYTES)], end - store)
        start = end
        if start == len(data):
            return
    raise ImageError("decode_failed", f"more than {MAX_READS} pieces")
