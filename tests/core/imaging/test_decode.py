"""The decode policy, on images made here; the last tests read real ones (CIFAKE_TEST_DATA)."""

from __future__ import annotations

import logging
import os
import random
import re
import struct
import tarfile
import time
import tracemalloc
import warnings
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from decode_paths import decode_fast, decode_slow
from PIL import Image, ImageFile, TiffImagePlugin

from cifake_ray.core.imaging import decode as images
from cifake_ray.core.imaging import limits as containers
from cifake_ray.core.imaging.decode import ImageHeader, decode_image, inspect_image
from cifake_ray.core.imaging.jpeg_header import count_scans, scan_jpeg
from cifake_ray.core.imaging.preprocessing import Preprocessing, fit_image
from cifake_ray.core.schema import IMAGE_ERRORS
from cifake_ray.errors import ImageError


def make_pixels(height: int = 40, width: int = 52, seed: int = 0) -> np.ndarray:
    """Smooth colour with some noise: uint8[height, width, 3], no symmetry."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width, 2)
    base = np.stack([x, y, (x + 2 * y) / 3], axis=2) * 220
    return np.clip(base + rng.normal(0, 12, base.shape), 0, 255).astype(np.uint8)


def encode(image: Image.Image | np.ndarray, format: str, **options: Any) -> bytes:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def make_png(
    pixels: np.ndarray, *, depth: int, color: int, width: int, chunks: bytes = b""
) -> bytes:
    """A PNG of raw big-endian rows, for what Pillow cannot write. pixels: [H, ...]."""
    header = struct.pack(">IIBBBBB", width, len(pixels), depth, color, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    parts = [make_chunk(b"IHDR", header), chunks, make_chunk(b"IDAT", zlib.compress(rows))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + make_chunk(b"IEND", b"")


def make_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def make_bomb() -> bytes:
    """20000 x 20000 pixels of 1 bit in about 50 kB."""
    body = zlib.compress((b"\0" + bytes(2500)) * 20000, 9)
    header = struct.pack(">IIBBBBB", 20000, 20000, 1, 0, 0, 0, 0)
    chunks = make_chunk(b"IHDR", header) + make_chunk(b"IDAT", body) + make_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def refuse(data: bytes, read: Callable[[bytes], Any] = decode_image) -> ImageError:
    with pytest.raises(ImageError) as caught:
        read(data)
    assert caught.value.error in IMAGE_ERRORS
    assert caught.value.detail
    return caught.value


def find_error(data: bytes, read: Callable[[bytes], Any] = decode_image) -> ImageError | None:
    try:
        read(data)
    except ImageError as error:
        return error
    return None


# Colour


def test_plain_rgb_comes_back_unchanged_writable_and_contiguous() -> None:
    pixels = make_pixels()
    for format in ("PNG", "BMP", "TIFF"):
        decoded = decode_image(encode(pixels, format))
        assert decoded.dtype == np.uint8
        assert decoded.flags.c_contiguous
        assert decoded.flags.writeable
        np.testing.assert_array_equal(decoded, pixels)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_alpha_is_composited_over_white(mode: str, format: str) -> None:
    alpha = np.array([[0, 64, 128, 255]], dtype=np.uint8)
    value = np.full((1, 4), 80, dtype=np.uint8)
    planes = [value] * (len(mode) - 1) + [alpha]
    image = Image.merge(mode, [Image.fromarray(plane) for plane in planes])
    decoded = decode_image(encode(image, format))
    expected = np.rint(255 - 175.0 * alpha / 255)
    assert np.abs(decoded[0] - expected[0][:, None]).max() <= 1
    np.testing.assert_array_equal(decoded[0, [0, 3]], [[255] * 3, [80] * 3])


def test_palette_with_transparency_is_composited_over_white() -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putdata([0, 1, 2])
    expected = np.array([[[10, 20, 30], [255, 255, 255], [70, 80, 90]]], dtype=np.uint8)
    np.testing.assert_array_equal(decode_image(encode(image, "PNG", transparency=1)), expected)
    np.testing.assert_array_equal(decode_image(encode(image, "GIF", transparency=1)), expected)
    half = decode_image(encode(image, "PNG", transparency=bytes([255, 0, 127])))
    assert abs(int(half[0, 2, 0]) - 163) <= 1  # 70 * 127 / 255 + 255 * 128 / 255
    expected[0, 1] = [40, 50, 60]
    np.testing.assert_array_equal(decode_image(encode(image, "PNG")), expected)


def test_a_colour_key_is_white_in_8_bit_rgb() -> None:
    pixels = np.array([[[1, 2, 3], [9, 9, 9]]], dtype=np.uint8)
    decoded = decode_image(encode(pixels, "PNG", transparency=(1, 2, 3)))
    np.testing.assert_array_equal(decoded, [[[255, 255, 255], [9, 9, 9]]])


def test_cmyk_of_tiff_and_adobe_inverted_cmyk_of_jpeg_agree() -> None:
    cmyk = Image.new("CMYK", (16, 16), (200, 40, 10, 30))
    expected = np.asarray(cmyk.convert("RGB"))[0, 0].astype(int)  # 255 - min(255, C + K) or near
    assert np.abs(expected - [49, 190, 217]).max() <= 6
    jpeg = encode(cmyk, "JPEG", quality=100)
    assert b"Adobe" in jpeg
    assert inspect_image(jpeg).mode == "CMYK"
    for data in (encode(cmyk, "TIFF"), jpeg):
        decoded = decode_image(data)
        assert decoded.shape == (16, 16, 3)
        assert np.abs(decoded.astype(int) - expected).max() <= 3


def test_one_bit_and_grey_become_rgb() -> None:
    grey = make_pixels()[:, :, 0]
    np.testing.assert_array_equal(
        decode_image(encode(grey, "PNG")), np.repeat(grey[:, :, None], 3, 2)
    )
    bits = Image.fromarray(grey).point(lambda v: 255 * (v > 100), "1")
    expected = np.repeat(((grey > 100) * 255).astype(np.uint8)[:, :, None], 3, 2)
    for format in ("PNG", "TIFF", "BMP"):
        np.testing.assert_array_equal(decode_image(encode(bits, format)), expected)


def make_bmp(pixels: np.ndarray, alpha: np.ndarray) -> bytes:
    """32 bits with a mask for alpha, as Windows' own programs write."""
    height, width = alpha.shape
    body = np.dstack([pixels[::-1, :, ::-1], alpha[::-1]]).tobytes()
    numbers = struct.pack("<IiiHHIIiiII", 124, width, height, 1, 32, 3, len(body), 0, 0, 0, 0)
    header = (numbers + struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)).ljust(124, b"\0")
    return b"BM" + struct.pack("<IHHI", 138 + len(body), 0, 0, 138) + header + body


