"""Colours with a profile become sRGB; what is expected is computed from the profile's numbers."""

from __future__ import annotations

import struct
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from decode_paths import decode_fast, decode_slow
from PIL import Image, ImageCms

from cifake_ray.core.imaging.decode import decode_image, inspect_image

# Red, green and blue in XYZ of D50. Sources: Adobe RGB (1998), Display P3 and sRGB as their own
# profiles hold them.
ADOBE = [[0.60974, 0.31111, 0.01947], [0.20528, 0.62567, 0.06087], [0.14919, 0.06322, 0.74457]]
P3 = [[0.51512, 0.2412, -0.00105], [0.29198, 0.69225, 0.04189], [0.1571, 0.06657, 0.78407]]
SRGB = [[0.43607, 0.22249, 0.01392], [0.38515, 0.71687, 0.09708], [0.14307, 0.06061, 0.7141]]
D50 = [0.9642, 1.0, 0.8249]
# Blocks of colours that all of these hold without clipping.
COLORS = np.array([[60, 60, 60], [200, 150, 120], [120, 160, 110], [90, 110, 180], [240, 240, 240]])
BLOCKS = np.repeat(np.repeat(COLORS[None].astype(np.uint8), 16, 0), 16, 1)
EXACT: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 100, "subsampling": 0},
    "PNG": {},
    "TIFF": {},
    "WEBP": {"lossless": True},
    "AVIF": {"quality": 100, "subsampling": "4:4:4"},
    "HEIF": {"quality": 100, "chroma": 444},
}


def make_profile(space: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr") -> bytes:
    """ICC.1:2001-04, chapter 6."""
    tags = {b"wtpt": make_xyz(D50), b"desc": b"desc" + bytes(8) + b"\0\0\0\1x" + bytes(78), **tags}
    start = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, value in tags.items():
        value = value.ljust(-(-len(value) // 4) * 4, b"\0")
        table += name + struct.pack(">II", start + len(body), len(value))
        body += value
    connection = b"Lab " if b"A2B0" in tags else b"XYZ "
    head = struct.pack(
        ">I4sI4s4s4s", start + len(body), b"test", 0x02100000, kind, space, connection
    )
    white = struct.pack(">3i", *(round(v * 65536) for v in D50))
    head = head + struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + white
    return head.ljust(128, b"\0") + table + body


def make_xyz(values: list[float]) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(v * 65536) for v in values))


def make_rgb_profile(primaries: list[list[float]], gamma: float = 2.2) -> bytes:
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))
    tags = {
        letter + b"XYZ": make_xyz(p)
        for letter, p in zip((b"r", b"g", b"b"), primaries, strict=True)
    }
    return make_profile(b"RGB ", tags | {letter + b"TRC": curve for letter in (b"r", b"g", b"b")})


def encode_srgb(linear: np.ndarray) -> np.ndarray:
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def convert(colors: np.ndarray, primaries: list[list[float]], gamma: float = 2.2) -> np.ndarray:
    linear = (colors / 255) ** gamma @ np.array(primaries) @ np.linalg.inv(np.array(SRGB))
    return encode_srgb(linear)


def encode(image: Image.Image | np.ndarray, format: str, **options: Any) -> bytes:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("primaries", [ADOBE, P3], ids=["adobe", "p3"])
@pytest.mark.parametrize("format", EXACT)
def test_a_profile_of_wide_gamut_becomes_srgb(format: str, primaries: list[list[float]]) -> None:
    profile = make_rgb_profile(primaries)
    data = encode(BLOCKS, format, icc_profile=profile, **EXACT[format])
    expected = convert(COLORS, primaries)
    assert np.abs(expected - COLORS).max() > 8
    np.testing.assert_allclose(decode_image(data)[8, 8::16].astype(float), expected, atol=4)
    plain = encode(BLOCKS, format, **EXACT[format])
    np.testing.assert_allclose(decode_image(plain)[8, 8::16].astype(float), COLORS, atol=4)


