"""Read the pixels of TIFF layouts that Pillow misreads or does not read.

Pillow mixes up bytes where planes are separate or where samples of more than 8 bits are big-endian
and compressed, and refuses many layouts. So libtiff, by way of Pillow, only decompresses them here:
each row is handed to it as a row of grey bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from io import BytesIO

import numpy as np
from PIL import Image

from cifake_ray.core.imaging.tiff_pages import PHOTOMETRIC, STRIPS, TILES, TiffPage
from cifake_ray.errors import ImageError

MAX_PIXEL_BYTES = 32  # of one pixel: four samples of 64 bits
BAND_BYTES = 4 * 2**20  # decompressed at once, or one row of strips or tiles if that is more
MAX_BAND_BYTES = 128 * 2**20

# Source of all numbers: TIFF 6.0 and its supplements; libtiff's tiff.h.
COLOR_MAP = 320
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _FILL_ORDER, _ORIENTATION = 256, 257, 258, 259, 266, 274
_SAMPLES, _STRIP_HEIGHT, _PLANAR, _PREDICTOR, _TILE_WIDTH = 277, 278, 284, 317, 322
_TILE_HEIGHT, _EXTRA_SAMPLES, _SAMPLE_FORMAT, _PROFILE = 323, 338, 339, 34675
_BYTE_COMPRESSIONS = (1, 5, 8, 32773, 32946, 34925, 50000)  # none, LZW, deflate, PackBits, ...
_ICC_LAB = 9
_MODES = {0: "L", 1: "L", 2: "RGB", 3: "P", 5: "CMYK", 8: "LAB", _ICC_LAB: "LAB"}


class TiffLayout:
    """How the samples of a page lie in the file, and what they mean."""

    def __init__(self, page: TiffPage) -> None:
        self.page = page
        self.width, self.height = page.read_one(_WIDTH, 0), page.read_one(_HEIGHT, 0)
        self.photometric = page.read_one(PHOTOMETRIC, -1)
        self.compression = page.read_one(_COMPRESSION, 1)
        self.samples = page.read_one(_SAMPLES, 1)
        self.formats, self.depths = page.read(_SAMPLE_FORMAT, (1,)), page.read(_BITS, (1,))
        self.bits, self.format = self.depths[0], self.formats[0]
        self.predictor = page.read_one(_PREDICTOR, 1)
        self.is_planar = page.read_one(_PLANAR, 1) == 2 and self.samples > 1
        colors = _MODES.get(self.photometric, "")
        extra = page.read_one(_EXTRA_SAMPLES, 0)
        # 1: colours are multiplied by alpha already; 2: they are not; 0: it means something else.
        self.has_alpha = extra in (1, 2) and colors in ("L", "RGB")
        self.is_multiplied = extra == 1
        self.num_used = (1 if colors in ("L", "P") else len(colors)) + self.has_alpha
        self.mode = colors + ("A" if self.has_alpha else "")  # Pillow's name

    @property
    def is_known(self) -> bool:
        """Whether `read_pixels` reads it."""
        known_bits = (8, 16, 32, 64) if self.format != 1 else (*range(1, 17), 32)
        return (
            min(self.width, self.height) > 0
            and self.compression in _BYTE_COMPRESSIONS
            and self.mode != ""
            and self.samples >= self.num_used
            and len({*self.depths}) == len({*self.formats}) == 1
            and self.bits in known_bits
            and self.format in (1, 2, 3)
            and (self.format, self.bits) != (3, 8)
            and self.samples * self.bits <= 8 * MAX_PIXEL_BYTES
            and self.predictor in (1, 2, 3)
            and (self.predictor == 1 or self.bits in (8, 16, 32, 64))
        )

    @property
    def is_misread(self) -> bool:
        """Whether Pillow must not read it, though it may say that it can."""
        return self.bits > 8 or self.format != 1 or self.is_planar

    @property
    def is_open_ended(self) -> bool:
        """Whether samples may hold values that have no place in 0..255."""
        return self.format != 1 or self.bits > 16

    def __str__(self) -> str:
        return (
            f"photometric {self.photometric}, compression {self.compression}, {self.samples} "
            f"samples of {self.bits} bits, sample format {self.format}"
        )


def read_pixels(layout: TiffLayout) -> Image.Image:
    """Read the pixels of a known layout: 8 bits a sample, with orientation and profile of the page.

    Raises ImageError (truncated, or decode_failed for values that have no place in 0..255), and
    what libtiff says of broken data.
    """
    page, mode = layout.page, layout.mode
    color_map = _read_color_map(page) if mode == "P" else None
    mode = "RGB" if mode == "P" else mode
    if layout.has_alpha and layout.is_multiplied:
        mode = "RGBa"
    num_channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.empty((layout.height, layout.width, num_channels), np.uint8)
    for start, band in _iterate_bands(layout):
        if color_map is not None:
            index = band[:, :, 0].astype(np.int64)
            if index.min() < 0 or index.max() >= len(color_map):
                raise ImageError("decode_failed", "a palette index outside of the colour map")
            values = color_map[index]
        else:
            values = _scale_to_bytes(band[:, :, : layout.num_used], layout)
            if layout.photometric == 0:
                values[:, :, 0] = 255 - values[:, :, 0]
            if layout.photometric == _ICC_LAB:
                values[:, :, 1:] ^= 128  # from 128 there, signed in what Pillow takes
            if mode == "RGBa" and values.shape[2] == 2:
                values = values[:, :, [0, 0, 0, 1]]
        pixels[start : start + len(values)] = values
    image = Image.frombuffer(mode, (layout.width, layout.height), pixels, "raw", mode, 0, 1)
    image = image.convert("RGBA") if mode == "RGBa" else image.copy()
    image.getexif()[_ORIENTATION] = page.read_one(_ORIENTATION, 1)
    if profile := page.get_bytes(_PROFILE):
        image.info["icc_profile"] = profile
    return image


def has_8_bit_color_map(page: TiffPage) -> bool:
    """Return whether the colour map holds 0..255 instead of 0..65535: libtiff's rule."""
    return max(page.read(COLOR_MAP, (65535,))) < 256


