"""Tests of the comparison with other detectors: who is measured, on what, at which threshold."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rivals import (
    Compute,
    LabelledImage,
    compute_cached,
    find_worst,
    list_mixed,
    list_twins,
    list_wild,
    measure,
    render,
    take_some,
)
from rivals_detectors import FerretNet, crop_center, fit_probe, resize_shortest


def write_manifest(folder: Path, rows: list[dict[str, str]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder


def make_images(
    group: str, source: str, label: int, number: int, folder: str = "wild"
) -> list[LabelledImage]:
    paths = [Path(folder, group, source, f"{index}.jpg") for index in range(number)]
    return [LabelledImage(path.as_posix(), path, label, group, source) for path in paths]


def test_val_sources_train_nothing(tmp_path: Path) -> None:
    rows = [
        {
            "path": f"{split}/{label}/{source}/a.jpg",
            "label": label,
            "split": split,
            "source": source,
        }
        for split, label, source in (
            ("train", "REAL", "pets"),
            ("train", "FAKE", "flux"),
            ("test", "REAL", "faces"),
        )
    ]
    images = list_wild(write_manifest(tmp_path / "wild", rows), ["flux"])
    assert [image.group for image in images] == ["train", "validation", "wild"]
    assert [image.label for image in images] == [0, 1, 0]
    with pytest.raises(SystemExit, match="no train source is named faces"):
        list_wild(tmp_path / "wild", ["flux", "faces"])


def test_mixed_images_have_their_folder_as_source_and_twins_their_maker(tmp_path: Path) -> None:
    mixed = write_manifest(tmp_path / "mixed", [{"path": "real/coco/a.jpg", "label": "REAL"}])
    assert [image.source for image in list_mixed(mixed)] == ["coco"]
    keys = ["test/FAKE/pets/a.jpg", "train/FAKE/pets/b.jpg", "test/FAKE/pets/a.jpg"]
    twins = write_manifest(tmp_path / "esrgan", [{"key": key, "maker": "esrgan"} for key in keys])
    assert [(image.key, image.source) for image in list_twins(twins)] == [
        ("esrgan/test/FAKE/pets/a.jpg", "esrgan twins")
    ]


def test_a_limit_takes_the_twins_of_the_photographs_it_takes() -> None:
    photographs = [*make_images("wild", "cars", 0, 9), *make_images("wild", "pets", 0, 9)]
    twins = [
        replace(image, key=f"twin of {image.key}", group="twins", source="esrgan twins")
        for image in reversed(photographs)
    ]
    taken = take_some([*photographs, *twins], 4)
    keys = {group: {i.key for i in taken if i.group == group} for group in ("wild", "twins")}
    assert len(keys["wild"]) == 8
    assert keys["twins"] == {f"twin of {key}" for key in keys["wild"]}


def test_scores_are_kept_and_unreadable_images_are_nan(tmp_path: Path) -> None:
    images = [
        LabelledImage(name, tmp_path / name, 0, "wild", "pets") for name in ("a", "broken", "c")
    ]
    for image in images:
        image.path.write_bytes(image.key.encode())
    seen = []

    def load() -> Compute:
        def compute(data: bytes) -> np.ndarray:
            seen.append(data)
            if data == b"broken":
                raise OSError("cannot identify image file")
            return np.full(2, len(data), np.float32)

        return compute

    cache = tmp_path / "features.npz"
    for chosen in (images[:2], images, images):
        values = compute_cached(cache, chosen, load)
        assert np.array_equal(np.isnan(values).any(axis=1), [i.key == "broken" for i in chosen])
    assert seen == [b"a", b"broken", b"c"]
    assert values[2].tolist() == [1, 1]


def test_the_threshold_comes_from_validation_and_twins_meet_their_photographs() -> None:
    images = [
        *make_images("validation", "travel", 0, 100),
        *make_images("validation", "sd15", 1, 1),
        *make_images("wild", "photos", 0, 60),
        *make_images("wild", "phones", 0, 60),
        *make_images("wild", "flux", 1, 60),
        *make_images("mixed", "tiny", 1, 4),
        *(
            LabelledImage(
                f"t{n}", Path("esrgan/test/FAKE/photos", f"{n}.jpg"), 1, "twins", "esrgan"
            )
            for n in range(10)
        ),
    ]
    value = {"sd15": 1000.0, "photos": 200.0, "phones": 10.0, "flux": 150.0, "tiny": -5.0}
    value["esrgan"] = 100.0
    travel = list(range(100))
    logit = np.array([value[i.source] if i.source in value else travel.pop() for i in images])
    row = measure(images, logit.astype(np.float32))
    assert row["threshold"] == 95  # 4 of 100 are above it
    assert (row["tpr"], row["fpr"]) == (pytest.approx(60 / 64), 0.5)
    assert row["auroc"]["twins"] == 0  # all below their own photographs, above the phones
    assert row["sources"]["flux"]["auroc"] == 0.5
    assert row["auroc"]["mixed"] is None
    assert find_worst(row["sources"], "REAL") == ("photos", 0.0)
    assert find_worst(row["sources"], "FAKE") == ("flux", 0.5)  # tiny has too few images
    table = render({"ours": row})
    assert "flux 0.500" in table
    assert "photos 0%" in table


def test_images_are_fitted_as_their_detectors_do() -> None:
    image = Image.new("RGB", (300, 100), "white")
    cropped = np.asarray(crop_center(image, 224))
    assert cropped.shape == (224, 224, 3)
    assert cropped[0].max() == 0  # above the image
    assert cropped[112].min() == 255
    assert np.asarray(resize_shortest(image, 224)).min() == 255


def test_ferretnet_is_the_published_network_on_the_published_residual() -> None:
    network = FerretNet().eval()
    assert sum(p.numel() for p in network.parameters()) == 126_289
    given = []
    network.cbr1.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0][0, 0]))
    pixels = torch.rand(1, 3, 12, 20)
    with torch.inference_mode():
        assert network(pixels).shape == (1, 1)
    for row, column in np.ndindex(10, 18):
        window = pixels[0, 0, row : row + 3, column : column + 3].clone()
        center, window[1, 1] = window[1, 1].clone(), 0  # which does not vote for itself
        assert given[0][row + 1, column + 1] == center - window.median()


def test_a_probe_separates_directions_whatever_their_length() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(80, 8)).astype(np.float32)
    label = (features[:, 0] > 0).astype(int)
    features[:, 0] *= 5
    score = fit_probe(features, label, 1.0)
    assert np.mean((score(features) > 0) == label) > 0.95
    assert np.allclose(score(features), score(features * 7), atol=1e-4)
