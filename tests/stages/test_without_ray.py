"""What needs no Ray and starts none: --dry-run of each verb, and a training in this process."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image
from typer.testing import CliRunner

from cifake_ray import cli
from cifake_ray.config import ScoreConfig, TrainConfig
from cifake_ray.stages.batch import driver
from cifake_ray.stages.resources import Node, Placement, Resources
from cifake_ray.stages.train import progress
from cifake_ray.stages.train.driver import train_detector
from cifake_ray.storage.runs.run_plan import RunPlan

NUM_IMAGES = 60


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    rows = []
    for number in range(NUM_IMAGES):
        label = number % 2
        pixels = rng.integers(0, 128 + 127 * label, (32, 32, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG")
        folder = tmp_path / "images" / "train" / ("REAL", "FAKE")[label]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jpg").write_bytes(buffer.getvalue())
        rows.append({"image": {"bytes": buffer.getvalue(), "path": f"{number}"}, "label": label})
    (tmp_path / "shards").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "shards" / "train.parquet")
    return tmp_path


def test_a_process_with_a_gpu_is_fed_by_no_tasks_of_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Resources((Node(num_cpus=8, num_gpus=1),))
    monkeypatch.setattr(driver, "read_local_resources", lambda device: here)
    monkeypatch.setattr(driver, "LocalPool", lambda *_: nullcontext())
    config = ScoreConfig(src="s", out="o", num_workers=0)
    new = RunPlan(
        out=Path("o"), command="score", settings={}, config={}, list_source=Mock(), shard_rows=None
    )
    made = {"make_processor": driver.BatchPlan, "run": new}
    plan: Any = SimpleNamespace(config=config, device="auto", **made)
    found: Any = "the run"
    with ExitStack() as stack:
        run, placement, _ = driver._start_here(plan, found, stack)
    assert (run, placement) == (found, Placement(1, 1, 1, num_feeders=0))
    assert driver.choose_placement(here, 0, "auto").num_feeders == 7  # as on a cluster


def test_the_plan_of_a_pipeline_is_that_of_convert_and_of_options_that_fit(images: Path) -> None:
    words = ["pipeline", str(images / "images"), str(images / "out"), "--dry-run"]
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 0, result.output
    assert re.search(r"^labels +FAKE 30, REAL 30$", result.stdout, re.MULTILINE)
    assert re.search(r"^command +pipeline$", result.stdout, re.MULTILINE)
    refused = CliRunner().invoke(cli.app, [*words, "--model", "resnet"])
    assert refused.exit_code == 2
    assert not (images / "out").exists()


@pytest.mark.parametrize("verb", ["convert", "score"])
def test_the_plan_of_a_batch_says_what_where_and_how(images: Path, verb: str) -> None:
    out = images / "out"
    words = [verb, str(images / "images"), str(out), "--dry-run", "--json", "--num-workers", "1"]
    result = CliRunner().invoke(cli.app, words)
    plan = json.loads(result.stdout.splitlines()[-1])
    assert result.exit_code == 0, result.output
    assert plan["listed"] == NUM_IMAGES
    assert plan["labels"] == {"REAL": NUM_IMAGES // 2, "FAKE": NUM_IMAGES // 2}
    assert plan["splits"] == {"train": NUM_IMAGES}
    assert (plan["num_workers"], plan["device"]) == (1, "cpu")
    assert (plan["threshold"] is not None) == (verb == "score")
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "unused"),
    [
        (["--help"], {"ray", "torch", "pyarrow", "numpy"}),
        (["version"], {"ray", "torch", "pyarrow", "numpy"}),
        (["convert", "IMAGES", "OUT"], {"ray", "torch", "scipy", "botocore.session", "matplotlib"}),
        (["score", "IMAGES", "OUT"], {"ray", "sklearn", "botocore.session", "matplotlib"}),
        (["export", "SCORES", "FILE"], {"ray", "torch", "scipy", "botocore.session", "matplotlib"}),
    ],
    ids=["help", "version", "convert", "score", "export"],
)
def test_a_command_imports_what_it_uses(images: Path, words: list[str], unused: set[str]) -> None:
    """In its own process and in those of its workers: imports are most of a short command."""
    (images / "scores").mkdir()
    pq.write_table(pa.table({"key": ["a"]}), images / "scores" / "part-00000.parquet")
    names = {"IMAGES": "images", "OUT": "out", "SCORES": "scores", "FILE": "scores.csv"}
    paths = {word: str(images / name) for word, name in names.items()}
    command = [sys.executable, "-m", "cifake_ray", *(paths.get(word, word) for word in words)]
    env = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    process = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in process.stderr.splitlines()}
    assert "cifake_ray.cli" in imported
    assert imported & unused == set()


def run_train(images: Path, **options: Any) -> tuple[dict[str, Any], list[str], list[Any]]:
    said: list[str] = []
    rows: list[Any] = []
    config = TrainConfig(
        shards=str(images / "shards"),
        run=str(images / "run"),
        **{"batch_size": 8, "num_workers": "0", "val_fraction": 0.3, "epochs": 2, **options},
        cache_dir=str(images / "cache"),
    )
    on_epoch = lambda row, epochs: rows.append(("epoch", row["epoch"]))  # noqa: E731
    on_step = lambda row: rows.append(("step", row))  # noqa: E731
    summary = train_detector(config, on_epoch, time.monotonic(), said.append, on_step)
    return summary, said, rows


@pytest.mark.parametrize(("workers", "expected"), [("0", 0), (None, 0), ("1", 1)])
def test_the_plan_of_a_training_says_what_where_and_how(
    images: Path, workers: str | None, expected: int
) -> None:
    plan, _, rows = run_train(images, dry_run=True, num_workers=workers, device="cpu")
    assert plan["labels"] == {"REAL": NUM_IMAGES // 2, "FAKE": NUM_IMAGES // 2}
    assert (plan["num_workers"], plan["device"]) == (expected, "cpu")
    assert plan["precision"] in ("float32", "bfloat16")
    assert plan["train_images"] + plan["val_images"] == NUM_IMAGES
    assert rows == []
    assert not (images / "run").exists()


def test_a_training_says_what_it_does_and_where_it_is(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "INTERVAL_S", 0.0)
    _, said, rows = run_train(images, epochs=1)
    text = "\n".join(said)
    assert " to train on (" in text
    assert "cnn, " in text
    assert "1 worker, " in text
    assert "device cpu, precision" in text
    assert "resuming" not in text
    steps = [row for kind, row in rows if kind == "step"]
    assert [step["batch"] for step in steps] == list(range(2, steps[0]["batches"]))
    assert all(0 < step["loss"] < 20 and step["images_per_s"] > 0 for step in steps)
    assert rows[-1] == ("epoch", 1)


def test_a_training_says_where_it_resumes(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import cifake_ray.stages.train.worker as worker

    class Killed(Exception):
        pass

    def fail(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(worker, "_write_best", fail)
        with pytest.raises(Killed):
            run_train(images)
    _, said, _ = run_train(images)
    assert "train: resuming after epoch 2 of 2" in said


def test_a_recipe_in_use_is_named(images: Path) -> None:
    words = ["train", str(images / "shards"), str(images / "run"), "--recipe", "fast"]
    result = CliRunner().invoke(cli.app, [*words, "--dry-run", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "train: recipe fast\n" in result.stderr