def _read_color_map(page: TiffPage) -> np.ndarray:
    values = np.array(page.read(COLOR_MAP), np.uint16)
    values = values[: len(values) // 3 * 3].reshape(3, -1).T
    return (values if has_8_bit_color_map(page) else values >> 8).astype(np.uint8)


def _scale_to_bytes(values: np.ndarray, layout: TiffLayout) -> np.ndarray:
    """Return 0..255 for 0..1 or 0..65535, or for all that fewer bits can hold."""
    highest: int = 1 if layout.format == 3 else 2 ** min(layout.bits, 16) - 1
    # NaN fails too.
    if layout.is_open_ended and not ((values >= 0) & (values <= highest)).all():
        raise ImageError("decode_failed", f"samples outside 0..{highest} ({layout})")
    if layout.format == 3:
        return np.rint(values.astype(np.float32) * 255).astype(np.uint8)
    if layout.bits == 8 and layout.format == 1:
        return values.astype(np.uint8)
    if layout.bits >= 16 and layout.samples > 1:  # as Pillow reads 16-bit colour
        return (values.astype(np.uint32) >> 8).astype(np.uint8)
    return ((values.astype(np.uint32) * 510 + highest) // (2 * highest)).astype(np.uint8)


def _iterate_bands(layout: TiffLayout) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the first row and the samples [rows, width, samples] of one band after another."""
    page, width, height = layout.page, layout.width, layout.height
    is_tiled = bool(page.read(TILES[0]))
    if is_tiled:
        tile_width, tile_height = page.read_one(_TILE_WIDTH, 0), page.read_one(_TILE_HEIGHT, 0)
        if not 0 < tile_width < 2**20 or not 0 < tile_height < 2**20:
            raise ImageError("decode_failed", f"tiles of {tile_width} x {tile_height} pixels")
    else:
        tile_width, tile_height = width, min(page.read_one(_STRIP_HEIGHT, height) or height, height)
    across, down = -(-width // tile_width), -(-height // tile_height)
    num_planes = layout.samples if layout.is_planar else 1
    tile_samples = tile_width * (1 if layout.is_planar else layout.samples)
    row_bytes = -(-tile_samples * layout.bits // 8)
    segments = page.list_segments()
    if layout.compression == 1 and not is_tiled and len(segments) < down * num_planes:
        # Sizes may be missing where they can be told.
        heights = [min(tile_height, height - n * tile_height) for n in range(down)] * num_planes
        sizes = (row_bytes * n for n in heights)
        segments = list(zip(page.read(STRIPS[0]), sizes, strict=False))
    if len(segments) < across * down * num_planes:
        raise ImageError("decode_failed", f"{len(segments)} strips or tiles, some are missing")
    band_bytes = row_bytes * across * tile_height * num_planes
    if band_bytes > MAX_BAND_BYTES and layout.compression != 1:
        raise ImageError("decode_failed", f"strips of {band_bytes} bytes, at most {MAX_BAND_BYTES}")
    together = max(BAND_BYTES // band_bytes, 1)
    for first in range(0, down, together):
        last = min(first + together, down)
        start, stop = first * tile_height, min(last * tile_height, height)
        rows = (last - first) * tile_height if is_tiled else stop - start
        planes = []
        for plane in range(num_planes):
            place = plane * down * across
            raw = _decompress(
                layout,
                segments[place + first * across : place + last * across],
                size=(row_bytes * across, rows),
                tile=(row_bytes, tile_height) if is_tiled else None,
                rows_per_strip=tile_height,
            )
            raw = raw[: stop - start].reshape(stop - start, across, row_bytes)
            samples = _read_samples(raw, layout, tile_samples)
            samples = samples.reshape(stop - start, across, tile_width, -1)
            if layout.predictor == 2:
                samples = np.cumsum(samples, axis=2, dtype=samples.dtype)
            planes.append(samples.reshape(stop - start, across * tile_width, -1)[:, :width])
        yield start, planes[0] if num_planes == 1 else np.concatenate(planes, axis=2)


def _decompress(
    layout: TiffLayout,
    segments: list[tuple[int, int]],
    *,
    size: tuple[int, int],
    tile: tuple[int, int] | None,
    rows_per_strip: int,
) -> np.ndarray:
    """Return uint8[rows, bytes of a row]: what strips or tiles hold once decompressed."""
    data = layout.page.data
    if any(start + count > len(data) for start, count in segments):
        raise ImageError("truncated", "a strip or tile ends after the file")
    width, height = size
    fill_order = layout.page.read_one(_FILL_ORDER, 1)
    if layout.compression == fill_order == 1:
        used = tile[0] * tile[1] if tile else width * rows_per_strip
        pieces = [data[start : start + min(count, used)] for start, count in segments]
        stored = np.frombuffer(b"".join(pieces), np.uint8)
        if stored.size < width * height:
            raise ImageError("truncated", f"{stored.size} bytes of {width * height}")
        if tile:
            tiles = stored.reshape(height // tile[1], width // tile[0], tile[1], tile[0])
            return tiles.swapaxes(1, 2).reshape(height, width)
        return stored[: width * height].reshape(height, width)
    tags: dict[int, list[int]] = {
        _WIDTH: [width],
        _HEIGHT: [height],
        _BITS: [8],
        _COMPRESSION: [layout.compression],
        PHOTOMETRIC: [1],
        _FILL_ORDER: [fill_order],
        _SAMPLES: [1],
    }
    sides = {_TILE_WIDTH: [tile[0]], _TILE_HEIGHT: [tile[1]]} if tile else {}
    tags |= sides or {_STRIP_HEIGHT: [rows_per_strip]}
    offsets, sizes = TILES if tile else STRIPS
    tags[sizes] = [count for _, count in segments]
    start = 8 + 2 + 12 * (len(tags) + 1) + 4
    starts = start + 8 * len(segments) + np.cumsum([0, *tags[sizes]])
    tags[offsets] = starts[:-1].tolist()
    entries = body = b""
    for tag in sorted(tags):
        values = struct.pack(f"<{len(tags[tag])}I", *tags[tag])
        if len(values) > 4:
            body, values = body + values, struct.pack("<I", start + len(body))
        entries += struct.pack("<HHI", tag, 4, len(tags[tag])) + values
    body = body.ljust(8 * len(segments), b"\0")
    head = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4)
    parts = [head, body, *(data[start : start + count] for start, count in segments)]
    with Image.open(BytesIO(b"".join(parts)), formats=("TIFF",)) as image:
        return np.asarray(image)


def _read_samples(raw: np.ndarray, layout: TiffLayout, num_samples: int) -> np.ndarray:
    """Return [rows, tiles across, samples] from uint8[rows, tiles across, bytes]."""
    bits, kind = layout.bits, " uif"[layout.format]
    if bits % 8 or bits == 24:
        flat = np.unpackbits(raw, axis=2)[:, :, : num_samples * bits]
        weights = (1 << np.arange(bits)[::-1]).astype(np.float32)  # exact up to 24 bits
        shape = (*raw.shape[:2], num_samples, bits)
        return (flat.reshape(shape).astype(np.float32) @ weights).astype(np.uint16)
    num_bytes = bits // 8
    if layout.predictor == 3:  # differences of bytes, the highest bytes of all samples first
        step = 1 if layout.is_planar else layout.samples
        split = raw.reshape(*raw.shape[:2], -1, step)
        raw = np.cumsum(split, axis=2, dtype=np.uint8).reshape(*raw.shape[:2], num_bytes, -1)
        return np.ascontiguousarray(raw.swapaxes(2, 3)).view(f">{kind}{num_bytes}")[..., 0]
    samples = np.ascontiguousarray(raw).view(f"{layout.page.order}{kind}{num_bytes}")
    return samples.astype(samples.dtype.newbyteorder("="))
