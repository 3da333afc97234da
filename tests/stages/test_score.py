"""score and evaluate: one row per key, the same numbers by every road."""

from __future__ import annotations

import csv
import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cifake_ray.config import ExportConfig, RepairConfig, ScoreConfig
from cifake_ray.core.imaging.training_domain import TrainingDomain
from cifake_ray.core.schema import FOOTER_KEY
from cifake_ray.errors import BundleError, RunMismatch
from cifake_ray.pipeline import run_verb
from cifake_ray.stages.batch.summary import BatchSummary
from cifake_ray.stages.score import score_images
from cifake_ray.storage.bundles.built_ins import locate_bundle
from cifake_ray.storage.bundles.bundle import read_bundle_info

pytestmark = pytest.mark.usefixtures("ray_cluster")


def run_score(
    src: Path, out: Path, log: Callable[[str], None] = print, **options: Any
) -> BatchSummary:
    config = ScoreConfig(src=str(src), out=str(out), **options)
    bundle = locate_bundle(config.bundle)
    log_end = lambda line: line.endswith("...") or log(line)  # noqa: E731
    summary = score_images(config, src, out, bundle, lambda _: None, time.monotonic(), log_end)
    assert isinstance(summary, BatchSummary)
    assert summary.listed == summary.done + summary.failed
    return summary


def read_rows(out: Path) -> dict[str, dict[str, Any]]:
    rows = pq.read_table(out / "scores").to_pylist()
    keyed = {row["key"]: row for row in rows}
    assert len(keyed) == len(rows), "a key stands twice"
    return keyed


@pytest.mark.smoke
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


def test_one_worker_two_workers_and_none_of_ray_give_equal_bits(
    sample_folder: Path, bundle: Path, tmp_path: Path
) -> None:
    shards = {}
    for num_workers in (0, 1, 2):
        out = tmp_path / f"{num_workers}"
        summary = run_score(
            sample_folder, out, bundle=str(bundle), shard_size=20, num_workers=num_workers
        )
        assert summary.ran_on.endswith("on Ray" if num_workers else "without Ray")
        parts = sorted((out / "scores").glob("part-*"))
        shards[num_workers] = [pq.read_table(part).replace_schema_metadata() for part in parts]
    assert shards[0] == shards[1] == shards[2]


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

    source = tmp_path / "source"
    source.mkdir()
    (source / "text.jpg").write_text("words")
    config = ConvertConfig(src=str(source), out=str(tmp_path / "shards"))
    run_verb(config, time.monotonic())
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
    config = ExportConfig(src=str(tmp_path / "out"), file=str(tmp_path / "scores.csv"))
    assert run_verb(config, time.monotonic())[0]["rows"] == 60
    with open(tmp_path / "scores.csv", newline="") as file:
        rows = {row["key"]: row for row in csv.DictReader(file)}
    for key, row in read_rows(tmp_path / "out").items():
        assert float(rows[key]["p_fake"]) == pytest.approx(row["p_fake"], abs=1e-6)


# --- images unlike those of training -------------------------------------------------------------

UNLIKE = {"size": 3, "format": 2, "jpeg_quality": 2, "any": 5}
WARNING = (
    "score: 5 of 11 images are unlike the detector's training images: 3 by size (training: 32"
    " pixels), 2 by format (training: JPEG), 2 by JPEG quality (training: 75); their scores may be"
    " unreliable"
)


