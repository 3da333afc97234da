"""Something happens at each change that a command makes to its output; then it runs again.

Everything is real but the disk (`computer`), and Ray, whose part is one loop here.
CIFAKE_TEST_EXAMPLES=1 tries every event at every change, not one of them.
"""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from computer import disturb_every_change
from PIL import Image
from ray import tune

from cifake_ray.config import EvaluateConfig, ExportConfig, TrainConfig, TuneConfig
from cifake_ray.errors import UsageError
from cifake_ray.pipeline import run_verb
from cifake_ray.stages import evaluate
from cifake_ray.stages.batch import driver, shard_worker
from cifake_ray.stages.cluster import Node, Resources
from cifake_ray.stages.train.driver import finish_training, train_detector
from cifake_ray.stages.tune import driver as tune_driver
from cifake_ray.stages.tune.driver import tune_detector
from cifake_ray.storage.bundles.bundle import load_bundle
from cifake_ray.storage.runs.export import export_scores
from cifake_ray.storage.runs.verify import verify_files

NUM_IMAGES = 24
TINY = "small_cnn_w8_d1"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    images = []
    for number in range(NUM_IMAGES):
        pixels = rng.integers(0, 128, (32, 32, 3), dtype=np.uint8) + np.uint8(number % 2 * 100)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue(), "path": f"{number}.png"})
    labels = [("REAL", "FAKE")[number % 2] for number in range(NUM_IMAGES)]
    folder = tmp_path_factory.mktemp("shards")
    pq.write_table(pa.table({"image": images, "label": labels}), folder / "part-00000.parquet")
    return folder


def find_files(run: Path) -> list[str]:
    return sorted(path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file())


def read_files(out: Path, *but: str) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in find_files(out) if name not in but}


def remove(out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)


def run_train(shards: Path, run: Path) -> dict[str, Any]:
    config = TrainConfig(
        shards=str(shards),
        run=str(run),
        epochs=1,
        batch_size=4,
        checkpoint_steps=2,
        num_workers="0",
        val_fraction=0.4,
        precision="float32",
        cache_dir=str(shards / "cache"),
    )
    return train_detector(config, lambda row, epochs: None, time.time())


