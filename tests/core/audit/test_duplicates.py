"""Duplicates are found without comparing all pairs, and the right copy stays."""

from __future__ import annotations

import io
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, ImageFilter

from cifake_ray.core.audit.duplicates import (
    MAX_COMPARED,
    MAX_DISTANCE,
    choose_duplicates,
    count_duplicates,
    find_duplicates,
    find_near_pairs,
)
from cifake_ray.core.processing.audit import measure_image
from cifake_ray.core.schema import AUDIT_FIELDS


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def paint(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), np.uint8)
    return Image.fromarray(pixels).resize((96, 96), Image.Resampling.BICUBIC)


def measure(images: dict[str, bytes], split: str = "train") -> pa.Table:
    rows = [
        {"key": key, "label": 0, "split": split, "source": "s", **measure_image(data)[1]}
        for key, data in images.items()
    ]
    types = {field.name: field.type for field in AUDIT_FIELDS}
    return pa.table({name: pa.array([row[name] for row in rows], types[name]) for name in rows[0]})


def group_keys(found: pa.Table, column: str) -> set[frozenset[str]]:
    groups: dict[int, set[str]] = {}
    for row in found.to_pylist():
        if row[column] is not None:
            groups.setdefault(row[column], set()).add(row["key"])
    return set(map(frozenset, groups.values()))


def test_each_kind_of_copy_is_found_and_nothing_else() -> None:
    one, other = paint(1), paint(2)
    found = find_duplicates(
        measure(
            {
                "a.png": encode(one),
                "a-again.png": encode(one),
                "a.webp": encode(one, "WEBP", lossless=True),
                "a.jpg": encode(one, "JPEG", quality=60),
                "a-small.png": encode(one.resize((64, 64), Image.Resampling.LANCZOS)),
                "b.png": encode(other),
                "b-blurred.png": encode(other.filter(ImageFilter.GaussianBlur(0.6))),
                **{f"{seed}.png": encode(paint(seed)) for seed in range(3, 30)},
            }
        )
    )
    same_bytes, same_pixels = {"a.png", "a-again.png"}, {"a.png", "a-again.png", "a.webp"}
    near_a = same_pixels | {"a.jpg", "a-small.png"}
    assert group_keys(found, "bytes_group") == {frozenset(same_bytes)}
    assert group_keys(found, "pixels_group") == {frozenset(same_pixels)}
    assert group_keys(found, "near_group") == {
        frozenset(near_a),
        frozenset({"b.png", "b-blurred.png"}),
    }


def test_flat_images_of_other_colours_are_no_duplicates() -> None:
    colours = [(v, (v * 7) % 256, (v * 13) % 256) for v in range(0, 256, 8)]
    images = {f"{c}.png": encode(Image.new("RGB", (40, 40), c)) for c in colours}
    images["white.png"] = encode(Image.new("RGB", (40, 40), "white"))
    images["white.jpg"] = encode(Image.new("RGB", (50, 40), "white"), "JPEG")
    found = find_duplicates(measure(images))
    assert group_keys(found, "near_group") == {frozenset({"white.png", "white.jpg"})}


def test_near_pairs_are_those_of_a_comparison_of_all() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, 400, np.uint64)
    for row in range(200, 400):  # copies with 0 to 7 bits flipped
        hashes[row] = hashes[row - 200]
        for bit in rng.choice(64, row % 8, replace=False):
            hashes[row] ^= np.uint64(1) << np.uint64(bit)
    thumbnails = np.full((400, 192), 7, np.uint8)
    distances = np.bitwise_count(hashes[:, None] ^ hashes[None, :])
    expected = np.argwhere(np.triu(distances <= MAX_DISTANCE, 1))
    assert len(expected) > 100
    assert np.array_equal(find_near_pairs(hashes, thumbnails), expected)


def test_of_many_images_with_one_hash_those_of_about_a_brightness_are_compared() -> None:
    brightness = np.random.default_rng(0).permutation(np.linspace(0, 255 * 192, 3000).astype(int))
    ramp = np.arange(192)
    thumbnails = ((brightness[:, None] + ramp) // 192).astype(np.uint8)
    pairs = find_near_pairs(np.zeros(3000, np.uint64), thumbnails)
    assert 2_999 <= len(pairs) <= 3_000 * MAX_COMPARED
    assert np.abs(np.diff(brightness[pairs], axis=1)).max() < 2 * 192
    neighbours = np.argsort(brightness)
    found = {tuple(pair) for pair in pairs.tolist()}
    assert all(tuple(sorted(p)) in found for p in pairwise(neighbours.tolist()))


def make_groups(*rows: tuple[str, int | None, str | None, int | None]) -> pa.Table:
    names = ("key", "label", "split", "bytes_group")
    types = (pa.string(), pa.int64(), pa.string(), pa.int64())
    return pa.table(
        [
            pa.array(column, kind)
            for column, kind in zip(zip(*rows, strict=True), types, strict=True)
        ],
        names=names,
    )


def test_the_copy_of_test_stays_and_copies_that_disagree_all_go() -> None:
    groups = make_groups(
        ("c", 1, "train", 0),
        ("b", 1, "test", 0),
        ("a", 1, "val", 0),
        ("e", 0, "train", 1),
        ("d", 0, "train", 1),
        ("f", 0, "train", 2),
        ("g", 1, "test", 2),
        ("h", None, None, 3),
        ("i", 1, None, 3),
        ("j", 1, "train", None),
    )
    assert choose_duplicates(groups, "bytes_group") == {
        "a": "duplicate of test",
        "c": "duplicate of test",
        "e": "duplicate",
        "f": "duplicate with another label",
        "g": "duplicate with another label",
        "h": "duplicate",
    }


def test_pairs_are_counted_within_and_across() -> None:
    groups = make_groups(
        ("a", 1, "train", 0),
        ("b", 1, "train", 0),
        ("c", 1, "test", 0),
        ("d", 0, "test", 1),
        ("e", 1, "test", 1),
        ("f", None, "test", 1),
        ("g", 1, "train", None),
    )
    assert count_duplicates(groups, "bytes_group") == {
        "groups": 2,
        "images": 6,
        "pairs": 6,
        "pairs_across_splits": 2,
        "pairs_across_classes": 1,
    }