def test_a_bmp_without_one_opaque_byte_has_no_alpha() -> None:
    pixels = make_pixels()
    alpha = np.zeros(pixels.shape[:2], np.uint8)
    np.testing.assert_array_equal(decode_image(make_bmp(pixels, alpha)), pixels)
    alpha[0, 0] = 255
    decoded = decode_image(make_bmp(pixels, alpha))
    np.testing.assert_array_equal(decoded[0, 0], pixels[0, 0])
    assert (decoded[1:] == 255).all()


@pytest.mark.parametrize("place", [33, -12])
@pytest.mark.parametrize(
    ("name", "head"),
    [
        (b"zTXt", b"workflow\0\0"),
        (b"iTXt", b"prompt\0\1\0\0\0"),
        (b"iCCP", b"large\0\0"),
        (b"zTXt", b"Raw profile type exif\0\0"),
    ],
)
def test_pixels_do_not_need_texts_however_large(name: bytes, head: bytes, place: int) -> None:
    pixels = make_pixels()
    good = encode(pixels, "PNG")
    body = head + zlib.compress(bytes(64 * 2**20))
    data = good[:place] + make_chunk(name, body) + good[place:]
    decode_image(good)
    tracemalloc.start()
    np.testing.assert_array_equal(decode_image(data), pixels)
    assert tracemalloc.get_traced_memory()[1] < 20 * 2**20  # none is unpacked whole
    tracemalloc.stop()
    assert inspect_image(data).width == pixels.shape[1]
    broken = good[:place] + make_chunk(name, head + b"no zlib") + good[place:]
    np.testing.assert_array_equal(decode_image(broken), pixels)


@pytest.mark.parametrize("place", [33, -12])
@pytest.mark.parametrize("name", [b"tEXt", b"pHYs", b"tIME", b"zTXt"])
def test_pixels_do_not_need_a_text_whose_checksum_is_wrong(name: bytes, place: int) -> None:
    pixels = make_pixels()
    good = encode(pixels, "PNG")
    data = good[:place] + make_chunk(name, b"a\0text.....")[:-4] + b"none" + good[place:]
    np.testing.assert_array_equal(decode_image(data), pixels)
    assert inspect_image(data).width == pixels.shape[1]


@pytest.mark.parametrize("name", [b"tRNS", b"PLTE"])
def test_a_piece_that_the_picture_needs_must_be_whole(name: bytes) -> None:
    image = Image.fromarray(make_pixels()).quantize(16)
    good = encode(image, "PNG", transparency=3)
    start = good.index(name) + 4
    with pytest.raises(ImageError, match="decode_failed"):
        decode_image(good[:start] + bytes([good[start] ^ 1]) + good[start + 1 :])


def test_the_exif_of_imagemagick_in_a_text_still_turns() -> None:
    pixels = make_pixels()
    exif = Image.Exif()
    exif[0x0112] = 6
    text = f"\nexif\n{len(exif.tobytes())}\n{exif.tobytes().hex()}\n".encode()
    good = encode(pixels, "PNG")
    chunk = make_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text))
    other = make_chunk(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(3 * 2**20)))
    data = good[:33] + chunk + other + good[33:]
    np.testing.assert_array_equal(decode_image(data), np.rot90(pixels, -1))


DEEP = np.array([[0, 128, 129, 255, 256, 32767, 32768, 65534, 65535]], dtype=np.uint16)


def test_16_bit_grey_is_scaled_and_never_clipped() -> None:
    expected = np.rint(DEEP / 257.0)[0].astype(np.uint8)
    big_endian = make_png(DEEP.astype(">u2"), depth=16, color=0, width=9)
    files = [
        big_endian,
        encode(DEEP, "TIFF"),
        encode(DEEP.astype(np.int32), "TIFF"),
        make_big_endian_tiff(DEEP),
    ]
    modes = {inspect_image(data).mode for data in files}
    assert modes >= {"I;16", "I", "I;16B"}
    for data in files:
        decoded = decode_image(data)
        for channel in range(3):
            np.testing.assert_array_equal(decoded[0, :, channel], expected)


def make_big_endian_tiff(values: np.ndarray) -> bytes:
    height, width = values.shape
    body = values.astype(">u2").tobytes()
    shorts = {256: width, 257: height, 258: 16, 259: 1, 262: 1, 277: 1}
    entries = {tag: struct.pack(">HHIHH", tag, 3, 1, v, 0) for tag, v in shorts.items()}
    offset = 8 + 2 + 12 * 8 + 4
    entries |= {t: struct.pack(">HHII", t, 4, 1, v) for t, v in ((273, offset), (279, len(body)))}
    directory = b"".join(entries[tag] for tag in sorted(entries))
    return b"MM\0*" + struct.pack(">IH", 8, len(entries)) + directory + bytes(4) + body


def test_16_bit_colour_is_scaled_and_never_clipped() -> None:
    rgb = np.repeat(DEEP[:, :, None], 3, axis=2).astype(">u2")
    data = make_png(rgb, depth=16, color=2, width=9)
    decoded = decode_image(data)
    assert inspect_image(data).mode == "RGB"
    assert np.abs(decoded.astype(float) - rgb / 257.0).max() <= 1
    # A 16-bit colour key must not turn unrelated pixels white.
    key = make_chunk(b"tRNS", b"\x80\0" * 3)
    keyed = make_png(rgb, depth=16, color=2, width=9, chunks=key)
    np.testing.assert_array_equal(decode_image(keyed), decoded)


