"""The ablation trains a variant behind its teacher."""

from __future__ import annotations

from pathlib import Path

import ablate
import numpy as np
import pytest


def test_a_variant_learns_from_its_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablate, "NUM_VAL", 16)
    monkeypatch.setattr(ablate, "TEACHER", (8, 8, 8, 8, 8))
    monkeypatch.setattr(ablate, "RECIPE", {**ablate.RECIPE, "epochs": 1, "batch_size": 16})
    shown = []
    step = ablate.Trainer.train_step
    monkeypatch.setattr(
        ablate.Trainer,
        "train_step",
        lambda trainer, batch: shown.append(len(trainer.teachers)) or step(trainer, batch),
    )
    rng = np.random.default_rng(0)
    np.save(tmp_path / "pixels.npy", rng.integers(0, 256, (48, 32, 32, 3), np.uint8))
    np.save(tmp_path / "labels.npy", np.arange(48) % 2)
    row = ablate.measure("taught", 0, tmp_path, 1)
    assert shown == [0, 0, 1, 1]  # the teacher's steps, and those with it
    assert row["num_parameters"] == 450_594
    assert 0 <= row["auroc"] <= 1
