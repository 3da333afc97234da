"""evaluate --grid: each image once, under every cell, in the same run; no Ray is needed."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cifake_ray.config import ConvertConfig, EvaluateConfig, RepairConfig, ScoreConfig
from cifake_ray.core.evaluation.calibration import compute_p_fake
from cifake_ray.core.imaging.decode import decode_image
from cifake_ray.core.imaging.perturbation import perturb_image, seed_noise
from cifake_ray.errors import RunMismatch, StorageError, UsageError
from cifake_ray.pipeline import run_verb
from cifake_ray.stages.evaluate.driver import read_metrics

GRID = "half: {brightness: 0.5}\nnoisy: {noise: 10}\nsmall: {max_side: 24}\n"
CELLS = ("half", "noisy", "small")


def run(config: Any) -> Any:
    return run_verb(config, time.monotonic())[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, sample_folder: Path) -> Path:
    """Shards of the sample and of a file that is no image, and a grid."""
    folder = tmp_path_factory.mktemp("grid")
    images = folder / "images"
    images.mkdir()
    for name in ("REAL", "FAKE"):
        (images / name).symlink_to(sample_folder / "train" / name)
    (images / "more" / "real").mkdir(parents=True)
    (images / "more" / "real" / "no.jpg").write_bytes(b"no image")
    config = ConvertConfig(
        src=str(images), out=str(folder / "shards"), num_workers=0, follow_symlinks=True
    )
    run(config)
    (folder / "grid.yaml").write_text(GRID)
    return folder


def evaluate(folder: Path, out: Path, grid: str | None, **options: Any) -> Any:
    config = EvaluateConfig(
        shards=str(folder / "shards"),
        out=str(out),
        grid=grid,
        num_workers=0,
        num_bootstrap=10,
        max_error_rate=1.0,
        precision="float32",
        **options,
    )
    return run(config)


@pytest.fixture(scope="module")
def done(folder: Path) -> Path:
    evaluate(folder, folder / "report", str(folder / "grid.yaml"))
    return folder / "report"


def read_rows(out: Path) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in pq.read_table(out / "predictions").to_pylist()}


def test_without_a_grid_the_scores_and_the_settings_are_those_of_before(
    folder: Path, done: Path, tmp_path: Path
) -> None:
    evaluate(folder, tmp_path / "plain", None)
    rows, plain = read_rows(done), read_rows(tmp_path / "plain")
    assert rows.keys() == plain.keys()
    for key, row in plain.items():
        assert not [name for name in row if name.startswith("logit_")]
        assert rows[key]["logit"] == pytest.approx(row["logit"], abs=1e-4)
    settings = json.loads((tmp_path / "plain" / "_run.json").read_text())["settings"]
    assert "grid" not in settings
    assert "grid" not in json.loads((tmp_path / "plain" / "metrics.json").read_text())
    assert "Perturbation" not in (tmp_path / "plain" / "report.html").read_text()


def test_a_cell_has_the_scores_of_images_that_were_saved_so(
    folder: Path, done: Path, tmp_path: Path
) -> None:
    rows = read_rows(done)
    cells = {"half": {"brightness": 0.5}, "noisy": {"noise": 10}, "small": {"max_side": 24}}
    keys = [key for key, row in rows.items() if row["error"] is None][:8]
    for key in keys:
        data = (folder / "images" / key).read_bytes()
        for name, cell in cells.items():
            pixels = perturb_image(decode_image(data), dict(cell), seed_noise(data))
            target = tmp_path / "images" / name / f"{keys.index(key)}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            assert pixels is not None
            Image.fromarray(pixels).save(target)
    config = ScoreConfig(
        src=str(tmp_path / "images"),
        out=str(tmp_path / "out"),
        num_workers=0,
        precision="float32",
    )
    run(config)
    scores = {r["key"]: r for r in pq.read_table(tmp_path / "out" / "scores").to_pylist()}
    assert len(scores) == 24
    for name in CELLS:
        for number, key in enumerate(keys):
            logit = scores[f"{name}/{number}.png"]["logit"]
            assert rows[key][f"logit_{name}"] == pytest.approx(logit, abs=1e-4)


def test_an_unreadable_image_has_a_row_without_any_logit(done: Path) -> None:
    row = read_rows(done)["more/real/no.jpg"]
    assert row["error"] == "not_an_image"
    assert [row[f"logit_{name}"] for name in CELLS] == [None] * 3


def test_the_numbers_follow_from_the_predictions(folder: Path, done: Path) -> None:
    grid = json.loads((done / "metrics.json").read_text())["grid"]
    rows = [row for row in read_rows(done).values() if row["error"] is None]
    temperature = json.loads((done / "metrics.json").read_text())["temperature"]
    label = np.array([row["label"] for row in rows])
    called = {
        name: compute_p_fake(np.array([row[column] for row in rows]), temperature)
        >= grid["threshold"]
        for name, column in {"clean": "logit", **{n: f"logit_{n}" for n in CELLS}}.items()
    }
    assert list(grid["cells"]) == ["clean", *CELLS]
    for name, cell in grid["cells"].items():
        assert cell["accuracy"]["value"] == pytest.approx(np.mean(called[name] == label))
        assert cell["flips"]["value"] == pytest.approx(np.mean(called[name] != called["clean"]))
    summary = evaluate(folder, done, str(folder / "grid.yaml")).metrics["grid"]
    assert summary["num_cells"] == 3
    assert summary["worst_cell"] == grid["worst_cell"]
    assert "cells" not in summary


@pytest.mark.parametrize("grid", [5, {}, {"threshold": "high"}, {"worst_accuracy": {}}])
def test_numbers_that_someone_has_edited_are_an_error_of_the_file(
    done: Path, tmp_path: Path, grid: object
) -> None:
    metrics = json.loads((done / "metrics.json").read_text())
    edited = {**metrics["grid"], **grid} if isinstance(grid, dict) and grid else grid
    (tmp_path / "metrics.json").write_text(json.dumps({**metrics, "grid": edited}))
    with pytest.raises(StorageError, match=r"metrics\.json: not the metrics"):
        read_metrics(tmp_path)


def test_another_grid_is_another_run(folder: Path, done: Path) -> None:
    for other in (None, "default", "{half: {brightness: 0.4}}"):
        with pytest.raises(RunMismatch, match="grid"):
            evaluate(folder, done, other)


def test_repair_needs_neither_the_file_of_the_grid_nor_its_old_content(
    folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "grid.yaml"
    file.write_text(GRID)
    out = tmp_path / "out"
    evaluate(folder, out, str(file))
    before = read_rows(out)
    file.write_text("other: {jpeg: 10}\n")
    shard = next((out / "predictions").glob("part-*"))
    shard.write_bytes(shard.read_bytes()[:-100])
    run(RepairConfig(out=str(out)))
    assert read_rows(out) == before


def test_a_column_of_the_shards_is_not_written_over(folder: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    for path in sorted((folder / "shards" / "shards").glob("part-*")):
        table = pq.read_table(path).replace_schema_metadata(None)
        column = np.zeros(table.num_rows)
        pq.write_table(table.append_column("logit_half", [column]), shards / path.name)
    config = EvaluateConfig(
        shards=str(shards), out=str(tmp_path / "out"), grid="{half: {jpeg: 9}}", num_workers=0
    )
    with pytest.raises(UsageError, match="columns of their own called logit_half"):
        run(config)
