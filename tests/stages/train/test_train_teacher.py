"""train with teachers, in this process: recorded, resumed, told from others, and refused."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file
from test_train_here import make_images, write_shards

from cifake_ray.config import StoreConfig, TrainConfig
from cifake_ray.errors import CifakeError, RunMismatch, UsageError
from cifake_ray.stages.train.driver import train_detector
from cifake_ray.stages.train.rank_group import RankTask, start_rank
from cifake_ray.storage.bundles.built_ins import locate_bundle
from cifake_ray.storage.bundles.bundle import read_bundle_info
from cifake_ray.storage.bundles.teachers import pin_teachers
from cifake_ray.storage.runs.train_run import TrainRun


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"), make_images())


def train(run: Path, shards: Path, **options: Any) -> tuple[dict[str, Any], list[str]]:
    said: list[str] = []
    on_epoch = options.pop("on_epoch", lambda row, epochs: None)
    options = {
        **{"epochs": 2, "batch_size": 16, "num_workers": "0", "val_split": "val"},
        **{"cpus_per_worker": 1, "precision": "float32", "cache_dir": str(run.parent / "cache")},
        **options,
    }
    config = TrainConfig(shards=str(shards), run=str(run), **options)
    return train_detector(config, on_epoch, time.monotonic(), said.append), said


@pytest.fixture(scope="module")
def wide(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The RUN of a network to learn from, of other pixels than its students."""
    run = tmp_path_factory.mktemp("teachers") / "wide"
    train(run, shards, model="small_cnn_w8_d1", image_size=24, epochs=3)
    return run


def read_weights(run: Path) -> dict[str, np.ndarray]:
    weights: dict[str, np.ndarray] = load_file(run / "bundle" / "model.safetensors")
    return weights


def is_same(one: Path, other: Path) -> bool:
    first, second = read_weights(one), read_weights(other)
    return all(np.array_equal(first[name], second[name]) for name in first)


def test_who_taught_is_said_and_recorded(shards: Path, wide: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    _, said = train(run, shards, teacher=f"{wide},cifake", distill=0.75, epochs=1)
    wanted = "wide (small_cnn_w8_d1, 24 px), cifake (small_cnn, 32 px); weight 0.75, temperature 1"
    assert f"train: taught by {wanted}" in said
    names = {"wide": wide / "bundle", "cifake": locate_bundle("cifake")}
    prints = {name: read_bundle_info(path).fingerprint for name, path in names.items()}
    recorded = ", ".join(f"{name} (sha256 {value})" for name, value in prints.items())
    training = read_bundle_info(run / "bundle").training
    assert (training["teacher"], training["distill"]) == (recorded, 0.75)
    card = (run / "bundle" / "README.md").read_text()
    assert recorded in card
    assert str(wide.parent) not in card + (run / "bundle" / "config.json").read_text()
    settings = json.loads((run / "_run.json").read_text())["settings"]
    assert settings["teacher"] == ",".join(prints.values())


def test_it_is_another_network_than_without_and_no_larger(
    shards: Path, wide: Path, tmp_path: Path
) -> None:
    train(tmp_path / "alone", shards)
    train(tmp_path / "taught", shards, teacher=str(wide), distill_temperature=2.0)
    train(tmp_path / "unheard", shards, teacher=str(wide), distill=0.0)
    assert is_same(tmp_path / "alone", tmp_path / "unheard")
    assert not is_same(tmp_path / "alone", tmp_path / "taught")
    alone, taught = (TrainRun(tmp_path / name) for name in ("alone", "taught"))
    assert read_weights(alone.path).keys() == read_weights(taught.path).keys()
    one, other = (run.checkpoint_path.stat().st_size for run in (alone, taught))
    assert abs(one - other) < 1000
    training = read_bundle_info(alone.bundle_path).training
    assert (training["teacher"], training["distill"]) == (None, None)


def test_a_run_that_was_killed_goes_on_with_its_teacher_only(
    shards: Path, wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "whole", shards, teacher=str(wide))
    monkeypatch.chdir(wide.parent)

    def stop(row: dict[str, Any], epochs: int) -> None:
        raise CifakeError("killed")

    run = tmp_path / "run"
    with pytest.raises(CifakeError, match="killed"):
        train(run, shards, teacher="wide", on_epoch=stop)
    record = json.loads((run / "_run.json").read_text())
    assert record["config"]["teacher"] == str(wide), "workers have another working folder"
    for other in ("cifake", f"{wide},cifake", None):
        with pytest.raises(RunMismatch, match=r"teacher: '.*' there, .* here"):
            train(run, shards, teacher=other)
    with pytest.raises(RunMismatch, match=r"distill: not given there, 0.5 here"):
        train(run, shards, teacher=str(wide), distill=0.5)
    moved = shutil.copytree(wide / "bundle", tmp_path / "moved")
    train(run, shards, teacher=str(moved))
    assert is_same(tmp_path / "whole", run)
    finished, said = train(run, shards, teacher=f"{wide}/bundle/")
    assert finished["epochs"] == 2
    assert "nothing is trained" in said[-1]
    with pytest.raises(RunMismatch, match="teacher"):
        train(run, shards, teacher="cifake")


def test_a_run_from_before_there_were_teachers_is_still_its_own(
    shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(run, shards)
    record = json.loads((run / "_run.json").read_text())
    for name in ("teacher", "distill", "distill_temperature"):
        del record["settings"][name], record["config"][name]
    (run / "_run.json").write_text(json.dumps(record))
    assert "nothing is trained" in train(run, shards)[1][-1]
    (run / "_SUCCESS").unlink()
    train(run, shards)


def test_a_worker_that_finds_another_teacher_than_the_driver_stops(
    shards: Path, tmp_path: Path
) -> None:
    config = TrainConfig(
        shards=str(shards), run=str(tmp_path / "run"), val_split="val", teacher="cifake"
    )
    from cifake_ray.stages.train.prepare import prepare_training

    rows_hash = prepare_training(config).rows_hash
    task = RankTask(
        config=config, rows_hash=rows_hash, use_gpu=False, num_threads=1, teacher="another"
    )
    with pytest.raises(CifakeError, match="--teacher cifake: a worker found another bundle"):
        start_rank({"task": task})
    assert not (tmp_path / "run").exists()


def write_classifier(folder: Path, names: list[str], **cfg: Any) -> Path:
    """A classifier of 48 pixels in timm's layout."""
    import timm

    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=len(names))
    cfg = {"input_size": [3, 48, 48], "interpolation": "bilinear", "crop_pct": 1.0, **cfg}
    cfg |= {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.2], "label_names": names}
    config = {"architecture": "test_resnet", "num_classes": len(names), "pretrained_cfg": cfg}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(network.state_dict(), folder / "model.safetensors")
    return folder


