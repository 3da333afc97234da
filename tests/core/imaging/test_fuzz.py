"""Broken images: whatever the bytes, the decoder gives what it promises or names what is wrong.

Each format is fuzzed in a process of its own, so that a crash of a native decoder, its memory and
what it prints can be seen. `python tests/core/imaging/test_fuzz.py JPEG 100000` looks longer and
elsewhere.
"""

from __future__ import annotations

import re
import resource
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from decode_paths import decode_fast, decode_slow
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cifake_ray.core.imaging import decode as images
from cifake_ray.core.imaging.decode import ImageHeader, decode_image, inspect_image
from cifake_ray.core.imaging.preprocessing import Preprocessing
from cifake_ray.core.schema import IMAGE_ERRORS
from cifake_ray.errors import ImageError

NUM_EXAMPLES = 250  # of each format: three to four seconds
MAX_CALL_S = 8.0  # a 64-megapixel image takes one to two seconds on an idle core
MAX_GROWTH_BYTES = 2 * 2**30  # 64 million pixels in RGBA, composited: 1.1 GB
INT32_MAX = 2**31 - 1  # what the columns of the tables hold
HALF = (0.5, 0.5, 0.5)
PREPROCESSINGS = [
    Preprocessing(image_size=32, fit="resize", mean=HALF, std=HALF),
    Preprocessing(image_size=64, fit="crop", mean=HALF, std=HALF),
    Preprocessing(image_size=1, fit="resize", mean=HALF, std=HALF, jpeg_scale=True),
]


def make_image(mode: str, width: int = 23, height: int = 17) -> Image.Image:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65536, (height, width), dtype=np.uint16))
    if mode == "F":
        return Image.fromarray(rng.random((height, width), dtype=np.float32))
    return image.convert(mode)


def encode(mode: str, format: str, **options: Any) -> bytes:
    buffer = BytesIO()
    make_image(mode).save(buffer, format, **options)
    return buffer.getvalue()


def make_seeds(format: str) -> list[bytes]:
    """Small good files, one of each kind that the format has."""
    more = {"save_all": True, "append_images": [make_image("RGB"), make_image("RGB", 9, 9)]}
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    tiff = [None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "lzma", "zstd"]
    kinds: dict[str, list[tuple[str, dict[str, Any]]]] = {
        "JPEG": [
            ("RGB", {}),
            ("RGB", {"progressive": True}),
            ("RGB", {"subsampling": "4:4:4", "restart_marker_blocks": 1}),
            ("L", {"exif": exif}),
            ("RGB", {"exif": exif, "icc_profile": b"icc" * 40, "comment": b"c"}),
            ("CMYK", {}),
            ("RGB", {"keep_rgb": True}),
        ],
        "MPO": [("RGB", more)],
        "PNG": [
            *((mode, {}) for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")),
            ("RGB", {"exif": exif, "icc_profile": b"icc" * 40, "transparency": (1, 2, 3)}),
            ("P", {"transparency": b"\0\x80\xff"}),
            ("RGB", more),
        ],
        "GIF": [("P", {}), ("L", {"comment": b"c" * 300}), ("RGB", {**more, "duration": 50})],
        "WEBP": [
            ("RGB", {}),
            ("RGBA", {}),
            ("RGB", {"lossless": True, "exif": exif, "icc_profile": b"icc" * 40}),
            ("RGB", {**more, "append_images": [make_image("RGB")]}),
        ],
        "BMP": [(mode, {}) for mode in ("RGB", "L", "P", "1", "RGBA")],
        "TIFF": [
            *(("RGB", {"compression": name} if name else {}) for name in tiff),
            *((mode, {}) for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "LAB", "I;16", "F")),
            ("1", {"compression": "group4"}),
            ("RGB", {"exif": exif}),
            ("RGB", {**more, "big_tiff": True}),
        ],
        "AVIF": [
            ("RGB", {}),
            ("RGBA", {"exif": exif, "icc_profile": b"icc" * 40}),
            ("RGB", {**more, "append_images": [make_image("RGB")]}),
        ],
    }
    kinds["HEIF"] = [
        ("RGB", {}),
        ("RGBA", {"exif": exif, "icc_profile": b"icc" * 40}),
        ("L", {}),
        ("RGB", {"chroma": 444, "tile_size": 16}),
        ("RGB", more),
    ]
    seeds = [encode(mode, format, **options) for mode, options in kinds[format]]
    if format == "BMP":
        seeds += [make_rle_bmp(8, 1), make_rle_bmp(4, 2)]
    if format == "PNG":
        seeds.append(interlace(seeds[0]))
    return seeds


