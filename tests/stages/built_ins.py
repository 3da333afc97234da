"""A second built-in detector for tests: `wild`, with random weights, beside the real `cifake`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from cifake_ray.core.evaluation.calibration import Calibration
from cifake_ray.core.imaging.training_domain import TrainingDomain
from cifake_ray.core.models.detector import build_detector
from cifake_ray.storage.bundles import built_ins
from cifake_ray.storage.bundles.write_bundle import write_bundle


def add_wild(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the package have two built-in bundles, in `folder`."""
    shutil.copytree(built_ins.BUILT_IN_FOLDER / "cifake", folder / "cifake")
    torch.manual_seed(0)
    write_bundle(
        folder / "wild",
        build_detector("small_cnn", image_size=64, fit="crop").eval(),
        Calibration(temperature=1.0, threshold=0.5, threshold_fpr_1=None, threshold_fpr_01=None),
        TrainingDomain(sides=(256, 6000), formats=("JPEG", "PNG"), jpeg_qualities=(60, 98)),
        training={},
        metrics={},
        history=[],
        model_card="# Card\n",
    )
    monkeypatch.setattr(built_ins, "BUILT_IN_FOLDER", folder)