def test_a_16_bit_grey_colour_key_is_white() -> None:
    key = make_chunk(b"tRNS", struct.pack(">H", 32768))
    decoded = decode_image(make_png(DEEP.astype(">u2"), depth=16, color=0, width=9, chunks=key))
    assert decoded[0, :, 0].tolist() == [0, 0, 1, 1, 1, 127, 255, 255, 255]


def test_float_tiff_is_read_in_0_to_1_and_refused_outside() -> None:
    values = np.array([[0.0, 0.25, 0.5, 1.0]], dtype=np.float32)
    assert decode_image(encode(values, "TIFF"))[0, :, 1].tolist() == [0, 64, 128, 255]
    for bad in (1.5, -0.1, np.nan, np.inf):
        data = encode(np.array([[0.5, bad]], dtype=np.float32), "TIFF")
        assert inspect_image(data).mode == "F"
        assert refuse(data).error == "decode_failed"
    assert refuse(encode(np.array([[70000]], dtype=np.int32), "TIFF")).error == "decode_failed"


# Orientation


def turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """What a camera that writes this orientation stores, written from the tag's definition:
    where the 0th row and the 0th column of the stored image are on the upright one."""
    stored = {
        1: pixels,  # top, left
        2: np.fliplr(pixels),  # top, right
        3: np.rot90(pixels, 2),  # bottom, right
        4: np.flipud(pixels),  # bottom, left
        5: np.swapaxes(pixels, 0, 1),  # left, top
        6: np.rot90(pixels, 1),  # right, top
        7: np.rot90(np.swapaxes(pixels, 0, 1), 2),  # right, bottom
        8: np.rot90(pixels, -1),  # left, bottom
    }
    return np.ascontiguousarray(stored[orientation])


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_eight_orientations_give_the_upright_pixels(format: str, orientation: int) -> None:
    # Blocks of 16: JPEG of flat blocks at quality 100 is the same whichever way it is turned.
    small = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    upright = np.repeat(np.kron(small, np.ones((16, 16), dtype=np.uint8))[:, :, None], 3, axis=2)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = turn(upright, orientation)
    options: dict[str, Any] = {"JPEG": {"quality": 100}, "WEBP": {"lossless": True}}
    data = encode(stored, format, exif=exif, **options.get(format, {}))
    decoded = decode_image(data)
    assert decoded.flags.c_contiguous
    np.testing.assert_array_equal(decoded, upright)
    facts = inspect_image(data)
    assert (facts.height, facts.width) == stored.shape[:2]


def test_the_orientation_of_xmp_counts_where_exif_has_none() -> None:
    pixels = make_pixels(16, 32)
    plain = encode(pixels, "JPEG")
    body = b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>'
    data = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + plain[2:]
    np.testing.assert_array_equal(decode_image(data), np.rot90(decode_image(plain), -1))


@pytest.mark.parametrize("format", ["PNG", "AVIF", "WEBP", "TIFF"])
def test_the_orientation_of_xmp_counts_in_jpeg_alone(format: str) -> None:
    pixels = make_pixels(16, 32)
    xmp = b'<x tiff:Orientation="6"/>'
    plain, options = encode(pixels, format), {"xmp": xmp}
    if format == "PNG":
        body = b"XML:com.adobe.xmp\0\0\0\0\0" + xmp
        data = plain[:33] + make_chunk(b"iTXt", body) + plain[33:]
    elif format == "TIFF":
        ifd = TiffImagePlugin.ImageFileDirectory_v2()
        ifd[700] = xmp
        data = encode(pixels, format, tiffinfo=ifd)
    else:
        data = encode(pixels, format, **options)
    assert xmp in data
    np.testing.assert_array_equal(decode_image(data), decode_image(plain))


def test_corrupt_exif_counts_as_none_and_warns_nobody(
    recwarn: pytest.WarningsRecorder, capfd: pytest.CaptureFixture[str]
) -> None:
    pixels = make_pixels()
    exif = Image.Exif()
    exif[0x0112] = 6
    good = exif.tobytes()
    for broken in (b"Exif\0\0garbage", good[:14], good[:-6], b"Exif\0\0II*\0\xff\xff\xff\xff"):
        np.testing.assert_array_equal(decode_image(encode(pixels, "PNG", exif=broken)), pixels)
        assert decode_image(encode(pixels, "JPEG", exif=broken)).shape == pixels.shape
    assert not recwarn.list
    assert capfd.readouterr().err == ""