def make_rle_bmp(bits: int, compression: int) -> bytes:
    body = b"\x05\x12\0\0" + b"\0\4\1\2\3\4\0\2\1\1\2\x11" * 3 + b"\0\1"
    palette = bytes(range(256)) * 4 if bits == 8 else bytes(64)
    numbers = (12, 9, 1 | bits << 16, compression, len(body), 0, 0, len(palette) // 4, 0)
    header = b"".join(n.to_bytes(4, "little") for n in (40, *numbers))
    start = 14 + len(header) + len(palette)
    sizes = b"".join(n.to_bytes(4, "little") for n in (start + len(body), 0, start))
    return b"BM" + sizes + header + palette + body


def interlace(png: bytes) -> bytes:
    """The flag alone: the rows then mean other pixels, which no decoder can know."""
    return mend_checksums(png[:28] + b"\1" + png[29:])


def mend_checksums(png: bytes) -> bytes:
    """With the right CRC in every chunk; else hardly a change gets past the first look."""
    parts, start = [png[:8]], 8
    while start + 12 <= len(png):
        end = start + 8 + int.from_bytes(png[start : start + 4], "big")
        if end + 4 > len(png):
            break
        parts += [png[start:end], zlib.crc32(png[start + 4 : end]).to_bytes(4, "big")]
        start = end + 4
    return b"".join([*parts, png[start:]])


INTERESTING = [0, 1, 2, 3, 127, 255, 0x7FFF, 0xFFFF, 2**24 - 1, 2**31 - 1, 2**31, 2**32 - 1]
# Most of what parsers believe stands at the beginning.
places = st.one_of(st.integers(0, 200), st.integers(0, 5000))
edits = st.one_of(
    st.tuples(st.just("flip"), places, st.integers(1, 255)),
    st.tuples(st.just("number"), places, st.sampled_from(INTERESTING), st.integers(0, 3)),
    st.tuples(st.just("cut"), places),
    st.tuples(st.just("insert"), places, st.binary(min_size=1, max_size=16)),
    st.tuples(st.just("repeat"), places, st.integers(1, 64), st.integers(2, 300)),
    st.tuples(st.just("remove"), places, st.integers(1, 64)),
    st.tuples(st.just("splice"), places, places, st.integers(0, 99)),
)


def apply_edit(data: bytes, edit: tuple[Any, ...], seeds: list[bytes]) -> bytes:
    kind, place, *rest = edit
    place %= len(data) + 1
    head, tail = data[:place], data[place:]
    if kind == "flip":
        return head + bytes([tail[0] ^ rest[0]]) + tail[1:] if tail else data
    if kind == "number":
        value, layout = rest
        size = 2 if layout < 2 and value < 2**16 else 4
        return head + value.to_bytes(size, "big" if layout % 2 else "little") + tail[size:]
    if kind == "cut":
        return head
    if kind == "insert":
        return head + rest[0] + tail
    if kind == "repeat":
        return head + tail[: rest[0]] * rest[1] + tail
    if kind == "remove":
        return head + tail[rest[0] :]
    other = seeds[rest[1] % len(seeds)]
    return head + other[rest[0] % len(other) :]


def check_promises(data: bytes) -> None:
    """Facts and pixels as documented, or ImageError; soon, and fast as slow."""
    facts = call(inspect_image, data)
    if isinstance(facts, ImageHeader):
        for value in (facts.width, facts.height, facts.num_frames):
            assert type(value) is int
            assert 1 <= value <= INT32_MAX, facts
        is_jpeg = facts.format in ("JPEG", "MPO")
        most = images.MAX_JPEG_PIXELS if is_jpeg else images.MAX_IMAGE_PIXELS
        assert facts.width * facts.height <= most
        assert facts.format in (*images.ALLOWED_FORMATS, "MPO")
        assert facts.jpeg_quality is None or 1 <= facts.jpeg_quality <= 100
        facts.mode.encode()
    pixels = call(decode_image, data)
    if isinstance(pixels, ImageError):
        return
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3
    assert 0 < pixels.size <= 3 * images.MAX_IMAGE_PIXELS
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable
    if decode_fast(data) is not None:
        np.testing.assert_array_equal(decode_slow(data), pixels)
    if pixels.size < 2**20:
        for preprocessing in PREPROCESSINGS:
            square = call(preprocessing.load_image, data)
            size = preprocessing.image_size
            assert (square.shape, square.dtype) == ((size, size, 3), np.uint8)


def call(read: Callable[[bytes], Any], data: bytes) -> Any:
    start_s = time.perf_counter()
    try:
        result = read(data)
    except ImageError as error:
        result = error
    elapsed_s = time.perf_counter() - start_s
    assert elapsed_s < MAX_CALL_S, f"{elapsed_s:.1f} s for {len(data)} bytes: {data[:64]!r}"
    if isinstance(result, ImageError):
        assert result.error in IMAGE_ERRORS
        assert result.detail.encode()  # goes into a column of UTF-8
        assert "object at 0x" not in result.detail, "an address makes two runs differ"
    return result


def fuzz(format: str, num_examples: int) -> None:
    """Runs in a child, with a ceiling on its memory."""
    seeds = make_seeds(format)
    for seed in seeds:
        check_promises(seed)
        assert not isinstance(call(inspect_image, seed), ImageError)

    @settings(
        max_examples=num_examples,
        derandomize=num_examples == NUM_EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, len(seeds) - 1), st.lists(edits, min_size=1, max_size=4))
    def run(number: int, changes: list[tuple[Any, ...]]) -> None:
        data = seeds[number]
        for change in changes:
            data = apply_edit(data, change, seeds)
        if format == "PNG" and number % 2:
            data = mend_checksums(data)
        check_promises(data)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))
    run()
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert growth < MAX_GROWTH_BYTES, f"{growth / 2**20:.0f} MiB"


@pytest.mark.parametrize("format", [*images.ALLOWED_FORMATS, "MPO"])
def test_broken_images_give_pixels_or_a_named_error(format: str) -> None:
    child = subprocess.run(
        [sys.executable, __file__, format, str(NUM_EXAMPLES)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert child.returncode == 0, child.stdout + child.stderr[-4000:]
    assert child.stdout == ""
    said = child.stderr.splitlines()
    if format == "TIFF":  # libtiff tells its errors to stderr, and Pillow has no switch for it
        said = [line for line in said if not re.fullmatch(r"[\w.]+: [ -~]*\.", line)]
    assert said == []


if __name__ == "__main__":
    fuzz(sys.argv[1], int(sys.argv[2]))
