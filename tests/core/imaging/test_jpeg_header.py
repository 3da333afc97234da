"""Headers that files share are read once."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from cifake_ray.core.imaging import jpeg_header
from cifake_ray.core.imaging.jpeg_header import scan_jpeg


def encode_jpeg(seed: int, **options: object) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", **options)
    return file.getvalue()


def test_files_with_the_same_header_are_read_as_the_one_before_them() -> None:
    jpeg_header._scan_shared.cache_clear()
    first = scan_jpeg(encode_jpeg(0))
    assert first is not None
    assert (first.width, first.height) == (32, 24)
    assert scan_jpeg(encode_jpeg(1)) == first
    assert scan_jpeg(encode_jpeg(2, quality=30)) != first
    cache = jpeg_header._scan_shared.cache_info()
    assert (cache.hits, cache.misses) == (1, 2)


def test_what_is_cached_never_gives_another_header() -> None:
    plain = encode_jpeg(0)
    comment = b"\xff\xfe\x00\x08\xff\xda\x00\x02ab"  # the marker of a scan inside a segment
    profile = b"\xff\xe2" + (len(plain) // 2).to_bytes(2, "big")
    for data in (
        plain,
        plain[:2] + comment + plain[2:],
        plain[:2] + profile + plain[2:],
        encode_jpeg(0, progressive=True),
        encode_jpeg(0, quality=95, subsampling=0),
        encode_jpeg(0, comment=b"x" * 4000),
        b"\xff\xd8\xff\xda",
        b"\xff\xda\x00\x04",
    ):
        for cut in range(len(data) + 1):
            assert scan_jpeg(data[:cut]) == jpeg_header._scan_markers(data[:cut]), cut
