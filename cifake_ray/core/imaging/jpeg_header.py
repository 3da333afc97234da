"""Read size, layout and quality of a JPEG from its markers, without decoding.

This costs an eighth of opening the file in Pillow, which `core.imaging.decode` does after all where
the markers leave any doubt.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from cifake_ray.errors import ImageError

# Standard luminance table, in zigzag order as DQT stores it. Source: ITU-T T.81 (1992), Annex K,
# table K.1.
_STANDARD_LUMINANCE = np.array(
    [
        [16, 11, 12, 14, 12, 10, 16, 14, 13, 14, 18, 17, 16, 19, 24, 40],
        [26, 24, 22, 22, 24, 49, 35, 37, 29, 40, 58, 51, 61, 60, 57, 51],
        [56, 55, 64, 72, 92, 78, 64, 68, 87, 69, 55, 56, 80, 109, 81, 87],
        [95, 98, 103, 104, 103, 62, 77, 113, 121, 112, 100, 120, 92, 101, 103, 99],
    ],
    dtype=np.int64,
).ravel()

_SOF_MARKERS = frozenset({0xC0, 0xC1, 0xC2})  # Huffman-coded baseline, extended, progressive
# DHT, DRI, COM and the APPn that change nothing for us.
MAX_SEGMENTS = 4096  # 64 MiB of metadata are a thousand
_SCAN = re.compile(rb"\xff\xda")
# What comes after the stuffed, the restart and the fill bytes of a scan.
_NEXT_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])")
_SKIPPED_MARKERS = frozenset({0xC4, 0xDD, 0xFE, *range(0xE3, 0xEE), 0xEF})
MAX_SHARED_BYTES = 2048  # of a header that files share; with metadata it is larger, and its own


class JpegHeader(NamedTuple):
    """The frame of an 8-bit Huffman-coded JPEG, up to its first scan."""

    width: int  # pixels, as stored: before any EXIF orientation
    height: int  # pixels
    num_components: int  # 1 grey, 3 colour, 4 CMYK or YCCK
    luminance_table: bytes  # the first component's, as DQT stores it: 64 or 128 bytes
    is_multi_picture: bool  # an MPO index is present: more images follow the first
    profile: bytes  # ICC, in one piece; empty if there is none
    exif: bytes  # in one piece; empty if there is none
    has_xmp: bool  # or other metadata beside EXIF that may hold an orientation
    is_plain_ycbcr: bool  # one YCbCr picture; nothing but the three before changes its reading


def scan_jpeg(data: bytes) -> JpegHeader | None:
    """Read the header of a JPEG from its markers, as `_scan_markers` does; never raises.

    Small files of one encoder have the same bytes before their first scan, and what these say is
    cached, which takes a fifth of the time.
    """
    scan = data.find(b"\xff\xda", 2, MAX_SHARED_BYTES)
    if scan > 0:  # or it is inside a segment; then what is before it is no whole header
        end = scan + 2 + int.from_bytes(data[scan + 2 : scan + 4], "big")
        if (header := _scan_shared(data[:end])) is not None:
            return header
    return _scan_markers(data)


def _scan_markers(data: bytes) -> JpegHeader | None:
    """Read the header of a JPEG from its markers (4 us for a 32x32 file); never raises.

    Returns None for all that is not a well-formed single 8-bit Huffman-coded frame: not a JPEG, cut
    short, arithmetic or lossless coding, 12 bit, hierarchical frames, junk between segments. None
    means "doubt", not "broken".
    """
    if data[:2] != b"\xff\xd8":
        return None
    tables: dict[int, bytes] = {}
    frame = b""
    profile = exif = b""
    is_jfif = has_xmp = is_altered = is_multi_picture = False
    adobe_transform = -1
    start, num_bytes, num_segments = 2, len(data), 0
    while start + 4 <= num_bytes and data[start] == 0xFF and num_segments < MAX_SEGMENTS:
        num_segments += 1
        marker = data[start + 1]
        body, end = start + 4, start + 2 + (data[start + 2] << 8 | data[start + 3])
        if end < body or end > num_bytes:
            return None
        if marker == 0xDA:  # start of scan: the header ends
            break
        if marker == 0xDB:
            while body < end:
                stop = body + (65 if data[body] < 16 else 129)  # 8-bit or 16-bit entries
                if stop > end:
                    return None
                tables[data[body] & 15] = data[body + 1 : stop]
                body = stop
        elif marker in _SOF_MARKERS and not frame:
            frame = data[body:end]
        elif marker == 0xE0:
            is_jfif = is_jfif or data[body : body + 5] == b"JFIF\0"
        elif marker == 0xE1:
            if data[body : body + 6] == b"Exif\0\0":
                is_altered = is_altered or bool(exif)
                exif = data[body:end]
            else:
                has_xmp = True
        elif marker == 0xE2:
            is_multi_picture = is_multi_picture or data[body : body + 4] == b"MPF\0"
            if data[body : body + 12] == b"ICC_PROFILE\0":
                is_altered = is_altered or bool(profile) or data[body + 12 : body + 14] != b"\1\1"
                profile = data[body + 14 : end]
        elif marker == 0xEE:
            if data[body : body + 5] == b"Adobe":
                if end - body < 12:
                    return None
                adobe_transform = data[body + 11]
        elif marker not in _SKIPPED_MARKERS:
            return None
        start = end
    else:
        return None
    if len(frame) < 9 or frame[0] != 8:
        return None
    if frame[5] not in (1, 3, 4) or len(frame) != 6 + 3 * frame[5]:
        return None
    height, width = frame[1] << 8 | frame[2], frame[3] << 8 | frame[4]
    if not width or not height or frame[8] not in tables:
        return None
    # libjpeg's own rule for colour (jdapimin.c, default_decompress_parms), less the cases it only
    # guesses.
    is_ycbcr = adobe_transform in (-1, 1) and (
        is_jfif or adobe_transform == 1 or frame[6::3] == b"\1\2\3"
    )
    is_plain = frame[5] == 3 and is_ycbcr and not is_altered and not is_multi_picture
    table = tables[frame[8]]
    return JpegHeader(
        width, height, frame[5], table, is_multi_picture, profile, exif, has_xmp, is_plain
    )


_scan_shared = lru_cache(maxsize=64)(_scan_markers)


def iterate_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield marker, start and end of the body of each segment before the first scan.

    Ends where no segment follows. `_scan_markers` has a loop of its own, since every JPEG takes it.

    Raises ImageError (decode_failed) for more than MAX_SEGMENTS.
    """
    start = 2
    for _ in range(MAX_SEGMENTS):
        while data[start : start + 2] == b"\xff\xff":  # a fill byte
            start += 1
        end = start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
        if data[start : start + 1] != b"\xff" or not start + 4 <= end <= len(data):
            return
        if data[start + 1] == 0xDA:
            return
        yield data[start + 1], start + 4, end
        start = end
    raise ImageError("decode_failed", f"more than {MAX_SEGMENTS} segments")


