"""Tests of generated twins: same size and compression as their photographs, other pixels."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_twins import (
    UnwritableError,
    encode_like,
    find_twin,
    list_photographs,
    load_maker,
    make_twins,
    mix_frequencies,
    write_twin,
)
from PIL import Image, JpegImagePlugin

from cifake_ray.core.sample_images import find_photograph


def crop_photograph(width: int = 200, height: int = 136) -> Image.Image:
    with Image.open(find_photograph("sklearn/datasets/images/china.jpg")) as opened:
        return opened.convert("RGB").crop((100, 100, 100 + width, 100 + height))


def save(path: Path, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    crop_photograph().save(path, **options)
    return path


def encode_and_reopen(photograph: Path) -> Image.Image:
    with Image.open(photograph) as opened:
        return Image.open(io.BytesIO(encode_like(opened, crop_photograph())))


@pytest.fixture
def taef2() -> Path:
    folder = Path(os.environ.get("CIFAKE_TEST_DATA", ""), "taef2")
    if not folder.is_dir():
        pytest.skip("CIFAKE_TEST_DATA names no folder with taef2")
    return folder


def test_a_twin_differs_from_its_photograph_in_pixels_alone(taef2: Path, tmp_path: Path) -> None:
    real = save(tmp_path / "test/REAL/pets/a.jpg", quality=77, subsampling="4:2:2")
    load_maker("taef2", taef2)
    key, maker, psnr = write_twin(tmp_path / "twins", "taef2", real) or ("", "", "0")
    assert (key, maker) == ("test/FAKE/pets/a.jpg", "taef2")
    with Image.open(real) as photograph, Image.open(tmp_path / "twins/taef2" / key) as twin:
        assert twin.size == photograph.size
        assert (twin.quantization, twin.layer) == (photograph.quantization, photograph.layer)
        difference = np.abs(np.asarray(twin, int) - np.asarray(photograph, int))
        assert difference.mean() > 1
    assert 20 < float(psnr) < 40  # a wrong network gives noise


def test_a_mix_keeps_the_low_frequencies_of_the_photograph() -> None:
    photograph = crop_photograph()
    pixels = np.asarray(photograph, int)
    twin = Image.fromarray((pixels // 2 + 60).astype(np.uint8))
    mixed = np.asarray(mix_frequencies(photograph, twin, seed=1), int)
    assert np.abs(mixed.mean((0, 1)) - pixels.mean((0, 1))).max() < 0.5
    assert np.abs(mixed - pixels).mean() > 1
    assert np.array_equal(mixed, mix_frequencies(photograph, twin, seed=1))
    assert not np.array_equal(mixed, mix_frequencies(photograph, twin, seed=2))


def test_lossless_and_grey_photographs_have_lossless_and_grey_twins(tmp_path: Path) -> None:
    lossless = encode_and_reopen(save(tmp_path / "a.webp", lossless=True))
    assert np.array_equal(np.asarray(lossless), np.asarray(crop_photograph()))
    crop_photograph().convert("L").save(tmp_path / "grey.jpg", quality=60)
    with Image.open(tmp_path / "grey.jpg") as grey:
        twin = encode_and_reopen(tmp_path / "grey.jpg")
        assert (twin.mode, twin.quantization) == ("L", grey.quantization)


def test_three_tables_stay_three(tmp_path: Path) -> None:
    tables = [[number] * 64 for number in (3, 5, 7)]
    twin = encode_and_reopen(save(tmp_path / "a.jpg", qtables=tables, subsampling=0))
    assert isinstance(twin, JpegImagePlugin.JpegImageFile)
    assert [twin.quantization[layer[3]][0] for layer in twin.layer] == [3, 5, 7]


def test_a_subsampling_that_pillow_cannot_write_is_refused(tmp_path: Path) -> None:
    data = save(tmp_path / "a.jpg", subsampling=2).read_bytes()
    frame = data.index(b"\xff\xc0")
    (tmp_path / "a.jpg").write_bytes(data[: frame + 11] + b"\x12" + data[frame + 12 :])  # 4:4:0
    with Image.open(tmp_path / "a.jpg") as photograph, pytest.raises(UnwritableError):
        encode_like(photograph, crop_photograph())


def test_photographs_are_listed_a_source_in_turn(tmp_path: Path) -> None:
    for name in ("pets/a.jpg", "pets/b.jpg", "cars/c.webp"):
        save(tmp_path / "train/REAL" / name)
    names = [path.name for path in list_photographs(tmp_path, "train", None)]
    assert names == ["c.webp", "a.jpg", "b.jpg"]
    assert [p.name for p in list_photographs(tmp_path, "train", 1)] == ["c.webp", "a.jpg"]


def test_a_rerun_makes_only_what_is_missing(tmp_path: Path) -> None:
    photographs = [save(tmp_path / f"train/REAL/pets/{name}.jpg") for name in "ab"]
    for path in photographs:
        save(tmp_path / "taef2" / find_twin(path), quality=50)

    def make() -> list[str]:
        rows = make_twins(tmp_path, "taef2mix", photographs, tmp_path, num_workers=1)
        return [key for key, _, _ in rows]

    assert make() == ["train/FAKE/pets/a.jpg", "train/FAKE/pets/b.jpg"]
    (tmp_path / "taef2mix/train/FAKE/pets/b.jpg").unlink()
    assert make() == ["train/FAKE/pets/b.jpg"]
    with (tmp_path / "taef2mix/manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["key"][-5:] for row in rows] == ["a.jpg", "b.jpg", "b.jpg"]