@pytest.fixture
def mixed(sample_folder: Path, tmp_path: Path) -> Path:
    """6 images as in training, 5 unlike them, 1 that is none."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for number, path in enumerate(sorted(sample_folder.rglob("*.jpg"))[:6]):
        (folder / f"{number}.jpg").write_bytes(path.read_bytes())
    image = Image.open(folder / "0.jpg")
    image.save(folder / "a.png")
    image.resize((48, 48)).save(folder / "b.png")
    image.save(folder / "c.jpg", quality=90)
    image.resize((32, 33)).save(folder / "d.jpg", quality=75)
    image.resize((16, 32)).save(folder / "e.jpg", quality=30)
    (folder / "f.jpg").write_text("words")
    return folder


def test_a_bundle_says_what_it_learned_from(bundle: Path) -> None:
    assert read_bundle_info(bundle).domain == TrainingDomain(
        sides=(32, 32), formats=("JPEG",), jpeg_qualities=(75, 75)
    )
    card = (bundle / "README.md").read_text()
    assert "Sides: 32 pixels; formats: JPEG; JPEG quality: 75." in card


def test_images_unlike_those_of_training_are_counted_and_warned_of_once(
    mixed: Path, bundle: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    options: dict[str, Any] = {"bundle": str(bundle), "shard_size": 4, "max_error_rate": 0.1}
    first = run_score(mixed, tmp_path / "out", said.append, **options)
    assert first.unlike_training == UNLIKE
    assert said == [WARNING]
    assert run_score(mixed, tmp_path / "out", said.append, **options) == first
    told, again = said[1:]
    assert again == WARNING, "a finished run says the same"
    assert re.fullmatch(r"score: finished 20..-..-.. ..:.. UTC; the source was not looked .*", told)

    (tmp_path / "out" / "_SUCCESS").unlink()
    (tmp_path / "out" / "scores" / "part-00001.parquet").unlink()
    resumed = run_score(mixed, tmp_path / "out", said.append, **options)
    assert (resumed.shards_resumed, resumed.unlike_training) == (2, UNLIKE)

    with open(tmp_path / "out" / "scores" / "part-00002.parquet", "r+b") as file:
        file.write(b"junk")
    repaired, _ = run_verb(RepairConfig(out=str(tmp_path / "out")), time.monotonic())
    assert (repaired.shards_resumed, repaired.unlike_training) == (2, UNLIKE)
    assert said == [WARNING, told, WARNING, WARNING]


def test_rows_that_are_mended_are_counted_with_the_others_of_their_shard(
    mixed: Path, bundle: Path, tmp_path: Path
) -> None:
    images = [{"bytes": path.read_bytes(), "path": path.name} for path in sorted(mixed.iterdir())]
    keys = [image["path"] for image in images]

    def write_shard(late: set[str]) -> None:
        errors = pa.array(["io_network" if key in late else None for key in keys], pa.string())
        table = pa.table({"key": keys, "image": images, "error": errors})
        table = table.replace_schema_metadata({FOOTER_KEY: b"{}"})
        pq.write_table(table, tmp_path / "shard.parquet")

    def run(**options: Any) -> dict[str, int]:
        options = {"bundle": str(bundle), "max_error_rate": 1.0, **options}
        return run_score(tmp_path / "shard.parquet", tmp_path / "out", **options).unlike_training

    write_shard({"1.jpg", "b.png", "c.jpg"})
    assert run() == {"size": 2, "format": 1, "jpeg_quality": 1, "any": 3}
    write_shard(set())
    assert run(retry_errors=True) == UNLIKE


def test_images_as_in_training_are_not_warned_of(
    sample_folder: Path, bundle: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    summary = run_score(sample_folder, tmp_path / "out", said.append, bundle=str(bundle))
    assert summary.unlike_training == {"size": 0, "format": 0, "jpeg_quality": 0, "any": 0}
    assert said == []


def test_a_bundle_that_does_not_say_what_it_learned_from_warns_of_nothing(
    mixed: Path, bundle: Path, tmp_path: Path
) -> None:
    older = tmp_path / "older"
    shutil.copytree(bundle, older)
    config = json.loads((older / "config.json").read_text())
    del config["cifake_ray"]["domain"]
    (older / "config.json").write_text(json.dumps(config))
    said: list[str] = []
    summary = run_score(mixed, tmp_path / "out", said.append, bundle=str(older), max_error_rate=0.1)
    assert summary.unlike_training == {}
    assert said == []
