"""Detectors of crops: one row an image, the mean of its crops' logits, by every road."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from cifake_ray.api import load_detector
from cifake_ray.config import (
    ConvertConfig,
    EvaluateConfig,
    ExportConfig,
    RepairConfig,
    ReviewConfig,
    ScoreConfig,
    StoreConfig,
)
from cifake_ray.core.evaluation.calibration import Calibration, compute_p_fake
from cifake_ray.core.evaluation.metrics import compute_metrics
from cifake_ray.core.imaging.decode import decode_image
from cifake_ray.core.imaging.perturbation import perturb_image, seed_noise
from cifake_ray.core.imaging.training_domain import ANY_SIDE, TrainingDomain
from cifake_ray.core.models.detector import build_detector, find_head
from cifake_ray.core.schema import CROP_FIELDS, PROVENANCE_FIELDS, SCORE_FIELDS
from cifake_ray.errors import UsageError
from cifake_ray.pipeline import run_verb
from cifake_ray.report.text import model_card
from cifake_ray.stages.batch import driver
from cifake_ray.stages.compare.candidates import read_candidate
from cifake_ray.stages.resources import Placement
from cifake_ray.storage.bundles.bundle import load_bundle
from cifake_ray.storage.bundles.write_bundle import write_bundle

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
    with torch.no_grad():
        for values in find_head(detector.network).parameters():
            values *= 100  # fresh weights hardly tell one crop from another
    detector.set_preprocessing(replace(detector.preprocessing, test_time_flip=flip))
    write_bundle(
        folder,
        detector,
        CALIBRATION,
        TrainingDomain(sides=(32, ANY_SIDE), formats=("PNG",), jpeg_qualities=None),
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
            noise = random.integers(0, 256, (height, width, 3), np.uint8)
            noise[:, width // 2 :] //= 2 + 6 * number  # so that crops differ
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
    assert max(row["crop_logit_std"] or 0 for row in rows.values()) > 0.1


def test_images_smaller_than_a_crop_are_unlike_those_of_training(
    images: Path, bundle: Path, scored: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    score(images, scored, bundle, shard_size=3)
    said = (
        "6 of 8 images are unlike the detector's training images: 4 by size (smaller than 32"
        " pixels), 2 by format (training: PNG); their scores may be unreliable"
    )
    assert said in capsys.readouterr().err
    page = scored.parent / "page.html"
    run(ReviewConfig(src=str(scored), file=str(page), overwrite=True))
    assert said in unescape(page.read_text(encoding="utf-8"))


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
        others = [field.name for field in expected.schema if field.type != pa.float32()]
        assert found.select(others) == expected.select(others)


def test_python_gives_the_scores_of_the_command(images: Path, bundle: Path, scored: Path) -> None:
    rows = pq.read_table(scored / "scores").to_pylist()
    good = [row for row in rows if row["error"] is None]
    detector = load_detector(str(bundle))
    data = [(images / row["key"]).read_bytes() for row in good]
    for given in (data, [decode_image(each) for each in data]):
        logit = detector.predict_logit(given, batch_size=7)
        assert logit == pytest.approx([row["logit"] for row in good], abs=1e-5)


def test_a_new_image_and_another_threshold_keep_the_columns(
    images: Path, bundle: Path, tmp_path: Path
) -> None:
    src, out = tmp_path / "src", tmp_path / "out"
    src.mkdir()
    for key in ("real/a.png", "fake/b.jpg"):
        (src / key.replace("/", "-")).write_bytes((images / key).read_bytes())
    before = score(src, out, bundle)
    (src / "new.png").write_bytes((images / "fake/c.png").read_bytes())
    rows = score(src, out, bundle, extend=True)
    assert {key: rows[key] for key in before} == before
    assert rows["new.png"]["num_crops"] == 3
    file = tmp_path / "rows.jsonl"
    run(ExportConfig(src=str(out), file=str(file), sort=("crop_logit_std desc",)))
    spread = [json.loads(line)["crop_logit_std"] for line in file.read_text().splitlines()]
    assert len(spread) == 3
    assert spread == sorted(spread, reverse=True)
    run(ExportConfig(src=str(out), file=str(tmp_path / "rows.csv")))
    assert (tmp_path / "rows.csv").read_text().splitlines()[0].endswith('"crop_logit_std"')
    run(ReviewConfig(src=str(out), file=str(tmp_path / "page.html")))
    (part,) = (out / "scores").glob("part-00000*")
    part.write_bytes(b"")
    run(RepairConfig(out=str(out)))
    assert {row["key"]: row for row in pq.read_table(out / "scores").to_pylist()} == rows


def test_a_column_of_the_same_name_is_refused(images: Path, bundle: Path, tmp_path: Path) -> None:
    listed = tmp_path / "list.csv"
    listed.write_text(f"path,num_crops\n{images}/real/a.png,3\n")
    with pytest.raises(UsageError, match=r"num_crops.*--drop-columns"):
        score(listed, tmp_path / "out", bundle, allow_prefix=(str(images),))
    rows = score(
        listed, tmp_path / "out2", bundle, allow_prefix=(str(images),), drop_columns=("num_crops",)
    )
    assert [row["num_crops"] for row in rows.values()] == [5]


def test_each_cell_of_a_grid_perturbs_the_image_before_it_is_cropped(
    images: Path, bundle: Path, scored: Path, tmp_path: Path
) -> None:
    pytest.importorskip("captum")
    (tmp_path / "grid.yaml").write_text("half: {brightness: 0.5}\nsmall: {max_side: 60}\n")
    run(ConvertConfig(src=str(images), out=str(tmp_path / "shards"), num_workers=0))
    common: dict[str, Any] = {"num_workers": 0, "num_bootstrap": 10, "max_error_rate": 1.0}
    run(
        EvaluateConfig(
            shards=str(tmp_path / "shards"),
            out=str(tmp_path / "report"),
            bundle=str(bundle),
            precision="float32",
            grid=str(tmp_path / "grid.yaml"),
            gradient_maps=True,
            slice=("num_crops",),
            **common,
        )
    )
    table = pq.read_table(tmp_path / "report" / "predictions")
    assert table.schema.names == [*SCORES, *CROPS, "logit_half", "logit_small"]
    for row in table.to_pylist():
        if row["error"] is None:
            data = (images / row["key"]).read_bytes()
            for name, cell in (("half", {"brightness": 0.5}), ("small", {"max_side": 60})):
                changed = perturb_image(decode_image(data), cell, seed_noise(data))
                if changed is not None:
                    wanted = find_logits(bundle, changed).mean()
                    assert row[f"logit_{name}"] == pytest.approx(wanted, abs=1e-4)
    page = (tmp_path / "report" / "report.html").read_text()
    assert "5 at most, of 32 px" in page
    (slices,) = json.loads((tmp_path / "report" / "metrics.json").read_text())["slices"].keys()
    assert slices == "num_crops"

    run(EvaluateConfig(shards=str(scored), out=str(tmp_path / "stored"), **common))
    stored = pq.read_table(tmp_path / "stored" / "predictions")
    names = ["key", "logit", *CROPS]
    expected = pq.read_table(scored / "scores").select(names).to_pylist()
    assert stored.select(names).sort_by("key").to_pylist() == sorted(
        expected, key=lambda row: row["key"]
    )


def test_a_cost_counts_every_crop(bundle: Path, scored: Path, tmp_path: Path) -> None:
    flipped = write_crop_bundle(tmp_path / "bundle", flip=True)
    assert read_candidate(str(bundle), StoreConfig()).num_views == 5
    assert read_candidate(str(scored), StoreConfig()).num_views == 5
    assert read_candidate(str(flipped), StoreConfig()).num_views == 10


def test_an_onnx_model_takes_crops_and_says_how_many(bundle: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    summary = run(ExportConfig(src=str(bundle), file=str(tmp_path / "model.onnx")))
    assert summary["num_crops"] == 5
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    properties = session.get_modelmeta().custom_metadata_map
    assert (properties["fit"], properties["num_crops"]) == ("crops", "5")
    pixels = np.random.default_rng(0).integers(0, 256, (100, 130, 3), np.uint8)
    crops = load_bundle(bundle)[0].preprocessing.fit_pixels(pixels)
    logit, _ = session.run(None, {"images": crops})
    p_fake = compute_p_fake(logit.mean(keepdims=True), float(properties["temperature"]))
    assert p_fake == pytest.approx(load_detector(str(bundle)).predict([pixels]), abs=1e-5)


def test_the_python_of_the_card_gives_what_score_gives(
    images: Path, bundle: Path, scored: Path
) -> None:
    metrics = compute_metrics(
        np.array([1.0, -1.0]), np.array([1, 0]), temperature=1, threshold=0.5, num_bootstrap=0
    )
    card = model_card(
        name="x",
        architecture="small_cnn_w8_d1",
        num_parameters=1,
        trained_on="x",
        domain=TrainingDomain(sides=(32, ANY_SIDE), formats=("PNG",), jpeg_qualities=None),
        preprocessing=load_bundle(bundle)[1].preprocessing.to_dict(),
        training={},
        calibration=CALIBRATION,
        metrics=metrics,
    )
    assert "crops of their own resolution, 5 at most" in card
    assert "Sides: 32 or more pixels" in card
    snippet = card.split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(snippet.replace("BUNDLE", str(bundle)).replace("IMAGE", f"{images}/real/a.png"), names)
    rows = {row["key"]: row for row in pq.read_table(scored / "scores").to_pylist()}
    assert names["p_fake"] == pytest.approx(rows["real/a.png"]["p_fake"], abs=1e-5)


@pytest.mark.usefixtures("ray_cluster")
def test_workers_on_ray_give_equal_bits(
    images: Path, bundle: Path, scored: Path, tmp_path: Path
) -> None:
    expected = pq.read_table(scored / "scores").replace_schema_metadata()
    for num_workers in (1, 2):
        out = tmp_path / f"{num_workers}"
        score(images, out, bundle, shard_size=3, num_workers=num_workers)
        assert pq.read_table(out / "scores").replace_schema_metadata() == expected
