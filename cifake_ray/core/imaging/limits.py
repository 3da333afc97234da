"""Limit what image containers may cost their parsers, without decoding.

Parsers of Pillow that are loops in Python take seconds to minutes for a file of millions of tiny
pieces: PNG chunks, JPEG segments or fill bytes, GIF frames, runs of a BMP.
"""

from __future__ import annotations

import struct
from io import BytesIO

from cifake_ray.core.imaging.tiff_pages import is_tiff, is_tiff_cut_short
from cifake_ray.errors import ImageError

# A PNG of 64 MiB in chunks of 1 KiB takes 260,000 reads, a GIF of 64 MiB 520,000; the limit is
# reached in about a second.
MAX_READS = 1_000_000
MAX_FRAMES = 1_000_000


class BoundedReader(BytesIO):
    """The bytes of an image, in at most MAX_READS pieces; ImageError (decode_failed) after them."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.reads_left = MAX_READS

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads_left -= 1
        if self.reads_left < 0:
            raise ImageError("decode_failed", f"more than {MAX_READS} pieces")
        return super().read(size)


def count_tiff_pages(data: bytes) -> int:
    """Count the directories of a TIFF or BigTIFF, each once; those beyond the end do not count.

    Pillow's own count compares each directory with all before it. Raises ImageError (decode_failed)
    for more than MAX_FRAMES.
    """
    order = "<" if data[:2] == b"II" else ">"
    is_big = data[2:4] in (b"+\0", b"\0+")
    start, count, link, entry_bytes = (8, "Q", "Q", 20) if is_big else (4, "H", "I", 12)
    seen: set[int] = set()
    try:
        (offset,) = struct.unpack_from(order + link, data, start)
        while offset and offset not in seen and len(seen) <= MAX_FRAMES:
            (num_entries,) = struct.unpack_from(order + count, data, offset)
            seen.add(offset)
            end = offset + struct.calcsize(order + count) + num_entries * entry_bytes
            (offset,) = struct.unpack_from(order + link, data, end)
    except (struct.error, OverflowError):
        pass
    check_frames(len(seen))
    return max(len(seen), 1)


def check_frames(num_frames: int) -> None:
    """Raise ImageError (decode_failed) for an absurd number of frames: tables hold 32 bits."""
    if num_frames > MAX_FRAMES:
        raise ImageError("decode_failed", f"{num_frames} frames, at most {MAX_FRAMES}")


def is_cut_short(data: bytes) -> bool:
    """Return whether a file that did not decode lacks its end: marker, length or directory."""
    tail = data[-32:]  # some tools pad
    if data.startswith(b"\xff\xd8"):
        return b"\xff\xd9" not in tail
    if data.startswith(b"\x89PNG"):
        return b"IEND" not in tail
    if data.startswith(b"GIF8"):
        return not data.endswith(b";")
    if is_tiff(data):
        return is_tiff_cut_short(data)
    if data.startswith(b"RIFF"):
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    if data[4:8] == b"ftyp":  # AVIF, HEIF: a chain of boxes, each with its length
        end = 0
        while end + 8 <= len(data) and (size := int.from_bytes(data[end : end + 4], "big")) >= 8:
            end += size
        return end > len(data) or 0 < len(data) - end < 8
    return False
