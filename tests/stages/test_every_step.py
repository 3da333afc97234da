"""Something happens at each change that a command makes to its output; then it runs again.

Everything is real but the disk (`computer`), and Ray, whose part is one loop here.
CIFAKE_TEST_EXAMPLES=1 tries every event at every change, not one of them.
"""

from __future__ import annotations

import io
import itertools
import json
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
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
from computer import Computer, SimulatedPool, disturb_every_change
from PIL import Image
from ray import tune

from cifake_ray.config import ConvertConfig, EvaluateConfig, ExportConfig, TrainConfig, TuneConfig
from cifake_ray.errors import UsageError
from cifake_ray.pipeline import run_verb
from cifake_ray.stages.batch import driver, shard_worker
from cifake_ray.stages.evaluate import write_report
from cifake_ray.stages.resources import Node, Resources
from cifake_ray.stages.train.driver import train_detector
from cifake_ray.stages.tune import driver as tune_driver
from cifake_ray.stages.tune import trial_worker
from cifake_ray.stages.tune.driver import tune_detector
from cifake_ray.storage.bundles.bundle import load_bundle
from cifake_ray.storage.io.files import make_folder, write_bytes
from cifake_ray.storage.runs.export import export_scores
from cifake_ray.storage.runs.train_run import TrainRun
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
    return train_detector(config, lambda row, epochs: None, time.monotonic())


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


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "runs_here", lambda *arguments: True)
    monkeypatch.setattr(driver, "LocalPool", lambda *arguments: SimulatedPool(Computer()))
    monkeypatch.setattr(shard_worker, "faulthandler", Mock())  # it would end these tests
    monkeypatch.setattr(shard_worker, "Quarantine", AllAreGood)


def test_anything_may_happen_at_any_change_of_an_evaluation(
    shards: Path, tmp_path: Path, no_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1 1"/>'
    figures = {"roc": figure, "scores": figure}  # to draw them takes seconds
    monkeypatch.setattr(write_report, "draw_figures", lambda metrics, **options: figures)
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
            name: re.sub(rb"<dt>Measured</dt>\n<dd>[^<]*</dd>", b"", data)  # when, and how long
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
        lambda: run_verb(config, time.monotonic()),
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


def train_in_no_time(
    config: TrainConfig, on_epoch: Callable[[dict[str, Any], int], None], started_s: float
) -> None:
    """Write what a training writes, which has a sweep of its own."""
    run = TrainRun(Path(config.run))
    if run.read_success() is not None:
        return
    with run.lock():
        run.open({"lr": config.lr}, {})
        history = run.read_history()
        for epoch in range(len(history) + 1, config.epochs + 1):
            accuracy = 0.5 + config.lr * epoch
            history.append({"epoch": epoch, "step": epoch, "train_s": 0.5, "val_s": 0.5})
            history[-1] |= {"val_accuracy": accuracy, "val_loss": 0.1, "val_auroc": 0.5}
            history[-1] |= {"train_loss": 0.1, "images_per_s": 9.0}
            run.write_checkpoint(b"a checkpoint")
            run.write_history(history)
            on_epoch(history[-1], config.epochs)
        write_stub_bundle(config)
        stopped = f"all {config.epochs} epochs done"
        run.write_success({"stopped": stopped, "epochs": config.epochs, "bundle": "bundle"})


def write_stub_bundle(config: TrainConfig) -> None:
    folder = TrainRun(Path(config.run)).bundle_path
    make_folder(folder, parents=False)
    for name in ("model.safetensors", "config.json"):
        write_bytes(folder / name, f"{name} of {config.lr}".encode())


def test_anything_may_happen_at_any_change_of_a_search(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune_driver, "connect_cluster", connect_nothing)
    monkeypatch.setattr(
        tune_driver, "finish_trial", lambda train, cpus, use_gpu: write_stub_bundle(train)
    )
    monkeypatch.setattr(trial_worker, "train_detector", train_in_no_time)
    monkeypatch.setattr(tune_driver, "render_tune_page", lambda *arguments: "a page")
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
        lambda: tune_detector(config, time.monotonic()),
        prepare=lambda: remove(out),
        check_half=check_half,
        check_whole=check_whole,
    )
    assert json.loads((out / "_SUCCESS").read_text())["best_trial"] == 1
    assert num_changes > 100
    for damaged in ("trials/00000", "trials/00001/run-0"):  # and a person deletes it, as was said
        remove(out / damaged)
        (out / "_SUCCESS").unlink()
        tune_detector(config, time.monotonic())
        check_whole(False)


