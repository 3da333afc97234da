"""Take out of a PNG what its pixels do not need: prompts and workflows can be larger than they."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from cifake_ray.core.imaging.color_profile import MAX_PROFILE_BYTES
from cifake_ray.core.imaging.limits import MAX_READS
from cifake_ray.errors import ImageError

_SIGNATURE_BYTES = 8
_DROPPED = (b"zTXt", b"iTXt", b"iCCP")
# Of the other chunks that a reader may leave out (lower case), what changes the picture.
_NEEDED = (b"tRNS", b"eXIf", b"acTL", b"fcTL", b"fdAT")
_EXIF = b"Raw profile type exif\0"  # ImageMagick's place for it
MAX_EXIF_BYTES = 2**17


def drop_text(data: bytes) -> tuple[bytes, bytes | None]:
    """Return a PNG without its compressed texts and its profile, and the profile, decompressed.

    What else the picture does not need is left out if its checksum is wrong, as in browsers.

    Raises ImageError (decode_failed) for more than MAX_READS chunks.
    """
    kept, profile = [data[:_SIGNATURE_BYTES]], None
    kept_from = _SIGNATURE_BYTES
    for name, start, end in iterate_chunks(data):
        body = start + 8
        if name in _DROPPED:
            if name == b"iCCP":
                # Its name, a zero, the method.
                packed = data[body : end - 4].partition(b"\0")[2][1:]
                profile = profile or _decompress(packed, MAX_PROFILE_BYTES)
            if name != b"zTXt" or not _is_small_exif(data[body : end - 4]):
                kept.append(data[kept_from:start])
                kept_from = end
        elif name[:1].islower() and name not in _NEEDED and not _is_whole(data, start, end):
            kept.append(data[kept_from:start])
            kept_from = end
    if len(kept) == 1:
        return data, None
    kept.append(data[kept_from:])
    return b"".join(kept), profile


def iterate_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, start and end of each whole chunk before IEND; its body is [start + 8, end - 4).

    Raises ImageError (decode_failed) for more than MAX_READS chunks.
    """
    start = _SIGNATURE_BYTES
    for _ in range(MAX_READS):
        end = start + 8 + int.from_bytes(data[start : start + 4], "big") + 4
        name = data[start + 4 : start + 8]
        if name == b"IEND" or end > len(data):
            return
        yield name, start, end
        start = end
    raise ImageError("decode_failed", f"more than {MAX_READS} pieces")


def _is_whole(data: bytes, start: int, end: int) -> bool:
    return zlib.crc32(data[start + 4 : end - 4]) == int.from_bytes(data[end - 4 : end], "big")


def _is_small_exif(text: bytes) -> bool:
    packed = text[len(_EXIF) + 1 :]
    return text.startswith(_EXIF) and _decompress(packed, MAX_EXIF_BYTES) is not None


def _decompress(packed: bytes, most: int) -> bytes | None:
    """Return what was compressed; None if it is broken or has more bytes than that."""
    plain, is_whole = decompress_head(packed, most)
    return plain if is_whole else None


def decompress_head(packed: bytes, most: int) -> tuple[bytes, bool]:
    """Return at most so many of the bytes that were compressed, and whether they are all.

    Nothing of what is broken.
    """
    stream = zlib.decompressobj()
    try:
        plain = stream.decompress(packed, most)
    except zlib.error:
        return b"", False
    return plain, not stream.unconsumed_tail