# Frames


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF", "MPO", "AVIF", "HEIF"])
def test_the_first_of_several_frames_is_decoded_and_all_are_counted(format: str) -> None:
    frames = [Image.new("RGB", (24, 16), color) for color in ("red", "lime", "blue")]
    data = encode(frames[0], format, save_all=True, append_images=frames[1:], duration=50)
    facts = inspect_image(data)
    assert (facts.format, facts.num_frames) == (format, 3)
    assert (facts.width, facts.height) == (24, 16)
    assert np.abs(decode_image(data).astype(int) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize("format", ["JPEG", "GIF", "WEBP", "PNG", "TIFF", "BMP", "AVIF", "HEIF"])
def test_a_still_has_one_frame(format: str) -> None:
    facts = inspect_image(encode(make_pixels(16, 24), format))
    assert (facts.format, facts.num_frames) == (format, 1)
    assert (facts.width, facts.height) == (24, 16)
    assert (facts.jpeg_quality is None) == (format != "JPEG")


# What is refused


def test_zero_bytes_are_empty() -> None:
    assert refuse(b"").error == "empty"
    assert refuse(b"", inspect_image).error == "empty"


@pytest.mark.parametrize(
    "data",
    [
        b"hello world, I am a text file\n" * 9,
        b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        b'{"error": "denied"}',
        b"BMW makes cars",
        b"P3 is the name of a cafe",
        bytes(1000),
        b"\xff",
        b"<html><body><svg></svg></body></html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    ],
)
def test_other_bytes_are_not_an_image(data: bytes) -> None:
    for read in (decode_image, inspect_image):
        assert refuse(data, read).error == "not_an_image"


@pytest.mark.parametrize("format", ["PPM", "PCX", "EPS", "JPEG2000", "ICO", "SGI", "DDS"])
def test_an_image_of_another_format_is_not_allowed(format: str) -> None:
    for read in (decode_image, inspect_image):
        error = refuse(encode(make_pixels(32, 32), format), read)
        assert error.error == "format_not_allowed"
        assert format in error.detail


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"\xff\x0a" + bytes(64), "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(64), "JPEG XL"),
        (b"\0\0\0\x18ftypcrx \0\0\0\1crx isom", "CR3"),
        (b"FUJIFILMCCD-RAW 0201", "RAF"),
        (b"IIRO\x08\0\0\0", "ORF"),
        (b"IIU\0\x18\0\0\0", "RW2"),
        (b"II*\0\x10\0\0\0CR\2\0" + bytes(4) + b"\0\0\0\0\0\0", "CR2"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (
            b"\xef\xbb\xbf<?xml?>\n<!-- x -->\n<!DOCTYPE svg [<!ENTITY a 'b'>]>\n<svg >",
            "SVG",
        ),
        (b"%PDF-1.7 ...", "PDF"),
        (b"8BPS\0\1" + bytes(64), "PSD"),
        (b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41", "MP4 or QuickTime video"),
        (b"\0\0\0\x14ftypqt  \0\0\0\0qt  ", "MP4 or QuickTime video"),
        (b"\x1aE\xdf\xa3" + bytes(64), "WebM"),
        (b"RIFF\0\1\0\0AVI LIST", "AVI video"),
    ],
)
def test_a_picture_or_film_that_is_not_read_is_named(data: bytes, name: str) -> None:
    for read in (decode_image, inspect_image):
        error = refuse(data, read)
        assert (error.error, error.detail.split(" (")[0].split(",")[0]) == (
            "format_not_allowed",
            name if name != "WebM" else "Matroska or WebM video",
        )


def test_what_lies_in_the_place_of_an_image_is_named() -> None:
    for data, remedy in (
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"<!DOCTYPE html><title>429 Too Many Requests</title>", "HTML"),
        (b"PK\3\4" + bytes(64), "ZIP"),
    ):
        assert remedy in refuse(data).detail


def test_an_svg_of_endless_comments_is_named_in_time() -> None:
    start_s = time.perf_counter()
    assert refuse(b"<!--" * 20_000).error == "not_an_image"
    assert refuse(b" <?x?><!-- -->" * 20_000).error == "not_an_image"
    assert time.perf_counter() - start_s < 2


def test_too_many_bytes_are_refused_before_they_are_read() -> None:
    data = encode(make_pixels(), "PNG")
    over = data + bytes(images.MAX_IMAGE_BYTES + 1 - len(data))
    for read in (decode_image, inspect_image):
        assert refuse(over, read).error == "too_large"


@pytest.mark.parametrize("read", [decode_image, inspect_image])
@pytest.mark.parametrize("pillow_limit", [None, 10_000, 100_000_000])
def test_a_bomb_is_refused_from_its_header(
    read: Callable[[bytes], Any],
    pillow_limit: int | None,
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
) -> None:
    data = make_bomb()
    assert len(data) < 100_000
    refuse(data, read)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillow_limit)
    tracemalloc.start()
    start_s = time.perf_counter()
    error = refuse(data, read)
    elapsed_s = time.perf_counter() - start_s
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert error.error == "too_many_pixels"
    assert elapsed_s < 0.2  # decoding takes a second
    assert peak_bytes < 2**20
    assert not recwarn.list


@pytest.mark.parametrize("size", [(8000, 8000), (8001, 8000), (12000, 8000)])
def test_the_pixel_cap_is_ours_and_not_pillows(size: tuple[int, int]) -> None:
    """64 MP pass inspection, one column more does not; 96 MP is where Pillow would only warn."""
    header = struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + make_chunk(b"IHDR", header) + make_chunk(b"IDAT", b"x")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if size == (8000, 8000):
            assert inspect_image(data).width == 8000
        else:
            assert refuse(data).error == refuse(data, inspect_image).error == "too_many_pixels"


def test_a_jpeg_of_too_many_pixels_is_refused_by_both_paths() -> None:
    data = bytearray(encode(make_pixels(16, 16), "JPEG"))
    sof = data.index(b"\xff\xc0")
    data[sof + 5 : sof + 9] = struct.pack(">HH", 20000, 20000)
    for read in (decode_image, inspect_image):
        assert refuse(bytes(data), read).error == "too_many_pixels"


def set_size(data: bytes, width: int, height: int) -> bytes:
    """AVIF or HEIF with another size in its header than its pixels have."""
    size = struct.pack(">4xII", width, height)
    changed = re.sub(rb"ispe.{12}", lambda _: b"ispe" + size, data, flags=re.DOTALL)
    assert changed != data
    return changed


@pytest.mark.parametrize("format", ["AVIF", "HEIF"])
def test_a_container_of_too_many_pixels_is_refused_from_its_header(format: str) -> None:
    data = set_size(encode(make_pixels(64, 64), format), 17_000, 17_000)
    for read in (decode_image, inspect_image):
        assert refuse(data, read).error == "too_many_pixels"


