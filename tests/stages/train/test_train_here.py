"""train in this process, without Ray, on Parquet files that are written here."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from cifake_ray.config import TrainConfig
from cifake_ray.errors import CacheError, CifakeError, RunMismatch, StorageError, UsageError
from cifake_ray.stages.resources import Node, Resources
from cifake_ray.stages.train import placement
from cifake_ray.stages.train.driver import train_detector
from cifake_ray.stages.train.rank_group import EndAtOnce
from cifake_ray.stages.train.ray_train import place_training
from cifake_ray.storage.bundles.bundle import read_bundle_info

RESNET: dict[str, Any] = {"model": "resnet18", "image_size": 32}


def encode_image(value: int, seed: int) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 40, (32, 32, 3))
    buffer = io.BytesIO()
    Image.fromarray((noise + value).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_shards(path: Path, images: Sequence[tuple[bytes, int | None, str | None]]) -> Path:
    """Parquet in the Hugging Face layout: image, label, split; row groups of 16."""
    path.mkdir(parents=True, exist_ok=True)
    rows = [
        {"image": {"bytes": data, "path": None}, "label": label, "split": split}
        for data, label, split in images
    ]
    pq.write_table(pa.Table.from_pylist(rows), path / "a.parquet", row_group_size=16)
    return path


def make_images() -> list[tuple[bytes, int | None, str | None]]:
    """48 images to train on and 24 to validate, told apart by their brightness."""
    return [
        (encode_image(180 if n % 2 else 20, n), n % 2, "val" if n >= 48 else "train")
        for n in range(72)
    ]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 images to train on and 24 to validate, all told apart by their brightness but one."""
    images = make_images()
    return write_shards(tmp_path_factory.mktemp("shards"), images)


def run_train(shards: Path, run: Path, **options: Any) -> dict[str, Any]:
    log = options.pop("log", lambda message: None)
    options = {
        "epochs": 2,
        "batch_size": 16,
        "num_workers": "0",
        "val_split": "val",
        "cpus_per_worker": 1,
        "cache_dir": str(run.parent / "cache"),
        **options,
    }
    config = TrainConfig(shards=str(shards), run=str(run), **options)
    return train_detector(config, lambda row, epochs: None, time.monotonic(), log)


