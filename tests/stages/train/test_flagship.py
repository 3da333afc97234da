"""The recipe `fast` on a part of the real CIFAKE, and the box's detector on what comes its way."""

from __future__ import annotations

import os
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from sklearn.metrics import roc_auc_score

from cifake_ray.config import ConvertConfig, ScoreConfig, TrainConfig
from cifake_ray.core.schema import FAKE, LABEL_NAMES
from cifake_ray.pipeline import run_verb
from cifake_ray.stages.batch.summary import BatchSummary
from cifake_ray.stages.score import score_images
from cifake_ray.stages.train.driver import train_detector
from cifake_ray.storage.bundles.built_ins import locate_bundle
from cifake_ray.storage.presets.yaml_presets import RECIPES

pytestmark = pytest.mark.usefixtures("ray_cluster")

EVERY = 5  # of the mixed images


def score(src: Path, out: Path, **options: float) -> tuple[BatchSummary, list[str]]:
    """With the detector in the box: what was done, and what was said."""
    said: list[str] = []
    config = ScoreConfig(src=str(src), out=str(out), **options)  # type: ignore[arg-type]
    box = locate_bundle(None)
    summary = score_images(config, src, out, box, lambda _: None, time.monotonic(), said.append)
    assert isinstance(summary, BatchSummary)
    return summary, said


def test_fast_learns_from_three_thousand_images(cifake_folder: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    config = ConvertConfig(src=str(cifake_folder), out=str(shards))
    run_verb(config, time.monotonic())
    recipe = yaml.safe_load((RECIPES / "fast.yaml").read_text())
    summary = train_detector(
        TrainConfig(shards=str(shards), run=str(tmp_path / "run"), num_workers="0", **recipe),
        lambda row, epochs: None,
        time.monotonic(),
    )
    assert summary["epochs"] == recipe["epochs"]
    assert summary["val_accuracy"] > 0.85


def test_the_box_is_small_and_its_card_says_what_it_knows() -> None:
    box = locate_bundle(None)
    assert isinstance(box, Path)
    assert sum(path.stat().st_size for path in box.iterdir()) < 3 * 10**6
    card = " ".join((box / "README.md").read_text().split())
    for said in ("CIFAKE", "Stable Diffusion 1.4", "32x32", "Do not trust it"):
        assert said in card


def test_the_box_tells_cifake_apart(cifake_folder: Path, tmp_path: Path) -> None:
    summary, said = score(cifake_folder / "test", tmp_path / "out")
    table = pq.read_table(tmp_path / "out" / "scores", columns=["key", "p_fake"])
    names = [key.split("/")[0] for key in table.column("key").to_pylist()]
    is_fake = np.array([LABEL_NAMES.index(name) for name in names]) == FAKE
    p_fake = table.column("p_fake").to_numpy()
    assert summary.failed == 0
    assert ((p_fake >= 0.5) == is_fake).mean() > 0.965
    assert roc_auc_score(is_fake, p_fake) > 0.995
    assert summary.unlike_training["any"] == 0
    assert not [line for line in said if "unlike" in line]


def test_the_box_scores_images_of_all_kinds_and_says_that_they_are_unlike(tmp_path: Path) -> None:
    archive = Path(os.environ.get("CIFAKE_TEST_DATA", "")) / "mixed-generators.tar"
    if not archive.is_file():
        pytest.skip("CIFAKE_TEST_DATA names no folder with mixed-generators.tar")
    with tarfile.open(archive) as members:
        images = [m for m in members if m.isfile() and not m.name.endswith(".csv")][::EVERY]
        members.extractall(tmp_path / "images", images, filter="data")
    summary, said = score(tmp_path / "images", tmp_path / "out", max_error_rate=0.05)
    keys = pq.read_table(tmp_path / "out" / "scores", columns=["key"]).column("key").to_pylist()
    assert sorted(keys) == sorted(m.name.removeprefix("./") for m in images)
    assert summary.listed == len(images) == summary.done + summary.failed
    assert summary.unlike_training["any"] == summary.done  # none has 32 pixels
    assert len([line for line in said if "are unlike the detector's training images" in line]) == 1
