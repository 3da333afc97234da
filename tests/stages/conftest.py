"""Converted shards and a barely trained bundle, made once per session."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from cifake_ray.config import ConvertConfig, TrainConfig
from cifake_ray.pipeline import run_verb
from cifake_ray.stages.train.driver import train_detector


@pytest.fixture(scope="session")
def shards(
    ray_cluster: None, sample_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("shards") / "out"
    config = ConvertConfig(src=str(sample_folder), out=str(out), shard_size=16)
    run_verb(config, time.monotonic())
    return out


@pytest.fixture(scope="session")
def bundle(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    config = TrainConfig(
        shards=str(shards),
        run=str(folder / "run"),
        epochs=1,
        batch_size=16,
        num_workers="0",
        val_fraction=0.3,
        cache_dir=str(folder / "cache"),
    )
    train_detector(config, lambda row, epochs: None, time.monotonic())
    return folder / "run" / "bundle"