def test_nothing_slow_is_imported_that_a_training_here_does_not_need(
    shards: Path, tmp_path: Path
) -> None:
    """torch's compiler takes a second, Ray 0.2 s, timm longer than both."""
    config = {"shards": str(shards), "run": str(tmp_path / "run"), "cache_dir": str(tmp_path)}
    script = f"""
import sys
from cifake_ray.config import TrainConfig
from cifake_ray.stages.train.driver import train_detector

config = TrainConfig(**{config}, epochs=1, val_split="val", num_workers="0")
train_detector(config, lambda row, epochs: None, 0.0)
print({{"torch._dynamo", "ray", "timm"}} & set(sys.modules))
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.stdout == "set()\n", ended.stderr


def test_what_measures_is_not_imported_before_the_first_step() -> None:
    script = "import sys; import cifake_ray.stages.train.worker; print('sklearn' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.stdout == "False\n", ended.stderr


def test_the_controller_of_ray_train_imports_no_torch() -> None:
    script = "import sys; import cifake_ray.stages.train.rank_group; print('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.stdout == "False\n", ended.stderr


def test_an_outlier_among_the_real_images_costs_a_threshold_and_no_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [
        (encode_image(180 if n % 2 else 20, n), n % 2, "val" if n >= 48 else "train")
        for n in range(72)
    ]
    images.append((encode_image(215, 72), 0, "val"))
    said: list[str] = []
    from cifake_ray.core.models.detector import Detector

    find_logit = Detector.find_logit  # a network that is as sure as one after many epochs
    monkeypatch.setattr(Detector, "find_logit", lambda self, x: find_logit(self, x) * 1e6)
    shards = write_shards(tmp_path / "shards", images)
    summary = run_train(shards, tmp_path / "run", epochs=4, lr=0.003, log=said.append)
    assert (summary["threshold_fpr_1"], summary["threshold_fpr_01"]) == (None, None)
    assert 0 <= summary["threshold"] <= 1
    assert any("no threshold keeps 1% false positives" in line for line in said)
    info = read_bundle_info(tmp_path / "run" / "bundle")
    with pytest.raises(UsageError, match=r"--target-fpr 0\.01: .* no threshold for it"):
        info.threshold(0.01)
    card = (tmp_path / "run" / "bundle" / "README.md").read_text()
    assert "cannot be reached on validation" in card


CHECKPOINTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "code": lambda checkpoint: RunsCode(),
    "a list": lambda checkpoint: [],
    "no state": lambda checkpoint: checkpoint.pop("state"),
    "an epoch in words": lambda checkpoint: checkpoint["state"].update(epoch="x"),
    "an epoch before the first": lambda checkpoint: checkpoint["state"].update(epoch=-1),
    "a history of others": lambda checkpoint: checkpoint["state"].update(history=[{"a": 1}]),
    "an unknown field": lambda checkpoint: checkpoint["state"].update(run="/etc"),
    "weights of others": lambda checkpoint: checkpoint.update(network={"a": torch.zeros(1)}),
    "weights in words": lambda checkpoint: checkpoint.update(network={"a": "b"}),
    "no moments": lambda checkpoint: checkpoint.update(optimizer={}),
    "moments in words": lambda checkpoint: checkpoint.update(optimizer={"state": 1}),
    "an epoch kept without weights": lambda checkpoint: checkpoint["state"].update(kept=[{}]),
    "no epoch kept": lambda checkpoint: checkpoint["state"].update(kept=[]),
}


class RunsCode:
    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def test_a_checkpoint_that_somebody_else_wrote_is_refused_and_runs_no_code(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    run_train(shards, run, epochs=1)
    (run / "_SUCCESS").unlink()
    last = run / "checkpoints" / "last.pt"
    good = last.read_bytes()
    for name, change in CHECKPOINTS.items():
        checkpoint = torch.load(io.BytesIO(good), weights_only=True)
        result = change(checkpoint)
        is_other = isinstance(result, RunsCode) or result == []
        torch.save(result if is_other else checkpoint, last)
        with pytest.raises(StorageError, match=r"last\.pt: damaged"):
            run_train(shards, run, epochs=1)
        assert not (tmp_path / "ran").exists(), name


def test_the_precision_of_a_run_is_recorded_and_kept_on_another_machine(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    summary = run_train(shards, tmp_path / "run")
    assert summary["precision"] == "bf16"
    bundle = tmp_path / "run" / "bundle"
    assert read_bundle_info(bundle).training["precision"] == "bf16"
    (tmp_path / "run" / "_SUCCESS").unlink()
    (bundle / "config.json").unlink()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {})
    assert run_train(shards, tmp_path / "run")["precision"] == "bf16"
    assert run_train(shards, tmp_path / "other")["precision"] == "float32"


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 1},
        {"batch_size": 4, "grad_accum": 4},
        {"batch_size": 3, "num_workers": "2", "device": "cpu", "dry_run": True},
    ],
)
def test_a_batch_of_one_image_under_batch_norm_is_refused_before_it_starts(
    shards: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    with pytest.raises(UsageError, match=r"--batch-size.*--num-workers.*--grad-accum"):
        run_train(shards, tmp_path / "run", **RESNET, **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [{}, {"model": "test_resnet", "image_size": 64}])
def test_one_image_at_a_time_is_enough_where_norms_see_more_of_it(
    shards: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    summary = run_train(shards, tmp_path / "run", epochs=1, batch_size=2, grad_accum=2, **options)
    assert summary["steps"] == 24


def test_by_default_each_gpu_has_images_of_every_batch() -> None:
    many = Resources(tuple(Node(8, 8) for _ in range(25)))
    config = TrainConfig(shards="s", run="r", batch_size=128)
    assert place_training(config, many).num_workers == 16
    assert place_training(TrainConfig(shards="s", run="r", batch_size=4), many).num_workers == 1
    asked = TrainConfig(shards="s", run="r", batch_size=128, num_workers="64")
    assert place_training(asked, many).num_workers == 64


def test_what_every_attempt_would_meet_ends_a_training_at_once() -> None:
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

    ends = EndAtOnce()
    for failure in (UsageError("no"), CacheError("no"), CifakeError("no")):
        with pytest.raises(type(failure)):
            ends.after_exception(None, {1: UserExceptionWithTraceback(failure, "")})
    for failure in (StorageError("not now"), RuntimeError("a peer is gone")):
        ends.after_exception(None, {0: UserExceptionWithTraceback(failure, "")})


def test_scoring_takes_as_many_images_at_once_as_the_network_allows(
    shards: Path, tmp_path: Path
) -> None:
    from cifake_ray.stages.resources import ONE_WORKER
    from cifake_ray.stages.score import MakeScoreProcessor

    batch_sizes = []
    for size in (32, 1024):
        run = tmp_path / str(size)
        options: dict[str, Any] = {"model": "test_resnet", "image_size": size, "cache_gb": 0}
        run_train(shards, run, epochs=1, batch_size=2, freeze_epochs=1, **options)
        info = read_bundle_info(run / "bundle")
        batch_sizes.append(MakeScoreProcessor(info, 0.5, None)(ONE_WORKER).batch_size)
        assert MakeScoreProcessor(info, 0.5, 77)(ONE_WORKER).batch_size == 77
    assert batch_sizes[0] == 256
    assert batch_sizes[1] < 128


@pytest.mark.parametrize(
    ("side", "fit", "warns"),
    [(64, "resize", True), (63, "resize", False), (64, "crop", False), (None, "resize", False)],
)
def test_it_warns_when_images_lose_most_of_their_pixels(
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    side: int | None,
    fit: str,
    warns: bool,
) -> None:
    monkeypatch.setattr(placement, "read_typical_side", lambda rows: side)
    said: list[str] = []
    run_train(shards, tmp_path / "run", fit=fit, dry_run=True, log=said.append)
    assert any("64 pixels are resized to 32" in line for line in said) == warns


def test_it_says_which_rows_it_takes_and_counts_images_of_both_classes(tmp_path: Path) -> None:
    images: list[tuple[bytes, int | None, str | None]] = [
        (encode_image(180 if n % 2 else 20, n), n % 2, "train") for n in range(40)
    ]
    images += [(encode_image(99, 99), n, "train") for n in (0, 1, 1)]
    images += [(encode_image(60, n), n % 2, "test") for n in range(7)]
    images += [(encode_image(61, n), n % 2, "val") for n in range(6)]
    images += [(encode_image(62, n), None, "train") for n in range(2)]
    shards = write_shards(tmp_path / "shards", images)
    said: list[str] = []
    plan = run_train(shards, tmp_path / "run", dry_run=True, log=said.append)
    assert (plan["train_images"], plan["val_images"]) == (43, 6)
    for line in (
        "train: 43 to train on (of split train); 6 to validate on (of split val);"
        " 9 left out (7 of split test, 2 without a label)",
        "train: 3 images have the same bytes as one with the other label; check the labels",
    ):
        assert line in said
    summary = run_train(shards, tmp_path / "run", epochs=1)
    assert summary["images_in_both_classes"] == 3
    with pytest.raises(UsageError, match=r"no labelled REAL image for validation.*7 of split test"):
        run_train(shards, tmp_path / "other", val_split="holdout")


def test_a_second_command_on_a_run_at_work_is_refused_and_changes_nothing(
    shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    refused: list[str] = []

    def start_another(row: dict[str, Any], epochs: int) -> None:
        for lr in (0.003, 0.1):
            before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}
            with pytest.raises(StorageError, match="another `train` is at work in it") as failure:
                train_detector(replace(config, lr=lr), lambda row, epochs: None, time.monotonic())
            assert before == {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}
            refused.append(str(failure.value))

    config = TrainConfig(
        shards=str(shards),
        run=str(run),
        epochs=1,
        batch_size=16,
        num_workers="0",
        cache_dir=str(tmp_path / "cache"),
    )
    train_detector(config, start_another, time.monotonic())
    assert len(refused) == 2
    assert train_detector(config, start_another, time.monotonic())["epochs"] == 1


def test_more_epochs_on_a_run_are_refused_with_the_way_to_train_on(
    shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run_train(shards, run, epochs=1)
    said = rf"\(epochs: 1 there, 3 here\).*new folder and give --weights {run}/bundle"
    with pytest.raises(RunMismatch, match=said):
        run_train(shards, run, epochs=3)
    longer = run_train(shards, tmp_path / "longer", epochs=3, weights=str(run / "bundle"))
    assert longer["epochs"] == 3