def test_anything_may_happen_at_any_change_of_a_training(shards: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    whole, run = tmp_path / "whole" / "out", tmp_path / "out"
    summary = run_train(shards, whole)
    weights = (whole / "bundle" / "model.safetensors").read_bytes()

    def check_half() -> None:
        if (run / "_SUCCESS").exists():  # then nothing may be missing
            load_bundle(run / "bundle")

    def check_whole(may_leave_files: bool) -> None:
        assert json.loads((run / "_SUCCESS").read_text())["steps"] == summary["steps"]
        assert (run / "bundle" / "model.safetensors").read_bytes() == weights
        rows = (run / "history.jsonl").read_text().splitlines()
        assert [json.loads(row)["epoch"] for row in rows] == [1]
        if not may_leave_files:
            assert find_files(run) == find_files(whole)

    num_changes = disturb_every_change(
        lambda: run_train(shards, run),
        prepare=lambda: remove(run),
        check_half=check_half,
        check_whole=check_whole,
    )
    assert num_changes > 40


class AllAreGood:
    """The quarantine of images that kill no process."""

    def __init__(self, **options: Any) -> None:
        self.try_images = lambda images, on_step: images

    def __enter__(self) -> AllAreGood:
        return self

    def __exit__(self, *error: object) -> None:
        pass


@contextmanager
def connect_nothing(*arguments: Any) -> Iterator[Any]:
    yield Resources((Node(2, 0),))


def test_anything_may_happen_at_any_change_of_an_evaluation(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = {"roc": b"a figure", "scores": b"another"}  # to draw them takes seconds
    monkeypatch.setattr(evaluate, "draw_figures", lambda metrics, **options: figures)
    monkeypatch.setattr(driver, "connect_cluster", connect_nothing)
    monkeypatch.setattr(shard_worker, "faulthandler", Mock())  # it would end these tests
    monkeypatch.setattr(shard_worker, "Quarantine", AllAreGood)
    monkeypatch.setattr(shard_worker, "WorkMetrics", lambda verb: Mock())
    out, papers = tmp_path / "out", ("_run.json", "_SUCCESS")
    config = EvaluateConfig(
        shards=str(shards), out=str(out), shard_size=16, num_bootstrap=10, num_workers=1
    )
    wanted: dict[str, bytes] = {}

    def check_half() -> None:
        if (out / "_SUCCESS").exists():
            assert verify_files(out) == []
            assert wanted.keys() <= read_files(out).keys()

    def check_whole(may_leave_files: bool) -> None:
        found = {
            name: data
            for name, data in read_files(out, *papers).items()
            if not name.startswith("_manifest/")  # its name is a random one
        }
        if not wanted:  # nothing has happened yet
            wanted.update(found)
        if may_leave_files:
            found = {name: found.get(name, b"") for name in wanted}
        assert found == wanted
        assert verify_files(out) == []

    num_changes = disturb_every_change(
        lambda: run_verb(config, time.time()),
        prepare=lambda: remove(out),
        check_half=check_half,
        check_whole=check_whole,
    )
    assert num_changes > 40


class InTurn:
    """Ray Tune: one trial after the other, of which the second is stopped after an epoch."""

    def __init__(
        self, trainable: Any, *, param_space: Any, run_config: Any, **options: Any
    ) -> None:
        self.trainable, self.watch = trainable, run_config.callbacks[0]
        self.settings = param_space["trial"]["grid_search"]

    def fit(self) -> None:
        for settings in self.settings:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(tune, "get_checkpoint", lambda: None)
                patch.setattr(tune, "report", self.stop if settings["number"] == 1 else Mock())
                with suppress(Stopped):
                    self.trainable({"trial": settings})
                self.watch.on_trial_complete(0, [], SimpleNamespace(config={"trial": settings}))

    def stop(self, metrics: dict[str, Any], checkpoint: Any) -> None:
        if not metrics["known"]:
            raise Stopped


class Stopped(Exception):
    """A scheduler ends a trial."""


def test_anything_may_happen_at_any_change_of_a_search(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(tune_driver, "connect_cluster", connect_nothing)
    monkeypatch.setattr(
        tune_driver, "finish_trial", lambda train, cpus, use_gpu: finish_training(train, use_gpu)
    )
    monkeypatch.setattr(tune, "Tuner", InTurn)
    monkeypatch.setattr(tune, "with_resources", lambda trainable, room: trainable)
    recipe, space, out = tmp_path / "recipe.yaml", tmp_path / "space.yaml", tmp_path / "out"
    recipe.write_text(
        yaml.safe_dump(
            {"model": TINY, "batch_size": 16, "val_fraction": 0.4, "precision": "float32"}
        )
    )
    space.write_text(yaml.safe_dump({"lr": [0.0001, 0.003]}))  # the second is better
    config = TuneConfig(
        shards=str(shards),
        run=str(out),
        recipe=str(recipe),
        search=(str(space),),
        searcher="grid",
        trials=2,
        epochs=2,
        num_workers=0,
        cpus_per_worker=1,
        cache_dir=str(shards / "cache"),
    )
    same = ("recipe.yaml", "bundle/model.safetensors")
    wanted: dict[str, Any] = {}

    def check_half() -> None:
        if (out / "_SUCCESS").exists():
            check_whole(True)

    def check_whole(may_leave_files: bool) -> None:
        found: dict[str, Any] = {name: (out / name).read_bytes() for name in same}
        table = pq.read_table(out / "trials.parquet")
        found["rows"] = table.drop_columns([n for n in table.column_names if n.endswith("_s")])
        found["names"] = find_files(out)
        if not wanted:
            wanted.update(found)
        if may_leave_files:
            found["names"] = wanted["names"]
        assert found == wanted

    num_changes = disturb_every_change(
        lambda: tune_detector(config, time.time()),
        prepare=lambda: remove(out),
        check_half=check_half,
        check_whole=check_whole,
    )
    assert json.loads((out / "_SUCCESS").read_text())["best_trial"] == 1
    assert num_changes > 100


@pytest.mark.parametrize("format", ["csv", "parquet", "jsonl", "txt"])
@pytest.mark.parametrize("there", ["nothing", "folder", "overwritten"])
def test_anything_may_happen_at_any_change_of_an_export(
    tmp_path: Path, format: str, there: str
) -> None:
    """FILE is what it was, or whole; one that exists is kept unless it is to be overwritten."""
    scores, file = tmp_path / "scores", tmp_path / "new" / f"scores.{format}"
    scores.mkdir()
    for number in range(2):
        table = pa.table({"key": [f"{number}.png"], "logit": [0.5]})
        pq.write_table(table, scores / f"part-{number:05d}.parquet")
    config = ExportConfig(scores=str(scores), file=str(file), overwrite=there == "overwritten")
    wanted: list[bytes] = []

    def prepare() -> None:
        remove(file.parent)
        if there != "nothing":
            file.parent.mkdir()
        if there == "overwritten":
            file.write_bytes(b"old")

    def run() -> None:
        try:
            export_scores(scores, file, config)
        except UsageError:
            assert not config.overwrite
            assert file.read_bytes() in wanted

    def check_half() -> None:
        before = [b"old"] if config.overwrite else []
        assert file.exists() or not before
        assert not file.exists() or file.read_bytes() in [*wanted, *before]

    def check_whole(may_leave_files: bool) -> None:
        wanted.append(file.read_bytes())
        assert wanted[0] == wanted[-1]

    num_changes = disturb_every_change(
        run, prepare=prepare, check_half=check_half, check_whole=check_whole
    )
    assert num_changes > 2