def test_a_classifier_of_others_teaches(shards: Path, tmp_path: Path) -> None:
    other = write_classifier(tmp_path / "other", ["fake", "real"])
    options = {"epochs": 1, "mixup": 0.5, "augment": "robust", "grad_accum": 2}
    _, said = train(tmp_path / "run", shards, teacher=str(other), **options)
    assert any("taught by other (test_resnet, 48 px)" in line for line in said)


def test_a_teacher_that_cannot_teach_is_refused_before_anything_is_written(
    shards: Path, tmp_path: Path
) -> None:
    three = write_classifier(tmp_path / "three", ["real", "fake", "edited"])
    nameless = write_classifier(tmp_path / "nameless", ["LABEL_0", "LABEL_1"])
    sizeless = write_classifier(tmp_path / "sizeless", ["fake", "real"], crop_mode="border")
    vit = tmp_path / "vit"
    vit.mkdir()
    config = {"architectures": ["ViTForImageClassification"], "model_type": "vit"}
    config["id2label"] = {"0": "fake", "1": "real"}  # type: ignore[assignment]
    (vit / "config.json").write_text(json.dumps(config))
    run = tmp_path / "run"
    for teacher, message in (
        (tmp_path / "none", "none: no config.json; give the bundle folder"),
        (three, "--teacher: .*three: a classifier .* 3 classes"),
        (nameless, "--teacher .*nameless: which of its outputs means FAKE .* label_names"),
        (sizeless, "crop_mode 'border'"),
        (vit, "there is no preprocessor_config.json"),
        (f"cifake,{three}", "3 classes"),
        (",", "names no bundle"),
    ):
        with pytest.raises(UsageError, match=message):
            train(run, shards, teacher=str(teacher))
    assert not run.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distill": 0.5}, "--distill and --distill-temperature need a --teacher"),
        ({"distill_temperature": 2.0}, "need a --teacher"),
        ({"teacher": "cifake", "distill": 1.5}, "--distill is 1.5; give 0 to 1"),
        ({"teacher": "cifake", "distill": float("nan")}, "--distill is nan"),
        ({"teacher": "cifake", "distill_temperature": 0.0}, "--distill-temperature is 0.0; give"),
        ({"teacher": "cifake", "distill_temperature": 1e-30}, "is 1e-30; give 0.01 to 1000"),
        ({"teacher": "cifake", "distill_temperature": 1e300}, r"is 1e\+300; give 0.01 to 1000"),
        ({"teacher": "cifake", "distill_temperature": float("nan")}, "is nan; give 0.01"),
        ({"teacher": " , "}, "names no bundle"),
        ({"teacher": "cifake", "leave_one_source_out": True}, "may know the source"),
    ],
)
def test_what_does_not_fit_together_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TrainConfig(shards="s", run="r", **options)


def test_teachers_are_named_with_spaces_after_commas() -> None:
    assert pin_teachers(" cifake, wild ,", StoreConfig()) == "cifake,wild"
    config = TrainConfig(shards="s", run="r", teacher=" cifake, runs/a b ,")
    assert config.teachers == ["cifake", "runs/a b"]
