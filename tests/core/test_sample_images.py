"""The built-in sample: deterministic, balanced, and not to be told apart by trivial statistics."""

from __future__ import annotations

import io
import re
from collections import Counter
from functools import partial
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cifake_ray.core.sample_images import (
    MIN_IMAGES,
    PHOTOGRAPHS,
    SampleImage,
    assign_image,
    find_photograph,
    generate_images,
)
from cifake_ray.core.schema import FAKE, LABEL_NAMES, SPLITS


@pytest.fixture(scope="module")
def images() -> list[SampleImage]:
    return list(generate_images(num_images=2400, seed=3))


def split_path(image: SampleImage) -> tuple[str, str, str]:
    split, label, name = PurePosixPath(image.path).parts
    return split, label, name


@pytest.mark.parametrize("mixed", [False, True])
def test_ranges_and_repetitions_give_the_same_bytes(mixed: bool) -> None:
    num_images = 60 if mixed else 600  # more than one block
    generate = partial(generate_images, num_images=num_images, seed=7, mixed=mixed)
    whole = list(generate())
    cuts = [0, 1, num_images // 2 - 3, num_images]
    ranges = [generate(start=a, stop=b) for a, b in pairwise(cuts)]
    assert [image for part in ranges for image in part] == whole
    assert list(generate(start=5, stop=5)) == []


def test_another_seed_gives_other_images_and_names() -> None:
    one, two = (list(generate_images(num_images=40, seed=seed)) for seed in (0, 1))
    assert not {image.path for image in one} & {image.path for image in two}
    assert not {image.data for image in one} & {image.data for image in two}


@pytest.mark.parametrize("num_images", [20, 21, 39, 200, 2401])
def test_splits_are_80_10_10_and_classes_balance(num_images: int) -> None:
    counts = Counter(assign_image(index, num_images) for index in range(num_images))
    held_out = num_images // 2 // 10
    train_fake = num_images // 2 - 2 * held_out
    for label, train in ((0, train_fake + num_images % 2), (1, train_fake)):
        assert [counts[split, label] for split in SPLITS] == [train, held_out, held_out]
    if num_images <= 200:
        paths = [split_path(image)[:2] for image in generate_images(num_images=num_images)]
        assert Counter(paths) == {(s, LABEL_NAMES[y]): n for (s, y), n in counts.items()}


def test_names_are_unique_hashes(images: list[SampleImage]) -> None:
    names = [split_path(image)[2] for image in images]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[0-9a-f]{20}\.jpg", name) for name in names)
    is_fake = np.array([split_path(image)[1] == "FAKE" for image in images])
    first_digit = np.array([int(name[:4], 16) for name in names]) / 0x10000
    assert abs(first_digit[is_fake].mean() - first_digit[~is_fake].mean()) < 0.06  # 5 sigma


def test_no_image_appears_twice(images: list[SampleImage]) -> None:
    assert len({image.data for image in images}) == len(images)


def test_no_photograph_serves_two_splits() -> None:
    names = [name for split in SPLITS for name in PHOTOGRAPHS[split]]
    assert len(set(names)) == len(names)
    assert len({find_photograph(name).read_bytes() for name in names}) == len(names)


def test_classes_share_size_mode_and_jpeg_tables(images: list[SampleImage]) -> None:
    facts = set()
    for item in images[:200]:
        with JpegImageFile(io.BytesIO(item.data)) as image:
            tables = tuple(tuple(table) for table in image.quantization.values())
            facts.add((image.size, image.mode, tables, tuple(image.layer)))
    assert len(facts) == 1
    size, mode, tables, layers = facts.pop()
    assert (size, mode, len(tables)) == ((32, 32), "RGB", 2)
    assert tables[0][:4] == (8, 6, 5, 8)  # quality 75, as CIFAKE
    assert [layer[1:3] for layer in layers] == [(2, 2), (1, 1), (1, 1)]  # 4:2:0


def test_mixed_images_decode_and_their_formats_tell_nothing_of_the_label() -> None:
    seen: dict[str, list[tuple[float, ...]]] = {"REAL": [], "FAKE": []}
    kinds: Counter[tuple[str, str | None, str]] = Counter()
    for item in generate_images(num_images=400, seed=1, mixed=True):
        _, label, name = split_path(item)
        with Image.open(io.BytesIO(item.data)) as image:
            image.load()
            suffix = PurePosixPath(name).suffix
            assert Image.registered_extensions()[suffix] == image.format
            assert 20 <= min(image.size) <= max(image.size) <= 640
            kinds[suffix, image.format, image.mode] += 1
            seen[label].append((np.log2(image.width * image.height), image.format == "JPEG"))
    assert {kind[1] for kind in kinds} == {"JPEG", "PNG", "WEBP", "GIF", "BMP"}
    assert {kind[2] for kind in kinds} >= {"RGB", "L", "RGBA", "P"}
    real, fake = (np.array(rows).mean(axis=0) for rows in seen.values())
    spread = np.array(seen["REAL"]).std(axis=0) * np.sqrt(2 / 200)
    assert (np.abs(real - fake) < 4 * spread).all()


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_images": MIN_IMAGES - 1},
        {"num_images": 40, "seed": -1},
        {"num_images": 40, "start": 30, "stop": 20},
        {"num_images": 40, "stop": 41},
    ],
)
def test_impossible_requests_are_refused_at_the_call(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"ask for|give"):
        generate_images(**arguments)


def measure_leak(images: list[SampleImage], *, extended: bool) -> dict[str, float]:
    """Test accuracy of two small classifiers on statistics that look at no structure."""
    rows, labels, splits = [], [], []
    for image in images:
        split, label, _ = split_path(image)
        pixels = simplejpeg.decode_jpeg(image.data).astype(np.float32)
        row = [len(image.data), *pixels.mean(axis=(0, 1))]
        if extended:
            grey = pixels.mean(axis=2)
            beside = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
            energy = np.square(4 * grey[1:-1, 1:-1] - beside).mean()
            row += [*pixels.std(axis=(0, 1)), np.log1p(energy)]
        rows.append(row)
        labels.append(LABEL_NAMES.index(label) == FAKE)
        splits.append(split)
    x, y, parts = np.array(rows), np.array(labels), np.array(splits)
    train, test = parts == "train", parts == "test"
    models = {
        "logistic regression": make_pipeline(StandardScaler(), LogisticRegression()),
        "gradient boosting": GradientBoostingClassifier(n_estimators=50, random_state=0),
    }
    return {
        name: float(model.fit(x[train], y[train]).score(x[test], y[test]))
        for name, model in models.items()
    }


def test_file_size_and_mean_colour_do_not_give_the_label_away(images: list[SampleImage]) -> None:
    leak = measure_leak(images, extended=False)
    print("file size + mean colour:", leak)
    assert max(leak.values()) < 0.65


def test_contrast_and_laplacian_energy_do_not_give_the_label_away(
    images: list[SampleImage],
) -> None:
    leak = measure_leak(images, extended=True)
    print("with contrast and Laplacian energy:", leak)
    assert max(leak.values()) < 0.70
