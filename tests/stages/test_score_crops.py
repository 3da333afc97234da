"""Detectors of crops: one row an image, the mean of its crops' logits, by every road; no Ray."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from cifake_ray.config import (
    ScoreConfig,
)
from cifake_ray.core.evaluation.calibration import Calibration, compute_p_fake
from cifake_ray.core.imaging.decode import decode_image
from cifake_ray.core.imaging.training_domain import TrainingDomain
from cifake_ray.core.models.detector import build_detector
from cifake_ray.core.schema import CROP_FIELDS, PROVENANCE_FIELDS, SCORE_FIELDS
from cifake_ray.pipeline import run_verb
from cifake_ray.storage.bundles.bundle import load_bundle, write_bundle

CALIBRATION = Calibration(
    temperature=1.5, threshold=0.5, threshold_fpr_1=None, threshold_fpr_01=None
)
SIDES = {"a.png": (150, 170), "b.jpg": (64, 200), "c.png": (20, 90), "d.png": (1, 1)}
SCORES = [field.name for field in SCORE_FIELDS]
CROPS = [field.name for field in CROP_FIELDS]


def run(config: Any) -> Any:
    return run_verb(config, time.monotonic())[0]


def write_crop_bundle(folder: Path, *, flip: bool = False) -> Path:
    torch.manual_seed(0)
    detector = build_detector("small_cnn_w8_d1", image_size=32, fit="crops", num_crops=5).eval()
    detector.set_preprocessing(replace(detector.preprocessing, test_time_flip=flip))
    write_bundle(
        folder,
        detector,
        CALIBRATION,
        TrainingDomain(sides=None, formats=("PNG",), jpeg_qualities=None),
        training={},
        metrics={},
        history=[],
        model_card="# Card\n",
    )
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_crop_bundle(tmp_path_factory.mktemp("crops") / "bundle")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of many sizes in two classes, and one file that is none."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for number, label in enumerate(("real", "fake")):
        (folder / label).mkdir()
        for name, (height, width) in SIDES.items():
            noise = random.integers(0, 256 - 100 * number, (height, width, 3), np.uint8)
            noise[:, width // 2 :] //= 1 + number  # so that crops differ
            Image.fromarray(noise).save(folder / label / name)
    (folder / "real" / "no.png").write_bytes(b"words")
    return folder


def score(src: Path, out: Path, bundle: Path, **options: Any) -> dict[str, dict[str, Any]]:
    config = ScoreConfig(
        **{"src": str(src), "out": str(out), "bundle": str(bundle), "max_error_rate": 1.0}
        | {"precision": "float32", "num_workers": 0}
        | options
    )
    run(config)
    return {row["key"]: row for row in pq.read_table(out / "scores").to_pylist()}


@pytest.fixture(scope="module")
def scored(images: Path, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scored") / "out"
    score(images, out, bundle, shard_size=3)
    return out


def find_logits(bundle: Path, pixels: np.ndarray) -> np.ndarray:
    """Return the logits of the crops of an image, each computed alone."""
    detector, _ = load_bundle(bundle)
    with torch.inference_mode():
        crops = torch.from_numpy(detector.preprocessing.fit_pixels(pixels))
        return np.array([detector.find_logit(crop[None]).item() for crop in crops])


@pytest.mark.parametrize("flip", [False, True])
def test_a_row_has_the_mean_and_the_spread_of_its_crops(
    images: Path, tmp_path: Path, flip: bool
) -> None:
    bundle = write_crop_bundle(tmp_path / "bundle", flip=flip)
    rows = score(images, tmp_path / "out", bundle, provenance=True, thumbnails=True)
    names = pq.read_table(tmp_path / "out" / "scores").schema.names
    provenance = [field.name for field in PROVENANCE_FIELDS]
    assert names == [*SCORES, *CROPS, *provenance, "thumbnail_webp"]
    counts = set()
    for key, row in rows.items():
        if key == "real/no.png":
            assert row["error"] == "not_an_image"
            assert [row[name] for name in ("logit", "p_fake", *CROPS)] == [None] * 4
            continue
        logits = find_logits(bundle, decode_image((images / key).read_bytes()))
        counts.add(len(logits))
        assert row["num_crops"] == len(logits)
        assert row["logit"] == pytest.approx(logits.mean(), abs=1e-4)
        assert row["crop_logit_std"] == pytest.approx(logits.std(), abs=1e-4)
        expected = compute_p_fake(np.array([row["logit"]], np.float32), 1.5)[0]
        assert row["p_fake"] == expected
        assert row["thumbnail_webp"] is not None
    assert counts == {1, 3, 5}
    assert max(row["crop_logit_std"] or 0 for row in rows.values()) > 0.01


def test_workers_and_batches_change_nothing(
    images: Path, bundle: Path, scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = pq.read_table(scored / "scores").replace_schema_metadata()
    choose = driver.choose_placement
    for num_workers in (1, 2):

        def place(*args: Any, num_workers: int = num_workers) -> Placement:
            return replace(choose(*args), num_workers=num_workers)

        monkeypatch.setattr(driver, "choose_placement", place)
        out = tmp_path / f"{num_workers}"
        score(images, out, bundle, shard_size=3)
        assert pq.read_table(out / "scores").replace_schema_metadata() == expected
    for batch_size in (1, 7, 1000):
        out = tmp_path / f"batch-{batch_size}"
        score(images, out, bundle, shard_size=3, batch_size=batch_size)
        found = pq.read_table(out / "scores").replace_schema_metadata()
        for name in ("logit", "crop_logit_std"):
            pairs = zip(found[name].to_pylist(), expected[name].to_pylist(), strict=True)
            assert all(a == b or a == pytest.approx(b, abs=1e-5) for a, b in pairs)
        others = [
            name
            for name in expected.schema.names
            if expected.schema.field(name).type != pa.float32()
        ]
        assert found.select(others) == expected.select(others)