def test_alpha_keys_and_palettes_keep_what_they_hide() -> None:
    profile = make_rgb_profile(ADOBE)
    alpha = np.full(BLOCKS.shape[:2], 255, np.uint8)
    alpha[:, 16:32] = 0
    expected = convert(COLORS, ADOBE)
    expected[1] = 255
    rgba = Image.fromarray(np.dstack([BLOCKS, alpha]))
    palette = Image.fromarray(BLOCKS).quantize(8, dither=Image.Dither.NONE)
    hidden = palette.getpixel((20, 8))
    for data in (
        encode(rgba, "PNG", icc_profile=profile),
        encode(BLOCKS, "PNG", icc_profile=profile, transparency=tuple(COLORS[1].tolist())),
        encode(palette, "PNG", icc_profile=profile, transparency=hidden),
        encode(rgba, "TIFF", icc_profile=profile),
    ):
        np.testing.assert_allclose(decode_image(data)[8, 8::16].astype(float), expected, atol=3)


def make_grey_profile(gamma: float) -> bytes:
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))
    return make_profile(b"GRAY", {b"kTRC": curve})


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
def test_grey_of_another_gamma_becomes_srgb(format: str) -> None:
    grey = BLOCKS[:, :, 0]
    profile = make_grey_profile(1.0)
    images_ = [Image.fromarray(grey)]
    if format != "JPEG":
        images_ += [
            Image.merge("LA", [images_[0], Image.new("L", images_[0].size, 255)]),
            Image.fromarray(grey.astype(np.uint16) * 257),
        ]
    for image in images_:
        options = EXACT[format] if format != "JPEG" else {"quality": 100}
        data = encode(image, format, icc_profile=profile, **options)
        expected = encode_srgb(COLORS[:, :1].repeat(3, 1) / 255)
        np.testing.assert_allclose(decode_image(data)[8, 8::16].astype(float), expected, atol=3)


def make_cmyk_profile() -> bytes:
    """Lab of 2 x 2 x 2 x 2 inks: lightness falls with cyan alone, from 100 to 50."""
    nodes = b"".join(bytes([127 if n & 8 else 255, 128, 128]) for n in range(16))
    steps = bytes(range(256))
    unit = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + unit + steps * 4 + nodes + steps * 3
    return make_profile(b"CMYK", {b"A2B0": lut}, b"scnr")


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_inks_show_what_their_profile_says(format: str) -> None:
    inks = Image.merge("CMYK", [Image.new("L", (16, 16), v) for v in (255, 0, 255, 0)])
    data = encode(inks, format, icc_profile=make_cmyk_profile())
    naive = decode_image(encode(inks, format))[8, 8].astype(int)
    assert naive[1] > 200 > 50 > naive[0]  # a green
    np.testing.assert_allclose(decode_image(data)[8, 8].astype(int), [119] * 3, atol=6)  # L* of 50


@pytest.mark.parametrize(
    "make",
    [
        lambda: ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        lambda: b"icc" * 40,
        lambda: make_rgb_profile(P3)[:200],
        lambda: make_rgb_profile(P3)[:-40],
        lambda: make_grey_profile(1.0),
        make_cmyk_profile,
        lambda: make_rgb_profile(P3).ljust(5 * 2**20, b"\0"),
    ],
    ids=["srgb", "garbage", "cut", "cut late", "grey", "cmyk", "huge"],
)
@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_a_profile_that_changes_nothing_or_is_broken_is_ignored(
    make: Callable[[], bytes], format: str
) -> None:
    profile = make()
    plain = encode(BLOCKS, format, **EXACT[format])
    data = encode(BLOCKS, format, icc_profile=profile, **EXACT[format])
    np.testing.assert_array_equal(decode_image(data), decode_image(plain))
    assert inspect_image(data).width == BLOCKS.shape[1]


def test_both_ways_to_decode_a_jpeg_agree_on_profiles() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile, is_fast in ((b"", True), (srgb, True), (make_rgb_profile(P3), False)):
        data = encode(BLOCKS, "JPEG", quality=90, icc_profile=profile)
        fast = decode_fast(data)
        assert (fast is not None) == is_fast
        if fast is not None:
            np.testing.assert_array_equal(fast, decode_slow(data))


def test_a_profile_in_several_pieces_is_read_whole() -> None:
    profile = make_rgb_profile(P3) + bytes(70_000)
    data = encode(BLOCKS, "JPEG", quality=100, subsampling=0, icc_profile=profile)
    assert data.count(b"ICC_PROFILE") == 2
    expected = convert(COLORS, P3)
    np.testing.assert_allclose(decode_image(data)[8, 8::16].astype(float), expected, atol=4)
