"""train on native crops with twins, in this process: recorded, resumed, and chosen elsewhere."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from cifake_ray.config import EvaluateConfig, TrainConfig
from cifake_ray.core.models.detector import Detector
from cifake_ray.core.schema import FOOTER_KEY
from cifake_ray.errors import CifakeError, RunMismatch, UsageError
from cifake_ray.stages.evaluate.inputs import find_seen
from cifake_ray.stages.train.driver import train_detector
from cifake_ray.storage.bundles.bundle import read_bundle_info
from cifake_ray.storage.runs.train_run import TrainRun

SOURCES = ("pets", "faces", "art", "web")


def encode_image(seed: int, brighter: int = 0) -> bytes:
    """Noise of 40 x 50 pixels or of 20 x 70; FAKE is brighter."""
    rng = np.random.default_rng(seed)
    shape = (40, 50, 3) if seed % 2 else (20, 70, 3)
    buffer = io.BytesIO()
    pixels = rng.integers(0, 180, shape) + brighter
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write(folder: Path, maker: str, sources: tuple[str, ...]) -> Path:
    """Shards of 16 images of each source, as convert writes them."""
    rows = []
    for n in range(16 * len(sources)):
        source = sources[n % len(sources)]
        label = int(bool(maker) or source in ("art", "web"))
        seed = 100 * (n % len(sources)) + n // len(sources)
        height, width = (40, 50) if seed % 2 else (20, 70)
        rows.append(
            {
                "key": f"{maker}{('REAL', 'FAKE')[label]}/{source}/{seed}.png",
                "image": {"bytes": encode_image(seed, 60 * label)},
                **{"label": label, "split": "train", "source": source},
                **{"width": width, "height": height, "error": None},
                **{"format": "PNG", "jpeg_quality": 90},
            }
        )
    folder.mkdir()
    table = pa.Table.from_pylist(rows).replace_schema_metadata({FOOTER_KEY: b"{}"})
    pq.write_table(table, folder / "a.parquet", row_group_size=16)
    return folder


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    return {
        "shards": str(write(tmp_path / "images", "", SOURCES)),
        "twins": str(write(tmp_path / "twins", "dat/", ("pets", "faces"))),
        **{"model": "small_cnn_w8_d1", "image_size": 32, "fit": "crops", "num_crops": 3},
        **{"crops_per_image": 2, "augment": "wild", "consistency": 1.0},
        **{"val_sources": ("faces,web",), "epochs": 2, "batch_size": 12, "precision": "float32"},
        **{"num_workers": "0", "cpus_per_worker": 1, "cache_dir": str(tmp_path / "cache")},
    }


def train(
    run: Path, options: dict[str, Any], on_epoch: Any = lambda row, epochs: None
) -> tuple[dict[str, Any], list[str]]:
    said: list[str] = []
    config = TrainConfig(run=str(run), **options)
    return train_detector(config, on_epoch, time.monotonic(), said.append), said


def test_all_of_it_is_said_and_recorded(tmp_path: Path, options: dict[str, Any]) -> None:
    summary, said = train(tmp_path / "run", options)
    lost = "left out 16 of no image that is trained on"
    assert f"train: 16 twins of 16 REAL images; {lost}" in said
    assert (summary["train_images"], summary["val_images"]) == (48, 32)
    assert summary["steps"] == 2 * 2 * 48 // 12
    info = read_bundle_info(tmp_path / "run" / "bundle")
    assert info.preprocessing.to_dict()["num_crops"] == 3
    kept = {"twins": "twins", "val_sources": ["faces,web"], "consistency": 1.0}
    assert {name: info.training[name] for name in kept} == kept
    assert info.training["augment"]["webp_share"] == 0.2
    card = (tmp_path / "run" / "bundle" / "README.md").read_text()
    assert "faces,web" in card
    assert str(tmp_path) not in card
    settings = json.loads((tmp_path / "run" / "_run.json").read_text())["settings"]
    assert settings["val_sources"] == ["faces,web"]
    assert settings["crops_per_image"] == 2
    history = TrainRun(tmp_path / "run").read_history()
    assert history[-1]["val_auroc"] > 0.9, "brightness alone tells them apart"


def test_a_run_that_was_killed_ends_as_one_that_was_not(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    train(tmp_path / "whole", options)

    def stop(row: dict[str, Any], epochs: int) -> None:
        raise CifakeError("killed")

    with pytest.raises(CifakeError, match="killed"):
        train(tmp_path / "run", options, stop)
    train(tmp_path / "run", options)
    one, other = (
        load_file(tmp_path / run / "bundle" / "model.safetensors") for run in ("whole", "run")
    )
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_unseen_are_rows_of_the_shards_and_none_of_twins(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    options |= {"exclude_source": ("art",), "val_sources": (), "val_fraction": 0.3}
    options |= {"epochs": 1, "crops_per_image": 1}
    train(tmp_path / "run", options)
    config = EvaluateConfig(
        shards=options["shards"], out="out", bundle=str(tmp_path / "run"), unseen=True
    )
    bundle = read_bundle_info(tmp_path / "run" / "bundle")
    seen = find_seen(config, Path(options["shards"]), bundle)
    assert list(seen) == ["a.parquet"]
    sources = pq.read_table(options["shards"]).column("source").to_numpy()
    assert set(sources[seen["a.parquet"]]) == {"pets", "faces", "web"}
    assert len(seen["a.parquet"]) == 48


def test_crops_of_another_size_are_trained_on_than_are_scored(
    tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options |= {"model": "small_lite0", "image_size": 128, "train_size": 64, "epochs": 1}
    options |= {"twin_share": 0.25, "balance_sources": 0.5}
    sides, forward = set[tuple[bool, int]](), Detector.forward

    def watch(detector: Detector, images: torch.Tensor) -> torch.Tensor:
        sides.add((detector.training, images.shape[1]))
        return forward(detector, images)

    monkeypatch.setattr(Detector, "forward", watch)
    summary, said = train(tmp_path / "run", options)
    assert sides == {(True, 64), (False, 128), (False, 64)}, "it is tried at 64 before"
    assert any("128 px, trained on crops of 64;" in line for line in said)
    assert summary["steps"] == 2 * 48 // 12
    info = read_bundle_info(tmp_path / "run" / "bundle")
    assert info.preprocessing.image_size == 128
    card = (tmp_path / "run" / "bundle" / "README.md").read_text()
    for name in ("train_size", "twin_share", "balance_sources"):
        assert info.training[name] == options[name]
        assert name in card
    with pytest.raises(RunMismatch, match=r"twin_share: 0\.25 there, 0\.5 here"):
        train(tmp_path / "run", options | {"twin_share": 0.5})


@pytest.mark.parametrize("model", ["cnn", "small_vit_tiny", "fusion"])
def test_a_network_of_one_size_trains_on_no_other(
    tmp_path: Path, options: dict[str, Any], model: str
) -> None:
    message = f"--model {model} cannot take 64 x 64 images .*choose another --train-size, or leave"
    with pytest.raises(UsageError, match=message):
        train(tmp_path / "run", options | {"model": model, "train_size": 64})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"fit": "resize"}, "--num-crops and --crops-per-image need --fit crops"),
        (
            {"fit": "resize", "num_crops": None, "crops_per_image": 1},
            "downscale shrinks native pixels; give --fit crops",
        ),
        ({"batch_size": 13}, "--twins needs an even --batch-size, not 13"),
        ({"num_workers": "7"}, "with --twins a pair"),
        ({"augment": "flip"}, "--consistency compares an image with what --augment makes of it"),
        ({"compile": True}, "--consistency reads what enters the classifier"),
        ({"consistency": -1.0}, "--consistency is -1.0; give 0 or more"),
        ({"num_crops": 0}, "--num-crops is 0; give 1 to 64"),
        ({"train_size": 1025}, "crops of at most 1,024 pixels, not 1,025"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    tmp_path: Path, options: dict[str, Any], changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        train(tmp_path / "run", options | changed)
