"""TIFF layouts with pixels known from construction, and which page is the picture."""

from __future__ import annotations

import lzma
import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from itertools import product
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cifake_ray.core.imaging import tiff_pixels
from cifake_ray.core.imaging.decode import decode_image, inspect_image
from cifake_ray.errors import ImageError

Y, X = np.mgrid[:45, :61]
RGB = np.stack([X * 255 // 60, Y * 255 // 44, (X + Y) * 255 // 104], 2).astype(np.uint8)
GREY = np.repeat(RGB[:, :, :1], 3, axis=2)
RGB16 = RGB.astype(np.uint16) * 257
OPAQUE = np.full(RGB.shape[:2], 255, np.uint8)
CMYK = np.dstack([255 - RGB, 0 * OPAQUE])
LAYOUTS: dict[str, tuple[np.ndarray, np.ndarray]] = {  # the array that is written, the picture
    "rgb 8": (RGB, RGB),
    "rgb 16": (RGB16, RGB),
    "rgb half": ((RGB / 255).astype(np.float16), RGB),
    "rgb float": ((RGB / 255).astype(np.float32), RGB),
    "rgb double": (RGB / 255, RGB),
    "rgb uint32": (RGB16.astype(np.uint32), RGB),
    "rgb int32": (RGB16.astype(np.int32), RGB),
    "rgba 8": (np.dstack([RGB, OPAQUE]), RGB),
    "rgba 16": (np.dstack([RGB16, OPAQUE * np.uint16(257)]), RGB),
    "cmyk 8": (CMYK, RGB),
    "cmyk 16": (CMYK * np.uint16(257), RGB),
    "grey 8": (RGB[:, :, 0], GREY),
    "grey 16": (RGB16[:, :, 0], GREY),
    "grey int16": ((RGB16[:, :, 0] >> 1).astype(np.int16), GREY // 2),
    "grey float": ((RGB[:, :, 0] / 255).astype(np.float32), GREY),
    "grey double": (RGB[:, :, 0] / 255, GREY),
    "greya 8": (np.dstack([RGB[:, :, 0], OPAQUE]), GREY),
    "greya 16": (np.dstack([RGB16[:, :, 0], OPAQUE * np.uint16(257)]), GREY),
}
COMPRESSIONS: dict[int, Callable[[bytes], bytes]] = {
    1: bytes,
    8: zlib.compress,
    34925: lzma.compress,
    # PackBits: runs of up to 128 bytes as they are.
    32773: lambda row: b"".join(
        bytes([len(row[n : n + 128]) - 1]) + row[n : n + 128] for n in range(0, len(row), 128)
    ),
}


class Page:
    """A directory as it will stand in the file, with the strips or tiles that it names."""

    def __init__(self, tags: dict[int, tuple[str, list[int]]], segments: list[bytes]) -> None:
        self.tags, self.segments = tags, segments


def make_page(
    array: np.ndarray,  # [height, width] or [height, width, samples], in native order
    photometric: int = 2,
    *,
    bits: int | None = None,
    order: str = "<",
    planar: bool = False,
    tile: tuple[int, int] | None = None,
    strip_height: int = 45,
    compression: int = 1,
    predictor: int = 1,
    tags: dict[int, tuple[str, list[int]]] | None = None,
) -> Page:
    pixels = array if array.ndim == 3 else array[:, :, None]
    height, width, samples = pixels.shape
    bits = bits or 8 * pixels.itemsize
    blocks = [pixels[:, :, n : n + 1] for n in range(samples)] if planar else [pixels]
    segments = []
    for block in blocks:
        high, wide = tile or (strip_height, width)
        if tile:
            margins = ((0, -height % high), (0, -width % wide), (0, 0))
            block = np.pad(block, margins)
        for top in range(0, block.shape[0], high):
            for left in range(0, block.shape[1], wide):
                piece = block[top : top + high, left : left + wide]
                segments.append(
                    COMPRESSIONS[compression](pack_samples(piece, bits, order, predictor))
                )
    entries = {
        256: ("I", [width]),
        257: ("I", [height]),
        258: ("H", [bits] * samples),
        259: ("H", [compression]),
        262: ("H", [photometric]),
        277: ("H", [samples]),
        284: ("H", [1 + planar]),
        317: ("H", [predictor]),
        339: ("H", [{"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]] * samples),
    }
    sides = {322: ("I", [tile[1]]), 323: ("I", [tile[0]])} if tile else {278: ("I", [strip_height])}
    return Page(entries | sides | (tags or {}), segments)


def pack_samples(piece: np.ndarray, bits: int, order: str, predictor: int) -> bytes:
    """The bytes of a strip or tile before they are compressed."""
    if predictor == 2:
        piece = np.diff(piece, axis=1, prepend=piece.dtype.type(0))
    if predictor == 3:
        rows = np.ascontiguousarray(piece.astype(piece.dtype.newbyteorder(">"))).view(np.uint8)
        rows = rows.reshape(len(piece), -1, piece.itemsize).swapaxes(1, 2)
        rows = rows.reshape(len(piece), -1, piece.shape[2])  # differences at that distance
        return np.diff(rows, axis=1, prepend=np.uint8(0)).tobytes()
    if bits == 8 * piece.itemsize:
        return piece.astype(piece.dtype.newbyteorder(order)).tobytes()
    shifts = np.arange(bits)[::-1]
    rows = [np.packbits(row.reshape(-1, 1) >> shifts & 1, axis=None) for row in piece]
    return np.concatenate(rows).tobytes()


def write_tiff(*pages: Page, order: str = "<", big: bool = False, sub_pages: bool = False) -> bytes:
    """The pages one after another, or all others as sub-pages of the first."""
    data = bytearray(b"II" if order == "<" else b"MM")
    count, link, inline = ("Q", "Q", 8) if big else ("H", "I", 4)
    data += struct.pack(order + ("HHHQ" if big else "HI"), *((43, 8, 0, 16) if big else (42, 8)))
    where: list[int] = []

    def add_page(page: Page, following: int, subs: list[int]) -> int:
        tags, tiles = dict(page.tags), 322 in page.tags
        starts = []
        for segment in page.segments:
            starts.append(len(data))
            data.extend(segment)
        tags[324 if tiles else 273] = (link, starts)
        tags[325 if tiles else 279] = ("I", [len(segment) for segment in page.segments])
        if subs:
            tags[330] = (link, subs)
        entries = b""
        for tag in sorted(tags):
            letter, values = tags[tag]
            kind = {"B": 1, "s": 2, "H": 3, "I": 4, "Q": 16}[letter]
            value = struct.pack(f"{order}{len(values)}{letter.replace('s', 'B')}", *values)
            if len(value) > inline:
                place = len(data)
                data.extend(value)
                value = struct.pack(order + link, place)
            entries += struct.pack(order + "HH" + link, tag, kind, len(values))
            entries += value.ljust(inline, b"\0")
        start = len(data)
        data.extend(struct.pack(order + count, len(tags)) + entries)
        data.extend(struct.pack(order + link, following))
        return start

    for page in pages[:0:-1]:  # the last first, for it is named by the one before it
        where.insert(0, add_page(page, 0 if sub_pages or not where else where[0], []))
    subs, following = (where, 0) if sub_pages else ([], where[0] if where else 0)
    first = add_page(pages[0], following, subs)
    struct.pack_into(order + link, data, 8 if big else 4, first)
    return bytes(data)


def find_error(data: bytes) -> ImageError:
    with pytest.raises(ImageError) as caught:
        decode_image(data)
    return caught.value


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_shows_the_picture_that_was_written(name: str) -> None:
    array, expected = LAYOUTS[name]
    kind = name.split()[0]
    photometric = {"rgb": 2, "rgba": 2, "cmyk": 5}.get(kind, 1)
    tags = {338: ("H", [2])} if kind in ("rgba", "greya") else {}
    shapes: list[dict[str, Any]] = [{}, {"strip_height": 7}, {"tile": (16, 32)}]
    for order, planar, big in product("<>", {False, array.ndim == 3}, (False, True)):
        for compression, shape in product(COMPRESSIONS, shapes):
            predictors = [1]
            if compression == 8:
                predictors.append(3 if array.dtype.kind == "f" else 2)
            for predictor in predictors:
                options = {"planar": planar, "compression": compression, "predictor": predictor}
                page = make_page(array, photometric, order=order, tags=tags, **options, **shape)
                data = write_tiff(page, order=order, big=big)
                what = f"{name} {order} big {big} {options} {shape}"
                np.testing.assert_allclose(
                    decode_image(data).astype(int), expected, atol=1, err_msg=what
                )
        header = inspect_image(data)
        assert (header.width, header.height, header.num_frames) == (61, 45, 1)


@pytest.mark.parametrize("bits", [*range(2, 8), *range(9, 16)])
@pytest.mark.parametrize("order", "<>")
def test_samples_of_any_number_of_bits_are_scaled(bits: int, order: str) -> None:
    highest = 2**bits - 1
    values = np.rint(RGB / 255 * highest).astype(np.uint16)
    expected = np.rint(values.astype(int) * 255 / highest)
    for planar, shape in product((False, True), ({}, {"tile": (16, 32)})):
        page = make_page(values, bits=bits, planar=planar, compression=8, **shape)
        np.testing.assert_array_equal(decode_image(write_tiff(page, order=order)), expected)
    grey = write_tiff(make_page(values[:, :, 0], 1, bits=bits), order=order)
    np.testing.assert_array_equal(decode_image(grey)[:, :, 1], expected[:, :, 0])


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("big", [False, True])
def test_a_colour_map_may_hold_8_or_16_bits(order: str, big: bool) -> None:
    index = RGB[:, :, 0]
    colors = np.stack([np.arange(256), 255 - np.arange(256), np.arange(256) // 2])
    expected = colors.T[index]
    for scale in (1, 257):
        tags = {320: ("H", (colors * scale).ravel().tolist())}
        page = make_page(index, 3, tags=tags)
        np.testing.assert_array_equal(
            decode_image(write_tiff(page, order=order, big=big)), expected
        )
    deep = {320: ("H", np.repeat(colors * 257, 256, axis=1).ravel().tolist())}
    page = make_page(index.astype(np.uint16) * 256, 3, order=order, tags=deep)
    np.testing.assert_array_equal(decode_image(write_tiff(page, order=order, big=big)), expected)


@pytest.mark.parametrize("scale", [np.uint8(1), np.uint16(257)])
@pytest.mark.parametrize("kind", [0, 1, 2])
def test_alpha_is_composited_if_it_is_alpha(scale: Any, kind: int) -> None:
    """1: the colours are multiplied by it already; 0: it is something else."""
    array = np.dstack([RGB // 2 if kind == 1 else RGB, OPAQUE // 2 + 1]) * scale
    data = write_tiff(make_page(array, tags={338: ("H", [kind])}))
    expected = RGB / 2 + 127 if kind else RGB
    np.testing.assert_allclose(decode_image(data).astype(float), expected, atol=2)


def test_lab_of_8_and_of_16_bits_is_the_same() -> None:
    lab = np.dstack([np.full((4, 5), 128), np.full((4, 5), 60), np.full((4, 5), -40)])
    small, deep = lab.astype(np.uint8), (lab * 256).astype(np.uint16)  # in two's complement
    centred = (lab + np.array([0, 128, 128])).astype(np.uint8)
    expected = decode_image(write_tiff(make_page(small, 8)))
    assert expected[0, 0, 0] > 160 > expected[0, 0, 1]  # a purple
    for page in (make_page(deep, 8), make_page(centred, 9), make_page(small, 8, planar=True)):
        np.testing.assert_array_equal(decode_image(write_tiff(page)), expected)


def test_a_deep_picture_is_turned_upright_and_inverted() -> None:
    data = write_tiff(make_page(RGB16, tags={274: ("H", [6])}))
    np.testing.assert_array_equal(decode_image(data), np.rot90(RGB, -1))
    data = write_tiff(make_page(65535 - RGB16[:, :, 0], 0))
    np.testing.assert_array_equal(decode_image(data), GREY)


def test_a_picture_of_many_bands_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiff_pixels, "BAND_BYTES", 3000)
    shapes: list[dict[str, Any]] = [{"strip_height": 4}, {"tile": (16, 16)}]
    for shape, compression, planar in product(shapes, (1, 8), (False, True)):
        page = make_page(RGB16, compression=compression, planar=planar, **shape)
        np.testing.assert_array_equal(decode_image(write_tiff(page)), RGB)


def test_values_without_a_place_in_a_byte_are_refused() -> None:
    for value in (1.5, -0.1, np.nan):
        data = write_tiff(make_page(np.full((45, 4, 3), value, np.float32)))
        assert "samples outside 0..1" in find_error(data).detail
    data = write_tiff(make_page(np.full((45, 4), 70000, np.uint32), 1, order=">"), order=">")
    assert "samples outside 0..65535" in find_error(data).detail


def test_a_layout_that_is_not_read_says_so() -> None:
    error = find_error(write_tiff(make_page(RGB, tags={259: ("H", [34712])})))
    assert error.error == "decode_failed"
    assert "a layout that is not read (photometric 2, compression 34712" in error.detail


@pytest.mark.parametrize("compression", [1, 8])
@pytest.mark.parametrize("array", [RGB, RGB16])
@pytest.mark.parametrize("big", [False, True])
def test_a_tiff_with_a_missing_strip_is_truncated(
    compression: int, array: np.ndarray, big: bool
) -> None:
    """As if the directory stood before the pixels and the file were cut there."""
    page = make_page(array, compression=compression)
    data = write_tiff(page, big=big)
    where = (16 if big else 8) + len(page.segments[0]) // 2
    moved = bytearray(data)
    place = data.index(struct.pack("<HHQ" if big else "<HHI", 273, 16 if big else 4, 1))
    place += 12 if big else 8
    struct.pack_into("<I", moved, place, len(data) - where)
    assert find_error(bytes(moved)).error == "truncated"


def test_a_deflated_bomb_is_refused_from_its_header() -> None:
    page = make_page(np.zeros((45, 8), np.float64), 1, compression=8)
    for width, detail in ((2**20, "strips of"), (2**26, "at most 64000000")):
        page.tags[256] = ("I", [width])
        assert detail in find_error(write_tiff(page)).detail


# Which page

SMALL = np.zeros((45, 16, 3), np.uint8)


def test_the_whole_picture_is_taken_and_not_a_reduced_copy_before_it() -> None:
    reduced = make_page(SMALL, tags={254: ("I", [1])})
    old = make_page(SMALL, tags={255: ("H", [2])})
    mask = make_page(SMALL, tags={254: ("I", [4])})
    whole, deep, packed = make_page(RGB), make_page(RGB16), make_page(RGB, compression=8)
    for order, big in product("<>", (False, True)):
        for data, num_frames in (
            (write_tiff(reduced, whole, order=order, big=big), 2),
            (write_tiff(reduced, reduced, packed, order=order, big=big), 3),
            (write_tiff(mask, whole, reduced, order=order, big=big), 3),
            (write_tiff(reduced, reduced, whole, order=order, big=big, sub_pages=True), 1),
            (write_tiff(whole, reduced, order=order, big=big), 2),
            (write_tiff(old, deep, big=big), 2),
        ):
            np.testing.assert_array_equal(decode_image(data), RGB)
            header = inspect_image(data)
            assert (header.width, header.height, header.num_frames) == (61, 45, num_frames)


def make_raw(maker: str, *, version: bool = False) -> bytes:
    tags = {254: ("I", [1]), 271: ("s", [*maker.encode(), 0])}
    if version:
        tags[50706] = ("B", [1, 4, 0, 0])
    raw = make_page(RGB16[:, :, 0], 32803)
    return write_tiff(make_page(SMALL, tags=tags), raw, sub_pages=True)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (make_raw("NIKON CORPORATION"), "NEF"),
        (make_raw("SONY"), "ARW"),
        (make_raw("PENTAX Corporation"), "PEF"),
        (make_raw("Leica", version=True), "DNG"),
        (make_raw("Some Maker"), "a raw file of Some Maker"),
        (write_tiff(make_page(RGB, tags={50706: ("B", [1, 4, 0, 0])})), "DNG"),
        (write_tiff(make_page(SMALL, tags={254: ("I", [1])})), "preview"),
    ],
)
def test_a_raw_file_is_named_and_its_preview_is_not_taken(data: bytes, name: str) -> None:
    for read in (decode_image, inspect_image):
        with pytest.raises(ImageError) as caught:
            read(data)
        assert caught.value.error == "format_not_allowed"
        assert name in caught.value.detail


def test_a_page_that_pillow_writes_reads_as_before() -> None:
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK"):
        image = Image.fromarray(RGB).convert(mode)
        buffer = BytesIO()
        image.save(buffer, "TIFF")
        expected = np.asarray(Image.open(buffer).convert("RGB"))
        np.testing.assert_array_equal(decode_image(buffer.getvalue()), expected)