def count_scans(data: bytes) -> int:
    """Count the scans before the end marker; libjpeg decodes each, however small it is.

    Never raises. Files of more than MAX_SEGMENTS markers count as so many scans.
    """
    first = _SCAN.search(data)
    if not first or not _SCAN.search(data, first.end()):  # nearly all files; 2.5 times `count`
        return int(first is not None)
    num_scans, start = 0, 2
    for _ in range(MAX_SEGMENTS):
        found = _NEXT_MARKER.search(data, start)
        if not found or found[1] == b"\xd9":
            return num_scans
        num_scans += found[1] == b"\xda"
        body = found.end()
        start = body + max(int.from_bytes(data[body : body + 2], "big"), 2)
    return MAX_SEGMENTS


@lru_cache(maxsize=4096)
def estimate_quality(luminance_table: bytes) -> int:
    """Return the IJG quality, 1..100, whose luminance table is nearest to the file's.

    Nearest by the sum of absolute differences, entries above 255 counting as 255 as in baseline
    files; of two equally near the lower. Exact for every encoder of the IJG family (libjpeg,
    Pillow, OpenCV); for other tables (Photoshop, cameras) it is an estimate. Cached: a data set has
    few tables and millions of files.

    `luminance_table`: 64 bytes, or 128 for 16-bit entries, in zigzag order, as in `JpegHeader`.
    """
    layout = ">64B" if len(luminance_table) == 64 else ">64H"
    table = np.minimum(np.array(struct.unpack(layout, luminance_table), dtype=np.int64), 255)
    return 1 + int(np.abs(_scale_tables() - table).sum(axis=1).argmin())


@lru_cache(maxsize=1)
def _scale_tables() -> np.ndarray:
    """Return int64[100, 64], a table per quality. Source: libjpeg jcparam.c."""
    quality = np.arange(1, 101, dtype=np.int64)
    percent = np.where(quality < 50, 5000 // quality, 200 - 2 * quality)
    return np.clip((_STANDARD_LUMINANCE * percent[:, None] + 50) // 100, 1, 255)
