"""Read the directories of a TIFF, and choose the page that shows the picture.

Raw files of cameras are TIFFs whose first page is often a thumbnail; pyramids may begin with one.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from cifake_ray.errors import ImageError

MAX_PAGES = 64  # that are looked at for the one that shows the picture
MAX_ENTRIES = 4096  # of one page
MAX_VALUES = 2**20  # of one tag

# Source of all numbers: TIFF 6.0 and its supplements; libtiff's tiff.h.
STRIPS, TILES = (273, 279), (324, 325)  # the tags of their offsets and of their sizes
PHOTOMETRIC = 262
_SUBFILE_TYPE, _MAKE, _SUB_PAGES, _DNG_VERSION = 254, 271, 330, 50706
_REDUCED, _MASK = 1, 4  # bits of NewSubfileType
_OLD_SUBFILE_TYPE, _OLD_REDUCED = 255, 2
_COLOR_FILTERS = (32803, 34892)  # the photometric interpretations CFA and LinearRaw
_RAW_NAMES = {"NIKON": "NEF", "SONY": "ARW", "CANON": "CR2", "PENTAX": "PEF", "SAMSUNG": "SRW"}
# Type of a tag -> struct's; text is read as bytes, and no tag that is read here holds fractions.
_TYPES = {1: "B", 2: "B", 3: "H", 4: "I", 6: "b", 7: "B", 8: "h", 9: "i", 13: "I", 16: "Q", 18: "Q"}


def is_tiff(data: bytes) -> bool:
    """Return whether these are the first bytes of a TIFF or BigTIFF."""
    return data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


class TiffPage:
    """One directory of a TIFF, whose numbers are read when asked for."""

    def __init__(self, data: bytes, offset: int) -> None:
        self.data, self.offset = data, offset
        self.order = "<" if data[:2] == b"II" else ">"
        self.is_big = data[2:4] in (b"+\0", b"\0+")
        count, entry, size = ("Q", "HHQ", 20) if self.is_big else ("H", "HHI", 12)
        head = struct.calcsize(self.order + count)
        (num_entries,) = struct.unpack_from(self.order + count, data, offset)
        self.end: int = offset + head + num_entries * size
        self._entries: dict[int, tuple[int, int, int]] = {}
        stop = min(offset + head + min(num_entries, MAX_ENTRIES) * size, len(data) - size + 1)
        for start in range(offset + head, stop, size):
            tag, kind, number = struct.unpack_from(self.order + entry, data, start)
            self._entries.setdefault(tag, (kind, number, start + size - (8 if self.is_big else 4)))

    @property
    def link(self) -> str:
        return self.order + ("Q" if self.is_big else "I")

    def get_bytes(self, tag: int) -> bytes:
        """Return the value of a tag as stored; nothing if it is missing or ends after the file."""
        kind, number, start = self._entries.get(tag, (0, 0, 0))
        size = number * struct.calcsize(_TYPES.get(kind, "B"))
        if size > struct.calcsize(self.link):
            (start,) = struct.unpack_from(self.link, self.data, start)
        return self.data[start : start + size] if start + size <= len(self.data) else b""

    def read(self, tag: int, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        """Return the numbers of a tag; the default if there are none, or too many."""
        kind, number, _ = self._entries.get(tag, (0, 0, 0))
        value = self.get_bytes(tag) if kind in _TYPES and number <= MAX_VALUES else b""
        return struct.unpack(f"{self.order}{number}{_TYPES[kind]}", value) if value else default

    def read_one(self, tag: int, default: int) -> int:
        return self.read(tag, (default,))[0]

    @property
    def is_picture(self) -> bool:
        """Whether it is neither a reduced copy of another page nor a mask."""
        is_reduced = self.read_one(_OLD_SUBFILE_TYPE, 1) == _OLD_REDUCED
        return not is_reduced and not self.read_one(_SUBFILE_TYPE, 0) & (_REDUCED | _MASK)

    def list_segments(self) -> list[tuple[int, int]]:
        """Return offset and size of each strip or tile, as stored."""
        offsets, sizes = TILES if TILES[0] in self._entries else STRIPS
        return list(zip(self.read(offsets), self.read(sizes), strict=False))


def is_tiff_cut_short(data: bytes) -> bool:
    """Return whether the first directory, or a strip or tile of it, ends after the file."""
    try:
        page = next(_iterate_pages(data), None)
    except struct.error:
        return True
    if page is None:
        return True  # it begins there
    ends = [offset + size for offset, size in page.list_segments()]
    return max(page.end, *ends, 0) > len(data)


def find_page(data: bytes) -> TiffPage:
    """Return the first page that is a whole picture.

    Raises ImageError (format_not_allowed) for a raw file and for a preview alone; struct.error and
    the like for a broken file.
    """
    pages = list(_iterate_pages(data))
    raw = {page.read_one(PHOTOMETRIC, 0) for page in pages} & {*_COLOR_FILTERS}
    pictures = [page for page in pages if page.is_picture]
    if not raw and pictures and not pages[0].read(_DNG_VERSION) and data[8:10] != b"CR":
        return pictures[0]
    make = pages[0].get_bytes(_MAKE).decode("ascii", "replace").strip("\0 ")
    name = _RAW_NAMES.get(make.upper().split(" ")[0])
    if pages[0].read(_DNG_VERSION):
        name = "DNG"
    elif data[8:10] == b"CR":
        name = "CR2"
    name = name or (f"a raw file of {make}" if raw or make else "TIFF")
    detail = f"{name}, of which only a preview could be read; export the picture as JPEG"
    raise ImageError("format_not_allowed", detail)


def _iterate_pages(data: bytes) -> Iterator[TiffPage]:
    """Yield the pages in the order of the file, each before its sub-pages."""
    is_big = data[2:4] in (b"+\0", b"\0+")
    layout = ("<" if data[:2] == b"II" else ">") + ("Q" if is_big else "I")
    waiting = list(struct.unpack_from(layout, data, 8 if is_big else 4))
    seen: set[int] = set()
    while waiting and len(seen) < MAX_PAGES:
        offset = waiting.pop()
        if offset in seen or not 0 < offset < len(data):
            continue
        seen.add(offset)
        try:
            page = TiffPage(data, offset)
            following = list(struct.unpack_from(layout, data, page.end))
        except struct.error:
            if len(seen) == 1:
                raise
            continue
        yield page
        waiting += following + [*page.read(_SUB_PAGES)][:MAX_PAGES][::-1]


def put_first(page: TiffPage) -> bytes:
    """Return the file with this page as its first."""
    start = 8 if page.is_big else 4
    link = struct.pack(page.link, page.offset)
    if page.data[start : start + len(link)] == link:
        return page.data
    return page.data[:start] + link + page.data[start + len(link) :]
