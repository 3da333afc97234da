"""train: with and without Ray, resumed or not, from the cache or streamed."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from cifake_ray.config import POLICIES, ConvertConfig, PipelineConfig, TrainConfig
from cifake_ray.core.schema import SCHEMA_VERSION
from cifake_ray.errors import (
    CacheError,
    CifakeError,
    ResourceError,
    RunMismatch,
    StorageError,
)
from cifake_ray.pipeline import run_pipeline, run_verb
from cifake_ray.stages.train import driver as stages_train
from cifake_ray.stages.train.driver import train_detector
from cifake_ray.stages.train.rank_group import RankTask, start_rank
from cifake_ray.storage.bundles.bundle import load_bundle

pytestmark = pytest.mark.usefixtures("ray_cluster")

TIMM: dict[str, Any] = {"model": "test_resnet", "image_size": 32}


def run_train(shards: Path, run: Path, **options: Any) -> dict[str, Any]:
    log = options.pop("log", lambda message: None)
    options = {
        "epochs": 2,
        "batch_size": 16,
        "num_workers": "0",
        "val_fraction": 0.3,
        "cpus_per_worker": 1,
        "precision": "float32",  # bf16 rounds otherwise for other numbers of workers
        "cache_dir": str(run.parent / "cache"),
        **options,
    }
    config = TrainConfig(shards=str(shards), run=str(run), **options)
    return train_detector(config, lambda row, epochs: None, time.monotonic(), log)


def read_losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    return [value for row in rows for value in (row["train_loss"], row["val_loss"])]


@pytest.mark.smoke
def test_one_ray_worker_gives_what_this_process_gives(shards: Path, tmp_path: Path) -> None:
    here = run_train(shards, tmp_path / "here")
    there = run_train(shards, tmp_path / "there", num_workers="1")
    assert read_losses(tmp_path / "here") == read_losses(tmp_path / "there")
    assert here["steps"] == there["steps"] == 2 * (here["train_images"] // 16)


def test_two_workers_see_the_same_batches(shards: Path, tmp_path: Path) -> None:
    run_train(shards, tmp_path / "one", epochs=1)
    run_train(shards, tmp_path / "two", epochs=1, num_workers="2")
    assert read_losses(tmp_path / "one") == pytest.approx(read_losses(tmp_path / "two"), abs=1e-4)


def test_a_finished_run_is_left_untouched_and_neither_rows_nor_network_are_made(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    first = run_train(shards, run)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    for name in ("prepare_training", "build_checked"):
        monkeypatch.setattr(stages_train, name, lambda config: pytest.fail("was called"))
    again = run_train(shards, run)
    assert again.pop("schema_version") == SCHEMA_VERSION
    assert again == first
    assert before == {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}
    with pytest.raises(RunMismatch, match=r"\(lr: 0.003 there, 0.1 here\)"):
        run_train(shards, run, lr=0.1)


def test_another_config_on_a_run_that_has_begun_is_refused(shards: Path, tmp_path: Path) -> None:
    run_train(shards, tmp_path / "run")
    (tmp_path / "run" / "_SUCCESS").unlink()
    with pytest.raises(RunMismatch, match=r"\(lr: 0.003 there, 0.1 here\)"):
        run_train(shards, tmp_path / "run", lr=0.1)


def test_a_worker_that_finds_other_rows_than_the_driver_stops(shards: Path, tmp_path: Path) -> None:
    config = TrainConfig(shards=str(shards), run=str(tmp_path / "run"), val_fraction=0.3)
    task = RankTask(config=config, rows_hash="another", use_gpu=False, num_threads=1)
    with pytest.raises(CifakeError, match="the shards changed while the training started"):
        start_rank({"task": task})
    assert not (tmp_path / "run").exists()


def test_augmentation_is_what_its_file_holds(shards: Path, tmp_path: Path) -> None:
    policy, moved = tmp_path / "policy.yaml", tmp_path / "moved.yaml"
    policy.write_text("flip: 0.5\nrotation: 10\nshift: 0.1\nmove_share: 0.5\n")
    moved.write_text("shift: 0.1\nmove_share: 0.5\nflip: 0.5\nrotation: 10\n")
    run = tmp_path / "run"
    run_train(shards, run, epochs=1, augment=str(policy))
    run_train(shards, run, epochs=1, augment=str(moved))
    run_train(shards, run, epochs=1, augment="seed")
    with pytest.raises(RunMismatch, match="augment"):
        run_train(shards, run, epochs=1, augment="flip")
    facts = load_bundle(run / "bundle")[1]
    assert facts.training["augment"] == POLICIES["seed"].to_dict()
    run_train(shards, tmp_path / "plain", epochs=1, augment="none")
    assert read_losses(run) != read_losses(tmp_path / "plain")


def test_a_run_killed_before_its_bundle_ends_with_the_same_bundle(
    shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run_train(shards, run)
    weights = (run / "bundle" / "model.safetensors").read_bytes()
    (run / "_SUCCESS").unlink()
    shutil.rmtree(run / "bundle")
    run_train(shards, run)
    assert (run / "bundle" / "model.safetensors").read_bytes() == weights


def test_streaming_trains_within_bounded_memory(shards: Path, tmp_path: Path) -> None:
    summary = run_train(shards, tmp_path / "run", cache_gb=0)
    assert summary["epochs"] == 2
    assert not list((tmp_path / "cache").glob("*.npy"))


def test_images_that_do_not_decode_are_counted_and_left_out(
    sample_folder: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    for number, path in enumerate(sorted((sample_folder / "train").rglob("*.jpg"))):
        target = source / path.relative_to(sample_folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes()
        target.write_bytes(data[: len(data) - 200] if number == 7 else data)
    config = ConvertConfig(src=str(source), out=str(tmp_path / "shards"))
    run_verb(config, time.monotonic())
    for name, cache_gb in (("cached", 1.0), ("streamed", 0.0)):
        summary = run_train(tmp_path / "shards", tmp_path / name, cache_gb=cache_gb)
        assert summary["unusable"] == {"truncated": 1}
        assert summary["train_images"] + summary["val_images"] == 47
    (tmp_path / "streamed" / "_SUCCESS").unlink()  # a kill before it: no image is read again
    assert run_train(tmp_path / "shards", tmp_path / "streamed", cache_gb=0.0)["unusable"] == {
        "truncated": 1
    }


def test_the_bundle_is_the_best_epoch(shards: Path, tmp_path: Path) -> None:
    summary = run_train(shards, tmp_path / "run", epochs=3)
    rows = [json.loads(x) for x in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert summary["val_accuracy"] == max(row["val_accuracy"] for row in rows)
    detector, facts = load_bundle(tmp_path / "run" / "bundle")
    assert facts.training["best_epoch"] == summary["best_epoch"]
    assert detector.num_parameters == 39_132


def test_early_stopping_is_said_and_keeps_the_best(shards: Path, tmp_path: Path) -> None:
    """A rate of almost nothing: the first epoch stays the best by the digits that are kept."""
    run = tmp_path / "run"
    options: dict[str, Any] = {"epochs": 9, "lr": 1e-12, "patience": 2, "augment": "none"}
    summary = run_train(shards, run, **options)
    assert summary["stopped"] == "val_accuracy no better for 2 epochs"
    assert (summary["epochs"], summary["best_epoch"]) == (3, 1)
    weights = (run / "bundle" / "model.safetensors").read_bytes()
    (run / "_SUCCESS").unlink()
    shutil.rmtree(run / "bundle")
    again = run_train(shards, run, **options)
    assert (again["epochs"], again["stopped"]) == (3, summary["stopped"])
    assert (run / "bundle" / "model.safetensors").read_bytes() == weights


def test_a_machine_without_a_compiler_is_told_so(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    missing = config.patch({"cpp.cxx": (None, "/nonexistent")})
    said = r"--compile: .*C\+\+ compiler.*or leave --compile out"
    with missing, pytest.raises(CifakeError, match=said):
        run_train(shards, tmp_path / "run", compile=True)


def test_the_test_time_flip_goes_into_the_bundle(shards: Path, tmp_path: Path) -> None:
    summary = run_train(shards, tmp_path / "run", test_time_flip=True, keep_epochs=2)
    detector, facts = load_bundle(tmp_path / "run" / "bundle")
    assert detector.preprocessing.test_time_flip
    assert facts.training["averaged_epochs"] == summary["averaged_epochs"]


def test_a_timm_architecture_goes_through_the_same_door(shards: Path, tmp_path: Path) -> None:
    summary = run_train(shards, tmp_path / "run", epochs=1, **TIMM)
    assert summary["model"] == "test_resnet"
    assert load_bundle(tmp_path / "run" / "bundle")[0].preprocessing.image_size == 32


def test_training_starts_from_weights_and_says_so(shards: Path, tmp_path: Path) -> None:
    """A network of timm's, on a worker of Ray's."""
    run_train(shards, tmp_path / "first", epochs=1, **TIMM)
    said: list[str] = []
    options: dict[str, Any] = {**TIMM, "epochs": 1, "lr": 1e-12, "log": said.append}
    run = tmp_path / "second"
    summary = run_train(shards, run, weights=str(tmp_path / "first"), num_workers="1", **options)
    bundle = tmp_path / "first" / "bundle"
    assert summary["weights"] == f"92 tensors from {bundle}, the classifier too"
    started = f"train: starting from {summary['weights']}"
    assert said.count(started) == 1
    first, second = (load_bundle(path / "bundle")[0] for path in (tmp_path / "first", run))
    for a, b in zip(first.network.parameters(), second.network.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-9)
    bundle.rename(tmp_path / "moved")  # the same weights under another name are the same run
    moved = run_train(shards, run, weights=str(tmp_path / "moved"), **options)
    assert moved["weights"] == summary["weights"]
    assert said.count(started) == 1  # a finished run starts nothing
    with pytest.raises(RunMismatch, match="weights"):
        run_train(shards, run, **options)


def test_what_no_attempt_can_mend_ends_a_training_on_ray_with_its_own_words(
    shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    cache = str(tmp_path / "file" / "cache")
    with pytest.raises(CacheError, match="--cache-dir or XDG_CACHE_HOME"):
        run_train(shards, tmp_path / "run", num_workers="1", cache_dir=cache, max_failures=999)


def test_more_workers_than_cpus_are_refused_with_numbers(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="need 3 CPUs, the cluster has 2"):
        run_train(shards, tmp_path / "run", num_workers="3")


def test_shards_without_labels_are_refused(sample_folder: Path, tmp_path: Path) -> None:
    config = ConvertConfig(src=str(sample_folder / "train" / "REAL"), out=str(tmp_path / "shards"))
    run_verb(config, time.monotonic())
    with pytest.raises(ValueError, match=r"no labelled REAL image for training.*--real-name"):
        run_train(tmp_path / "shards", tmp_path / "run")


@dataclass
class FlakyRun:
    """A run that finishes an epoch at every look, and whose store fails at one of them."""

    fails_at: int
    looks: int = 0

    def read_history(self) -> list[dict[str, Any]]:
        self.looks += 1
        if self.looks == self.fails_at:
            raise StorageError("not now")
        return [{"epoch": epoch} for epoch in range(1, min(self.looks, 4) + 1)]


def test_a_store_that_fails_for_a_moment_hides_no_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages_train, "POLL_S", 0.01)
    told: list[int] = []
    run = FlakyRun(fails_at=3)
    watch = stages_train._HistoryWatch(
        cast(Any, run), 0, 4, lambda row, epochs: told.append(row["epoch"])
    )
    with watch:
        time.sleep(0.5)
    assert told == [1, 2, 3, 4]


def test_a_pipeline_that_has_trained_needs_no_room_for_it(
    sample_folder: Path, tmp_path: Path
) -> None:
    """More workers than there are CPUs now; the training itself would be refused."""
    root = tmp_path / "root"
    source, training = str(sample_folder), {"epochs": 1, "batch_size": 8, "val_fraction": 0.3}
    run_pipeline(PipelineConfig(src=source, root=str(root), num_workers="0"), training)
    (root / "scores" / "_SUCCESS").unlink()
    again = PipelineConfig(src=source, root=str(root), num_workers="8")
    result, code = run_pipeline(again, training)
    assert (code, (root / "scores" / "_SUCCESS").exists()) == (0, True), result


def test_a_gpu_that_is_not_there_is_refused(shards: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ResourceError, match="sees no GPU here; use --device cpu"):
        run_train(shards, tmp_path / "run", device="cuda")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_workers": "8"}, ResourceError, "8 workers need"),
        ({"model": "smal_cnn"}, ValueError, "did you mean"),
    ],
)
def test_a_pipeline_that_cannot_train_is_refused_before_it_converts(
    ray_cluster: None,
    sample_folder: Path,
    tmp_path: Path,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    config = PipelineConfig(src=str(sample_folder), root=str(tmp_path / "root"), **options)
    with pytest.raises(error, match=message):
        run_pipeline(config, {})
    assert not (tmp_path / "root").exists()
