"""score and evaluate: one row per key, the same numbers by every road."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from cifake_ray.config import ExportConfig, ScoreConfig
from cifake_ray.errors import BundleError, RunMismatch
from cifake_ray.stages.batch import BatchSummary
from cifake_ray.stages.score import score_images
from cifake_ray.storage.export import export_scores

pytestmark = pytest.mark.usefixtures("ray_cluster")


def run_score(src: Path, out: Path, **options: Any) -> BatchSummary:
    config = ScoreConfig(src=str(src), out=str(out), **options)
    summary = score_images(config, lambda progress: None, time.time())
    assert isinstance(summary, BatchSummary)
    assert summary.listed == summary.done + summary.failed
    return summary


def read_rows(out: Path) -> dict[str, dict[str, Any]]:
    rows = pq.read_table(out / "scores").to_pylist()
    keyed = {row["key"]: row for row in rows}
    assert len(keyed) == len(rows), "a key stands twice"
    return keyed


def test_a_folder_a_list_and_shards_give_the_same_scores(
    sample_folder: Path, shards: Path, bundle: Path, tmp_path: Path
) -> None:
    keys = sorted(p.relative_to(sample_folder).as_posix() for p in sample_folder.rglob("*.jpg"))
    listed = sample_folder / "list.csv"
    with open(listed, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "price"])
        writer.writerows([key, f"{number}"] for number, key in enumerate(keys))
    try:
        run_score(listed, tmp_path / "list", bundle=str(bundle))
    finally:
        listed.unlink()
    run_score(sample_folder, tmp_path / "folder", bundle=str(bundle), shard_size=13, batch_size=7)
    run_score(shards, tmp_path / "shards", bundle=str(bundle))
    roads = [read_rows(tmp_path / name) for name in ("folder", "list", "shards")]
    for rows in roads:
        assert sorted(rows) == keys
        p_fake = [rows[key]["p_fake"] for key in keys]
        assert np.allclose(p_fake, [roads[0][key]["p_fake"] for key in keys], atol=1e-5)
    assert roads[1][keys[3]]["price"] == "3", "columns of a list are carried along"
    assert roads[0][keys[0]]["label"] == roads[2][keys[0]]["label"]


def test_a_bad_image_does_not_take_its_neighbours_score(
    sample_folder: Path, bundle: Path, tmp_path: Path
) -> None:
    files = sorted(sample_folder.rglob("*.jpg"))[:9]
    good, bad = tmp_path / "good", tmp_path / "bad"
    for folder in (good, bad):
        folder.mkdir()
        for number, path in enumerate(files):
            (folder / f"{number}.jpg").write_bytes(path.read_bytes())
    (bad / "4.jpg").write_bytes((bad / "4.jpg").read_bytes()[:300])
    (bad / "0a-text.jpg").write_text("words")
    run_score(good, tmp_path / "good-out", bundle=str(bundle))
    summary = run_score(bad, tmp_path / "bad-out", bundle=str(bundle), max_error_rate=0.1)
    expected, got = read_rows(tmp_path / "good-out"), read_rows(tmp_path / "bad-out")
    for key, row in got.items():
        assert (row["p_fake"] is None) == (row["error"] is not None)
        if key in ("4.jpg", "0a-text.jpg"):
            assert row["error"] in ("truncated", "not_an_image")
        else:
            assert row["p_fake"] == pytest.approx(expected[key]["p_fake"], abs=1e-5)
    assert summary.failed == 2
    assert summary.exit_code(0.1) == 3


def test_errors_of_the_shards_are_carried_into_the_scores(bundle: Path, tmp_path: Path) -> None:
    from cifake_ray.config import ConvertConfig
    from cifake_ray.stages.convert import convert_images

    source = tmp_path / "source"
    source.mkdir()
    (source / "text.jpg").write_text("words")
    config = ConvertConfig(src=str(source), out=str(tmp_path / "shards"))
    convert_images(config, lambda progress: None, time.time())
    run_score(tmp_path / "shards", tmp_path / "out", bundle=str(bundle))
    assert read_rows(tmp_path / "out")["text.jpg"]["error"] == "not_an_image"


def test_target_fpr_picks_the_stored_threshold(
    sample_folder: Path, bundle: Path, tmp_path: Path
) -> None:
    thresholds = json.loads((bundle / "config.json").read_text())["cifake_ray"]["calibration"]
    for target, name in ((None, "threshold"), (0.01, "threshold_fpr_1")):
        out = tmp_path / name
        run_score(sample_folder, out, bundle=str(bundle), target_fpr=target)
        for row in read_rows(out).values():
            assert row["is_fake"] == (row["p_fake"] >= np.float32(thresholds[name]))


def test_another_bundle_is_refused_on_the_same_output(
    sample_folder: Path, bundle: Path, tmp_path: Path
) -> None:
    run_score(sample_folder, tmp_path / "out", bundle=str(bundle))
    other = tmp_path / "other"
    other.mkdir()
    for path in bundle.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    config = json.loads((other / "config.json").read_text())
    config["cifake_ray"]["calibration"]["temperature"] *= 2
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunMismatch, match="bundle: "):
        run_score(sample_folder, tmp_path / "out", bundle=str(other))


def test_a_missing_bundle_is_refused_before_anything_starts(
    sample_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match=r"no config.json; give the bundle"):
        run_score(sample_folder, tmp_path / "out", bundle=str(tmp_path))
    assert not (tmp_path / "out").exists()


def test_logits_that_are_not_finite_become_errors(
    sample_folder: Path, bundle: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    for path in bundle.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights["12.bias"][0] = float("nan")
    save_file(weights, broken / "model.safetensors")
    summary = run_score(sample_folder, tmp_path / "out", bundle=str(broken))
    assert summary.errors == {"nan_score": 60}
    assert summary.exit_code(0.01) == 3


def test_scores_export_as_csv(sample_folder: Path, bundle: Path, tmp_path: Path) -> None:
    run_score(sample_folder, tmp_path / "out", bundle=str(bundle))
    config = ExportConfig(scores=str(tmp_path / "out"), file=str(tmp_path / "scores.csv"))
    assert export_scores(config) == 60
    with open(tmp_path / "scores.csv", newline="") as file:
        rows = {row["key"]: row for row in csv.DictReader(file)}
    for key, row in read_rows(tmp_path / "out").items():
        assert float(rows[key]["p_fake"]) == pytest.approx(row["p_fake"], abs=1e-6)
