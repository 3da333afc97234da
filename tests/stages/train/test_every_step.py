"""Something happens at each change that a training makes to its folder; then it runs again.

Everything is real but the disk (`computer`). CIFAKE_TEST_EXAMPLES=1 tries every event at every
change, not one of them.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from computer import Computer, Killed, Trigger
from PIL import Image

from cifake_ray.config import TrainConfig
from cifake_ray.errors import StorageError
from cifake_ray.stages.train.driver import train_detector
from cifake_ray.storage.bundles.bundle import load_bundle

EVENTS = ("kill_command", "lose_names", "lose_bytes", "fill_disk", "break_disk")
DISK_ERRORS = EVENTS[3:]
NUM_IMAGES = 24


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


def find_files(run: Path) -> list[str]:
    return sorted(path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file())


def test_anything_may_happen_at_any_change_of_a_training(shards: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    whole = tmp_path / "whole" / "out"
    summary = run_train(shards, whole)
    weights = (whole / "bundle" / "model.safetensors").read_bytes()
    computer, patch = Computer(), pytest.MonkeyPatch()
    computer.install(patch)
    every_event = "CIFAKE_TEST_EXAMPLES" in os.environ
    run = tmp_path / "out"
    try:
        for count in itertools.count(1):
            for number, event in enumerate(EVENTS):
                if not every_event and number != count % len(EVENTS):
                    continue
                may_fail = event in DISK_ERRORS
                act = getattr(computer, event)
                computer.trigger = Trigger(None, count, act, event == "fill_disk", may_fail)
                try:
                    with computer.start_process():
                        run_train(shards, run)
                except Killed:
                    assert not may_fail
                except StorageError:
                    assert may_fail
                # A full disk strikes writes only, of which there are fewer.
                is_over = computer.trigger is not None and event != "fill_disk"
                computer.trigger = None
                if (run / "_SUCCESS").exists():  # then nothing may be missing
                    load_bundle(run / "bundle")
                with computer.start_process():
                    again = run_train(shards, run)
                assert again["steps"] == summary["steps"], (event, count)
                assert (run / "bundle" / "model.safetensors").read_bytes() == weights
                rows = (run / "history.jsonl").read_text().splitlines()
                assert [json.loads(row)["epoch"] for row in rows] == [1]
                if not may_fail:
                    assert find_files(run) == find_files(whole)
                shutil.rmtree(run)
            if is_over:
                break
    finally:
        patch.undo()
    assert count > 40