def test_more_pixels_than_the_header_of_a_heif_says_are_not_decoded() -> None:
    data = set_size(encode(Image.new("RGB", (2000, 2000)), "HEIF"), 64, 64)
    assert len(data) < 10_000
    assert inspect_image(data).width == 64
    assert refuse(data).error == "decode_failed"


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_jpeg_of_very_many_pixels_is_decoded_at_half_size(
    mode: str, progressive: bool, orientation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A telephone's 108 megapixels; here on a smaller scale."""
    pixels = np.repeat(np.repeat(make_pixels(51, 67), 2, 0), 2, 1)[:101, :133]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95, "subsampling": 0, "progressive": progressive, "exif": exif}
    if orientation == 1:
        del options["exif"]
    data = encode(Image.fromarray(pixels).convert(mode), "JPEG", **options)
    whole = decode_image(data)
    for limit in ("MAX_IMAGE_PIXELS", "MAX_PROGRESSIVE_PIXELS", "MAX_JPEG_PIXELS"):
        monkeypatch.setattr(images, limit, 101 * 133 - (limit == "MAX_IMAGE_PIXELS"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 101 * 60)
    half = decode_image(data)
    assert half.shape == ((51, 67, 3) if orientation == 1 else (67, 51, 3))
    assert np.abs(half[:50, :50].astype(int) - whole[:100:2, :100:2]).mean() < 12
    fast = decode_fast(data)
    assert (fast is not None) == (mode == "RGB")
    np.testing.assert_array_equal(decode_slow(data), half)
    header = inspect_image(data)
    assert (header.width, header.height) == (133, 101)
    monkeypatch.setattr(images, "MAX_PROGRESSIVE_PIXELS", 101 * 133 - 1)
    assert progressive == (find_error(data) is not None)
    monkeypatch.setattr(images, "MAX_JPEG_PIXELS", 101 * 133 - 1)
    assert refuse(data).error == refuse(data, inspect_image).error == "too_many_pixels"


CUT = [
    ("JPEG", {}),
    ("JPEG", {"progressive": True}),
    ("PNG", {}),
    ("GIF", {}),
    ("WEBP", {}),
    ("WEBP", {"lossless": True}),
    ("BMP", {}),
    ("TIFF", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
    ("AVIF", {}),
    ("HEIF", {}),
]


@pytest.mark.parametrize(("format", "options"), CUT)
def test_a_file_cut_anywhere_is_truncated(format: str, options: dict[str, Any]) -> None:
    data = encode(make_pixels(), format, **options)
    for cut in [*np.linspace(40, len(data) - 40, 60, dtype=int).tolist(), 20, 30]:
        assert refuse(data[:cut]).error == "truncated", cut


@pytest.mark.parametrize("progressive", [False, True])
def test_no_truncated_jpeg_slips_through_the_fast_path(progressive: bool) -> None:
    data = encode(make_pixels(64, 64), "JPEG", progressive=progressive)
    for cut in range(4, len(data) - 2, 7):
        assert decode_fast(data[:cut]) is None
        if not progressive:  # cut between two scans and closed, that is a complete coarser image
            assert decode_fast(data[:cut] + b"\xff\xd9") is None
        assert refuse(data[:cut]).error == "truncated"


def test_truncation_is_refused_even_where_another_library_allows_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = encode(make_pixels(), "PNG")
    assert refuse(data[: len(data) // 2]).error == "truncated"


def test_damage_inside_a_complete_file_is_decode_failed_with_the_name_of_the_exception() -> None:
    data = bytearray(encode(make_pixels(), "PNG"))
    middle = len(data) // 2
    data[middle : middle + 40] = bytes(40)
    error = refuse(bytes(data))
    assert error.error == "decode_failed"
    assert "Error" in error.detail or "error" in error.detail
    header = bytearray(encode(make_pixels(), "PNG"))
    header[24] = 77  # bit depth
    assert refuse(bytes(header)).error == "decode_failed"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "HEIF"])
def test_random_damage_gives_pixels_or_a_defined_error(format: str) -> None:
    rng = np.random.default_rng(7)
    good = encode(make_pixels(), format)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(150):
            data = bytearray(good)
            for place in rng.integers(0, min(len(data), 400), rng.integers(1, 5)):
                data[place] = rng.integers(256)
            for read in (inspect_image, decode_image):
                error = find_error(bytes(data), read)
                if error:
                    assert error.error in IMAGE_ERRORS
                    assert "object at 0x" not in error.detail, "an address makes two runs differ"


def test_what_pillow_logs_stays_off_the_terminal() -> None:
    assert any(isinstance(h, logging.NullHandler) for h in logging.getLogger("PIL").handlers)


# Files that cost time instead of memory


def flood(format: str, count: int) -> bytes:
    """A good small file with `count` pieces more that say nothing."""
    good = encode(make_pixels(16, 16), format)
    if format == "PNG":
        return good[:33] + make_chunk(b"teSt", b"") * count + good[33:]
    if format == "GIF":
        return good[:-1] + b",\0\0\0\0\1\0\1\0\0\2\2D\1\0" * count + b";"
    return good[:20] + {"JPEG": b"\xff", "MPO": b"\xff\xfe\0\2"}[format] * count + good[20:]


@pytest.mark.parametrize("format", ["JPEG", "MPO", "PNG", "GIF"])
def test_millions_of_tiny_pieces_are_refused(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 MiB of them kept Pillow busy for 9 to 60 seconds."""
    monkeypatch.setattr(containers, "MAX_READS", 10_000)
    error = refuse(flood(format, 12_000), inspect_image)
    assert error.error == "decode_failed"
    assert "more than 10000 pieces" in error.detail
    if format != "GIF":  # only the count of its frames is long
        assert "more than 10000 pieces" in refuse(flood(format, 12_000)).detail
    assert inspect_image(flood(format, 1000)).width == 16
    assert decode_image(flood(format, 1000)).shape == (16, 16, 3)


def test_the_pieces_of_a_real_file_are_refused_in_seconds() -> None:
    start_s = time.perf_counter()
    assert "more than 1000000 pieces" in refuse(flood("JPEG", 2_000_000)).detail
    assert time.perf_counter() - start_s < 10


def make_scans(num_scans: int, size: int) -> bytes:
    """A progressive JPEG that repeats its last scan."""
    data = encode(Image.new("RGB", (size, size), (9, 99, 199)), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * (num_scans - 10) + data[-2:]


def test_a_jpeg_of_very_many_scans_is_refused_and_an_optimised_one_is_not() -> None:
    data = make_scans(500, 8000)
    assert len(data) < 500_000
    start_s = time.perf_counter()
    error = refuse(data)
    assert time.perf_counter() - start_s < 2  # decoding takes over a minute
    assert (error.error, error.detail) == ("decode_failed", "500 scans of 8000 x 8000 pixels")
    assert decode_fast(data) is None
    assert decode_image(make_scans(64, 1000)).shape == (1000, 1000, 3)


def test_scans_are_counted_to_the_end_marker() -> None:
    data = make_scans(12, 64)
    assert count_scans(data) == 12
    assert count_scans(encode(make_pixels(), "JPEG")) == 1
    assert count_scans(data + b"\xff\xda" * 99) == 12  # a film after a still, say
    hidden = data[:2] + b"\xff\xfe\0\x0a" + b"\xff\xda\xff\xd9" * 2 + data[2:]
    assert count_scans(hidden) == 12  # inside a comment
    assert count_scans(data[:2] + b"\xff\xfe\0\2" * 9999 + data[2:]) == 4096
    for cut in range(0, len(data), 3):
        assert count_scans(data[:cut]) <= 12


def test_runs_of_a_bmp_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "MAX_READS", 10_000)
    palette, body = bytes(1024), b"\1\1" * 20_000
    header = struct.pack("<IiiHHIIiiII", 40, 200, 100, 1, 8, 1, len(body), 0, 0, 256, 0)
    start = 14 + len(header) + len(palette)
    data = b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start) + header + palette + body
    assert "more than 10000 pieces" in refuse(data).detail


def test_a_claim_of_more_frames_than_a_table_can_hold_is_refused() -> None:
    data = encode(make_pixels(), "PNG")
    claim = make_chunk(b"acTL", struct.pack(">II", 2**31, 0))
    assert "2147483649 frames" in refuse(data[:33] + claim + data[33:], inspect_image).detail


@pytest.mark.parametrize("big_tiff", [False, True])
def test_pages_of_a_tiff_are_counted_once_each(big_tiff: bool) -> None:
    pages = [Image.new("L", (5, 4)) for _ in range(7)]
    data = encode(pages[0], "TIFF", save_all=True, append_images=pages[1:], big_tiff=big_tiff)
    assert inspect_image(data).num_frames == 7
    still = encode(pages[0], "TIFF", big_tiff=big_tiff)
    assert inspect_image(still).num_frames == 1
    if not big_tiff:  # a directory whose next one is itself
        (start,) = struct.unpack_from("<I", still, 4)
        (count,) = struct.unpack_from("<H", still, start)
        link = start + 2 + 12 * count
        loop = still[:link] + struct.pack("<I", start) + still[link + 4 :]
        beyond = still[:link] + struct.pack("<I", 2**31) + still[link + 4 :]
        assert inspect_image(loop).num_frames == inspect_image(beyond).num_frames == 1


def test_a_hundred_thousand_pages_are_counted_in_time() -> None:
    tags = {256: 1, 257: 1, 258: 8, 262: 1, 273: 8, 279: 1}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    size = 2 + len(entries) + 4
    pages = [
        struct.pack("<H", len(tags)) + entries + struct.pack("<I", 8 + size * (n + 1))
        for n in range(100_000)
    ]
    start_s = time.perf_counter()
    assert inspect_image(b"II*\0\x08\0\0\0" + b"".join(pages)).num_frames == 100_000
    assert time.perf_counter() - start_s < 3


# Fast path and quality


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "4:1:1"])
@pytest.mark.parametrize("progressive", [False, True])
def test_the_fast_path_equals_the_slow_one(subsampling: str, progressive: bool) -> None:
    sizes = [(1, 1), (2, 3), (7, 9), (8, 8), (15, 17), (32, 32), (33, 65), (100, 1), (1, 100)]
    for seed, (height, width) in enumerate(sizes):
        pixels = make_pixels(height, width, seed)
        for quality in (5, 30, 75, 90, 100):
            data = encode(
                pixels,
                "JPEG",
                quality=quality,
                subsampling=subsampling,
                progressive=progressive,
                restart_marker_blocks=seed % 3,
            )
            fast = decode_fast(data)
            if subsampling == "4:1:1" and fast is None:
                continue  # doubt is allowed, a difference is not
            assert fast is not None
            np.testing.assert_array_equal(fast, decode_slow(data))
            assert fast.flags.writeable


def test_plain_cifake_like_jpegs_never_open_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(make_pixels(32, 32), "JPEG")
    expected = decode_slow(data)
    monkeypatch.setattr(images, "_open_image", None)
    np.testing.assert_array_equal(decode_image(data), expected)
    assert inspect_image(data) == ImageHeader(32, 32, "JPEG", "RGB", 75, 1)


@pytest.mark.parametrize("orientation", [*range(10), None])
def test_jpegs_with_exif_take_the_fast_path_and_equal_pillow(orientation: int | None) -> None:
    exif = Image.Exif()
    exif[0x010F] = "maker"
    if orientation is not None:
        exif[0x0112] = orientation
    data = encode(make_pixels(41, 67), "JPEG", exif=exif)
    fast = decode_fast(data)
    assert fast is not None
    np.testing.assert_array_equal(fast, decode_slow(data))
    assert fast.shape == ((67, 41, 3) if orientation in (5, 6, 7, 8) else (41, 67, 3))
    assert fast.flags.c_contiguous
    assert fast.flags.writeable
    xmp = b'<x tiff:Orientation="3"/>'  # counts only where EXIF says nothing
    data = encode(make_pixels(41, 67), "JPEG", exif=exif, xmp=xmp)
    assert (decode_fast(data) is None) == (orientation is None)
    expected = np.rot90(decode_slow(encode(make_pixels(41, 67), "JPEG")), 2)
    if orientation is None:
        np.testing.assert_array_equal(decode_image(data), expected)
    else:
        np.testing.assert_array_equal(decode_image(data), decode_slow(data))


def test_one_pass_gives_header_pixels_and_errors_of_two() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels, tall = make_pixels(90, 70), make_pixels(300, 20)
    files = [
        *(encode(pixels, format) for format in ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "AVIF")),
        *(encode(pixels, format, exif=exif) for format in ("JPEG", "PNG", "WEBP", "TIFF")),
        *(encode(tall, format) for format in ("JPEG", "PNG", "TIFF")),
        encode(pixels[:32, :32], "PNG"),
        encode(pixels, "GIF", save_all=True, append_images=[Image.fromarray(pixels[::-1])]),
        encode(pixels, "MPO", save_all=True, append_images=[Image.fromarray(pixels)]),
    ]
    broken = [b"", b"text", make_bomb(), *(data[: len(data) // 2] for data in files)]
    for fit in ("resize", "crop"):
        made = Preprocessing(**{**GOOD, "fit": fit})
        for data in files:
            header, fitted = made.load_with_header(data)
            assert header == inspect_image(data)
            expected = fit_image(decode_image(data), size=32, fit=made.fit)
            np.testing.assert_array_equal(fitted, expected)
            np.testing.assert_array_equal(made.load_image(data), expected)
            assert fitted.flags.writeable
        for data in broken:
            error = find_error(data, inspect_image) or refuse(data)
            both = refuse(data, made.load_with_header)
            assert (both.error, both.detail) == (error.error, error.detail)


def test_a_header_that_is_refused_comes_before_pixels_that_are_not() -> None:
    still = encode(make_pixels(), "PNG")
    chunk = make_chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0))
    data = still[:33] + chunk + still[33:]
    made = Preprocessing(**GOOD)
    assert refuse(data, made.load_with_header).detail == refuse(data, inspect_image).detail
    assert find_error(data, made.load_image) == find_error(data)


def test_what_needs_judgement_is_left_to_pillow() -> None:
    rgb = make_pixels()
    for data in (
        encode(rgb, "JPEG", xmp=b"<x/>"),
        encode(rgb[:, :, 0], "JPEG"),
        encode(Image.fromarray(rgb).convert("CMYK"), "JPEG"),
        encode(rgb, "JPEG", keep_rgb=True),
        encode(rgb, "MPO", save_all=True, append_images=[Image.fromarray(rgb)]),
        encode(rgb, "PNG"),
    ):
        assert decode_fast(data) is None
    np.testing.assert_array_less(
        np.abs(decode_image(encode(rgb, "JPEG", keep_rgb=True, quality=100)).astype(int) - rgb), 4
    )


def test_the_scan_agrees_with_pillow_and_survives_every_cut() -> None:
    for quality, mode in ((75, "RGB"), (90, "L"), (40, "CMYK")):
        data = encode(Image.fromarray(make_pixels()).convert(mode), "JPEG", quality=quality)
        facts = inspect_image(data)
        opened = Image.open(BytesIO(data))
        assert (facts.width, facts.height) == opened.size
        assert (facts.format, facts.mode) == (opened.format, opened.mode)
        for cut in range(len(data)):
            scan_jpeg(data[:cut])


def test_the_quality_of_every_setting_is_found_again() -> None:
    pixels = make_pixels(8, 8)
    found = [
        inspect_image(encode(pixels, "JPEG", quality=quality)).jpeg_quality
        for quality in range(1, 101)
    ]
    assert found == list(range(1, 101))


def test_the_quality_of_a_foreign_table_is_the_nearest() -> None:
    data = encode(make_pixels(8, 8), "JPEG", quality=80)
    table = data.index(b"\xff\xdb") + 5
    changed = bytearray(data)
    changed[table + 40] += 1
    assert inspect_image(bytes(changed)).jpeg_quality == 80
    several = encode(Image.new("RGB", (8, 8)), "MPO", save_all=True, quality=60, append_images=[])
    assert inspect_image(several).jpeg_quality == 60


# Fitting


@pytest.mark.parametrize("fit", ["resize", "crop"])
@pytest.mark.parametrize(
    "shape", [(32, 32), (31, 33), (1, 1), (1, 400), (400, 1), (64, 48), (17, 90), (5, 5)]
)
def test_fit_gives_the_square_asked_for(fit: images.Fit, shape: tuple[int, int]) -> None:
    fitted = fit_image(make_pixels(*shape), size=32, fit=fit)
    assert fitted.shape == (32, 32, 3)
    assert fitted.dtype == np.uint8
    assert fitted.flags.c_contiguous


@pytest.mark.parametrize("fit", ["resize", "crop"])
def test_fit_leaves_a_fitting_image_alone(fit: images.Fit) -> None:
    pixels = make_pixels(32, 32)
    assert fit_image(pixels, size=32, fit=fit) is pixels


def test_crop_never_resamples_and_reflects_what_is_missing() -> None:
    pixels = make_pixels(60, 41)
    cropped = fit_image(pixels, size=32, fit="crop")
    np.testing.assert_array_equal(cropped, pixels[14:46, 4:36])
    assert cropped.base is None, "a view would keep the whole image alive"
    small = fit_image(pixels[:4, :6], size=8, fit="crop")
    np.testing.assert_array_equal(small[2:6, 1:7], pixels[:4, :6])
    np.testing.assert_array_equal(small[1, 1:7], pixels[0, :6])
    np.testing.assert_array_equal(small[0, 1:7], pixels[1, :6])
    np.testing.assert_array_equal(small[2:6, 0], pixels[:4, 0])


def test_resize_is_pillows_bicubic_of_the_shorter_side_then_the_centre() -> None:
    pixels = make_pixels(100, 151)
    whole = np.asarray(Image.fromarray(pixels).resize((48, 32), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(fit_image(pixels, size=32, fit="resize"), whole[:, 8:40])


def test_a_long_strip_costs_no_memory() -> None:
    strip = np.zeros((1, 3_000_000, 3), dtype=np.uint8)
    tracemalloc.start()
    for fit in ("resize", "crop"):
        fit_image(strip, size=224, fit=fit)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 20 * 2**20


@pytest.mark.parametrize(
    "pixels", [np.zeros((4, 4)), np.zeros((4, 4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)]
)
def test_fit_refuses_what_is_no_image(pixels: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8"):
        fit_image(pixels, size=4, fit="crop")


# Preprocessing

GOOD: dict[str, Any] = {
    "image_size": 32,
    "fit": "resize",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.25, 0.25, 1),
}


def test_preprocessing_survives_its_dict_and_loads_images() -> None:
    made = Preprocessing(**GOOD)
    assert Preprocessing.from_dict(made.to_dict()) == made
    assert isinstance(made.to_dict()["mean"], list)
    data = encode(make_pixels(100, 151), "PNG")
    np.testing.assert_array_equal(
        made.load_image(data), fit_image(decode_image(data), size=32, fit="resize")
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image_size", 0),
        ("image_size", 32.0),
        ("image_size", 10**6),
        ("fit", "stretch"),
        ("mean", (0.5, 0.5)),
        ("mean", (124, 116, 104)),
        ("mean", [0.5, 0.5, 0.5]),
        ("mean", (float("nan"), 0.5, 0.5)),
        ("std", (0.0, 0.5, 0.5)),
        ("std", ("a", 0.5, 0.5)),
    ],
)
def test_preprocessing_refuses_the_impossible_by_name(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{name}="):
        Preprocessing(**{**GOOD, name: value})


@pytest.mark.parametrize("change", [{"crop_pct": 0.9}, {"fit": None}])
def test_preprocessing_refuses_unknown_and_missing_keys(change: dict[str, Any]) -> None:
    values = Preprocessing(**GOOD).to_dict() | change
    if change == {"fit": None}:
        del values["fit"]
    with pytest.raises(ValueError, match="exactly"):
        Preprocessing.from_dict(values)


# JPEGs at a smaller scale

EXACT, SCALED = Preprocessing(**GOOD), Preprocessing(**GOOD, jpeg_scale=True)


def measure_scaling(data: bytes) -> tuple[float, int]:
    """The mean and the largest difference that the smaller scale makes."""
    difference = np.abs(SCALED.load_image(data).astype(int) - EXACT.load_image(data))
    return float(difference.mean()), int(difference.max())


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("shape", [(389, 401), (771, 1001), (1999, 1537)])
def test_a_smaller_scale_changes_next_to_nothing(
    shape: tuple[int, int], mode: str, orientation: int
) -> None:
    """Blocks as large as a pixel of the result, which no shift of the picture would leave alone."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    blocks = np.random.default_rng(0).integers(64, 192, (200, 200, 3)).astype(np.uint8)
    pixels = np.kron(blocks, np.ones((12, 12, 1), np.uint8))[: shape[0], : shape[1]]
    image = Image.fromarray(pixels).convert(mode)
    mean, most = measure_scaling(encode(image, "JPEG", quality=90, exif=exif))
    assert 0 < mean < 0.4
    assert most <= 4


def test_both_paths_give_the_same_pixels_at_each_scale() -> None:
    data = encode(make_pixels(401, 533), "JPEG", progressive=True)
    for min_side, factor in ((201, 1), (200, 2), (100, 4), (50, 8), (1, 8)):
        fast = images._decode_fast(images._File(data), min_side)
        slow = images._decode_slow(images._File(data), min_side)
        assert fast is not None
        np.testing.assert_array_equal(fast.to_array(), slow.to_array())
        assert fast.to_array().shape == (-(-401 // factor), -(-533 // factor), 3)
        assert fast.scaled == slow.scaled == (None if factor == 1 else (533 / factor, 401 / factor))


def test_what_is_small_long_or_no_jpeg_or_cropped_is_decoded_whole() -> None:
    large, crop = make_pixels(400, 500), Preprocessing(**{**GOOD, "fit": "crop"}, jpeg_scale=True)
    assert measure_scaling(encode(large, "JPEG"))[0] > 0
    for data in (
        encode(make_pixels(383, 500), "JPEG"),
        encode(make_pixels(1541, 385), "JPEG"),
        encode(large, "PNG"),
    ):
        assert measure_scaling(data) == (0, 0)
    whole = fit_image(decode_image(encode(large, "JPEG")), size=32, fit="crop")
    np.testing.assert_array_equal(crop.load_image(encode(large, "JPEG")), whole)


def test_bundles_older_than_the_smaller_scale_keep_every_bit() -> None:
    older = EXACT.to_dict()
    del older["jpeg_scale"]
    assert Preprocessing.from_dict(older) == EXACT != SCALED
    assert Preprocessing.from_dict(SCALED.to_dict()) == SCALED


# Real images


def read_real(archive: str, *, count: int, seed: int = 0) -> list[tuple[str, bytes]]:
    """A sample of `count` images; a compressed tar is read once, from its start, no further."""
    folder = os.environ.get("CIFAKE_TEST_DATA")
    if not folder:
        pytest.skip(f"CIFAKE_TEST_DATA is unset: give the folder that holds {archive}")
    found = []
    with tarfile.open(Path(folder) / archive) as tar:
        if archive.endswith(".xz"):
            members = (m for i, m in enumerate(tar) if m.isfile() and i % 7 == 0)
        else:
            every = [m for m in tar if m.isfile() and not m.name.endswith(".csv")]
            members = (m for m in random.Random(seed).sample(every, min(count, len(every))))
        for member in members:
            file = tar.extractfile(member)
            assert file
            found.append((member.name, file.read()))
            if len(found) == count:
                break
    assert found
    return found


def test_every_real_mixed_image_decodes_or_is_refused_by_name_and_fast_equals_slow() -> None:
    num_fast = num_good = 0
    files = read_real("mixed-generators.tar", count=400)
    for name, data in files:
        error = find_error(data)
        if error:
            assert error.error in IMAGE_ERRORS, name
            continue
        decoded, facts = decode_image(data), inspect_image(data)
        num_good += 1
        num_fast += decode_fast(data) is not None
        np.testing.assert_array_equal(decoded, decode_slow(data), err_msg=name)
        with Image.open(BytesIO(data)) as opened:
            assert (facts.width, facts.height) == opened.size, name
            assert (facts.format, facts.mode) == (opened.format, opened.mode), name
    assert num_good > 0.99 * len(files)
    assert num_fast > 0.5 * len(files)


def test_real_cifake_takes_the_fast_path_and_equals_the_slow_one() -> None:
    for name, data in read_real("cifake.tar.xz", count=500):
        fast = decode_fast(data)
        assert fast is not None, name
        np.testing.assert_array_equal(fast, decode_slow(data), err_msg=name)
        assert inspect_image(data) == ImageHeader(32, 32, "JPEG", "RGB", 75, 1), name


def test_a_smaller_scale_changes_no_real_image_by_more_than_it_says() -> None:
    means, most = [], 0
    for _, data in read_real("mixed-generators.tar", count=400, seed=1):
        if find_error(data) is None and (found := measure_scaling(data)) != (0, 0):
            means.append(found[0])
            most = max(most, found[1])
    assert len(means) > 100
    assert np.mean(means) < 0.2
    assert max(means) < 0.65
    assert most <= 12