class Output:
    """A folder that somebody moves, deletes or replaces while a command writes to it."""

    def __init__(self, out: Path) -> None:
        self.out, self.aside = out, out.with_name("aside")
        self.is_gone = False

    def list_events(self) -> dict[str, Callable[[], None]]:
        return {"move": self.move, "delete": self.delete, "replace": self.replace}

    def move(self) -> None:
        if self.out.exists():
            self.out.rename(self.aside)
            self.is_gone = True

    def delete(self) -> None:
        self.is_gone = self.out.exists()
        remove(self.out)

    def replace(self) -> None:
        self.move()
        self.is_gone = False
        self.out.mkdir(exist_ok=True)

    def prepare(self) -> None:
        self.is_gone = False
        remove(self.out)
        remove(self.aside)

    def put_back(self) -> None:
        """Nothing was written to where it was; what replaced it is no finished run."""
        assert not (self.is_gone and self.out.exists())
        if self.aside.exists():
            remove(self.out)
            self.aside.rename(self.out)


@pytest.mark.parametrize("verb", ["convert", "train"])
def test_an_output_may_be_moved_deleted_or_replaced_before_any_change(
    shards: Path, tmp_path: Path, no_ray: None, verb: str
) -> None:
    output, wanted = Output(tmp_path / "out"), list[Any]()

    def run() -> None:
        if verb == "convert":
            config = ConvertConfig(src=str(shards), out=str(output.out), shard_size=16)
            run_verb(config, time.monotonic())
        else:
            train = TrainConfig(shards=str(shards), run=str(output.out), epochs=2)
            train_in_no_time(train, lambda row, epochs: None, 0.0)

    def check_half() -> None:
        if all((output.out / name).exists() for name in ("_run.json", "_SUCCESS")):
            check_whole(True)
        output.put_back()

    def check_whole(may_leave_files: bool) -> None:
        if verb == "convert":
            assert verify_files(output.out) == []
            found: Any = pq.read_table(output.out / "shards")
        else:
            found = (output.out / "bundle" / "model.safetensors").read_bytes()
        wanted.append(found)
        assert wanted[0] == found

    num_changes = disturb_every_change(
        run,
        prepare=output.prepare,
        check_half=check_half,
        check_whole=check_whole,
        others=output.list_events(),
    )
    assert num_changes > 20


def test_a_source_may_be_deleted_before_any_change_of_a_conversion(
    shards: Path, tmp_path: Path, no_ray: None
) -> None:
    """Rows say that it was not found, or the command ends; it never has fewer rows."""
    source, out = tmp_path / "source", tmp_path / "out"
    config = ConvertConfig(src=str(source), out=str(out), shard_size=16)
    wanted: list[dict[str, Any]] = []

    def bring_back() -> None:
        remove(source)
        shutil.copytree(shards, source)

    def prepare() -> None:
        remove(out)
        bring_back()

    def check_whole(may_leave_files: bool) -> None:
        rows = pq.read_table(out / "shards").sort_by("key").to_pylist()
        if not wanted:
            wanted.extend(rows)
        assert [row["key"] for row in rows] == [row["key"] for row in wanted]
        for row, whole in zip(rows, wanted, strict=True):
            assert row == whole or row["error"] == "not_found"

    disturb_every_change(
        lambda: run_verb(config, time.monotonic()),
        prepare=prepare,
        check_half=bring_back,
        check_whole=check_whole,
        others={"delete the source": lambda: remove(source)},
    )


@contextmanager
def jump(by_s: float) -> Iterator[None]:
    """At every look at the clock, back and forth."""
    now, ahead_s = time.time, itertools.cycle([0.0, by_s])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: now() + next(ahead_s))
        yield


@contextmanager
def send_signals() -> Iterator[None]:
    """A thousand times a second whatever waits in the system is interrupted (EINTR)."""
    is_over, main = threading.Event(), threading.get_ident()

    def send() -> None:
        while not is_over.wait(0.001):
            signal.pthread_kill(main, signal.SIGUSR1)

    thread, before = threading.Thread(target=send), signal.signal(signal.SIGUSR1, lambda *_: None)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize(
    "disturb",
    [lambda: jump(-86_400.0), lambda: jump(365 * 86_400.0), send_signals],
    ids=["a day back", "a year ahead", "signals"],
)
def test_jumps_of_the_clock_and_signals_change_nothing(
    shards: Path, tmp_path: Path, no_ray: None, disturb: Callable[[], AbstractContextManager[None]]
) -> None:
    begun_s = time.monotonic()

    def run_both(root: Path) -> tuple[Any, dict[str, Any], pa.Table, bytes]:
        config = ConvertConfig(src=str(shards), out=str(root / "out"), shard_size=16)
        converted = run_verb(config, time.monotonic())[0]
        trained = run_train(shards, root / "run")
        rows = pq.read_table(root / "out" / "shards")
        return converted, trained, rows, (root / "run/bundle/model.safetensors").read_bytes()

    *_, rows, weights = run_both(tmp_path / "calm")
    with disturb():
        converted, trained, *found = run_both(tmp_path / "disturbed")
    assert found == [rows, weights]
    elapsed_s = time.monotonic() - begun_s
    assert 0 < converted.elapsed_s < elapsed_s
    assert 0 < trained["elapsed_s"] < elapsed_s
    assert converted.images_per_s > 0
    assert NUM_IMAGES / elapsed_s < converted.steady_images_per_s


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
    config = ExportConfig(src=str(scores), file=str(file), overwrite=there == "overwritten")
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
