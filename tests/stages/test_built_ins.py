"""Built-in detectors: by name, and by the sizes of the images where none is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from built_ins import add_wild
from PIL import Image

from cifake_ray import load_detector
from cifake_ray.config import EvaluateConfig, RepairConfig, ReviewConfig, ScoreConfig, TrainConfig
from cifake_ray.config.submit import check_remote_paths
from cifake_ray.core.imaging.training_domain import TrainingDomain, choose_detector
from cifake_ray.errors import BundleError, RunMismatch, UsageError
from cifake_ray.pipeline import run_verb
from cifake_ray.storage.bundles.built_ins import (
    list_built_ins,
    locate_bundle,
    name_bundle,
    pin_bundle,
)
from cifake_ray.storage.bundles.bundle import read_bundle_info
from cifake_ray.storage.sources import sample_sizes

Choose = Callable[..., str]


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_wild(tmp_path / "built-in", monkeypatch)


def write_images(folder: Path, side: int, count: int = 4) -> Path:
    generator = np.random.default_rng(side)
    for label in ("REAL", "FAKE"):
        (folder / label).mkdir(parents=True, exist_ok=True)
        for number in range(count // 2):
            pixels = generator.integers(0, 256, (side, side + 8, 3), np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{side}-{number}.jpg")
    return folder


def score(src: Path, out: Path, **options: Any) -> Any:
    config = ScoreConfig(src=str(src), out=str(out), num_workers=0, **options)
    return run_verb(config, 0.0)[0]


def read_record(out: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((out / "_run.json").read_text())
    return record


def test_the_domain_chooses_by_more_than_half_of_the_sides() -> None:
    domains = {
        "wild": TrainingDomain(sides=(128, 4000), formats=("JPEG",), jpeg_qualities=None),
        "cifake": TrainingDomain(sides=(32, 32), formats=("JPEG",), jpeg_qualities=None),
    }
    assert choose_detector([32, 64, 500], domains) == (
        "cifake",
        "2 of 3 sampled images are at most 64 pixels",
    )
    assert choose_detector([32, 64, 65, 500], domains) == (
        "wild",
        "2 of 4 sampled images are larger than 64 pixels",
    )
    assert choose_detector([], domains) == ("wild", "the sizes of the images are not known")
    assert choose_detector([1], {"cifake": domains["cifake"]})[0] == "cifake"
    assert choose_detector([1], {**domains, "any": None})[0] == "cifake"
    assert choose_detector([9999], {**domains, "any": None})[0] == "any"


@pytest.mark.usefixtures("two")
def test_a_name_wins_over_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(locate_bundle("cifake"), tmp_path / "wild")
    assert list_built_ins() == ["cifake", "wild"]
    assert read_bundle_info(locate_bundle("wild")).preprocessing.image_size == 64
    assert locate_bundle("./wild") == tmp_path / "wild"
    assert read_bundle_info(locate_bundle("./wild")).preprocessing.image_size == 32
    assert [pin_bundle(uri) for uri in ("wild", "./wild")] == ["wild", str(tmp_path / "wild")]
    assert name_bundle(locate_bundle("wild")) == "wild"
    assert name_bundle(tmp_path / "wild") == str(tmp_path / "wild")
    assert load_detector().bundle.preprocessing.image_size == 64
    assert load_detector("cifake").bundle.preprocessing.image_size == 32


@pytest.mark.usefixtures("two")
def test_a_job_may_name_a_built_in() -> None:
    for name in ("wild", "cifake"):
        config = ScoreConfig(src="s3://b/i", out="s3://b/o", bundle=name)
        check_remote_paths(config, list_built_ins())
        train = TrainConfig(shards="s3://b/i", run="s3://b/r", weights=name)
        check_remote_paths(train, list_built_ins())
    taught = TrainConfig(shards="s3://b/i", run="s3://b/r", teacher="cifake,s3://b/t,mine")
    with pytest.raises(UsageError, match="--teacher is 'mine'"):
        check_remote_paths(taught, list_built_ins())
    check_remote_paths(replace(taught, teacher="cifake,s3://b/t"), list_built_ins())
    with pytest.raises(UsageError, match="--bundle is 'other'"):
        check_remote_paths(
            ScoreConfig(src="s3://b/i", out="s3://b/o", bundle="other"), list_built_ins()
        )


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize(("side", "chosen"), [(32, "cifake"), (100, "wild")])
def test_the_images_choose_and_the_run_keeps_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], side: int, chosen: str
) -> None:
    src, out = write_images(tmp_path / "images", side), tmp_path / "out"
    plan = run_verb(ScoreConfig(src=str(src), out=str(out), dry_run=True), 0.0)[0]
    assert plan.bundle == str(locate_bundle(chosen))
    line = f"using the built-in detector `{chosen}`; --bundle cifake or wild chooses"
    assert line in capsys.readouterr().err
    assert score(src, out).done == 4
    assert line in capsys.readouterr().err
    record = read_record(out)
    assert record["config"]["bundle"] == chosen
    assert record["settings"]["bundle"] == read_bundle_info(locate_bundle(chosen)).identify(
        record["settings"]["precision"]
    )
    # Images of the other kind come to be the most: the run's own choice stands.
    write_images(src, 132 - side, count=20)
    assert score(src, out, extend=True).done == 24
    assert read_record(out)["settings"]["bundle"] == record["settings"]["bundle"]
    assert score(src, out, bundle=chosen).listed == 24
    other = {"cifake": "wild", "wild": "cifake"}[chosen]
    with pytest.raises(RunMismatch, match="bundle"):
        score(src, out, bundle=other)
    capsys.readouterr()
    page = tmp_path / "page.html"
    run_verb(ReviewConfig(src=str(out), file=str(page)), 0.0)
    assert f"built-in {chosen}" in page.read_text()
    (out / "_SUCCESS").unlink()
    next((out / "scores").glob("part-*")).unlink()
    assert run_verb(RepairConfig(out=str(out)), 0.0)[0].done == 24
    assert "using the built-in" not in capsys.readouterr().err


@pytest.mark.usefixtures("two")
def test_a_run_of_before_goes_on_with_cifake(tmp_path: Path) -> None:
    src, out = write_images(tmp_path / "images", 100), tmp_path / "out"
    score(src, out, bundle="cifake")
    record = read_record(out)
    record["config"]["bundle"] = None  # as versions before wrote it
    (out / "_run.json").write_text(json.dumps(record))
    (out / "_SUCCESS").unlink()
    next((out / "scores").glob("part-*")).unlink()
    assert score(src, out).done == 4


@pytest.mark.usefixtures("two")
def test_a_run_with_a_bundle_of_ones_own_still_asks_for_it(tmp_path: Path) -> None:
    src, out = write_images(tmp_path / "images", 100), tmp_path / "out"
    shutil.copytree(locate_bundle("wild"), tmp_path / "mine")
    (tmp_path / "mine" / "config.json").write_bytes(
        (tmp_path / "mine" / "config.json").read_bytes() + b"\n"
    )
    score(src, out, bundle=str(tmp_path / "mine"))
    with pytest.raises(RunMismatch, match="bundle"):
        score(src, out)


@pytest.mark.usefixtures("two")
def test_evaluate_chooses_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = write_images(tmp_path / "images", 100)
    config = EvaluateConfig(shards=str(src), out=str(tmp_path / "out"), num_workers=0)
    assert run_verb(config, 0.0)[0].done == 4
    assert "4 of 4 sampled images are larger than 64 pixels" in capsys.readouterr().err
    assert read_record(tmp_path / "out")["config"]["bundle"] == "wild"


def test_one_built_in_looks_at_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sample_sizes, "inspect_image", lambda data: pytest.fail("looked"))
    monkeypatch.setattr("cifake_ray.stages.score.list_built_ins", lambda: ["cifake"])
    score(write_images(tmp_path / "images", 100), tmp_path / "out", dry_run=True)
    assert "using the built-in" not in capsys.readouterr().err


def test_a_name_that_is_none_is_a_path(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no config.json; .* a built-in detector: cifake"):
        score(write_images(tmp_path / "images", 32), tmp_path / "out", bundle="wilds")
