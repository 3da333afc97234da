"""Prepare a training: read its rows, build its detector, load weights and teachers, check options.

The driver prepares once, which is enough for a training in its own process; each worker of Ray
Train prepares again in its process.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from cifake_ray.config import TrainConfig, fingerprint_settings
from cifake_ray.core.models.detector import Detector
from cifake_ray.core.training.optimizer import build_for_training, make_optimizer
from cifake_ray.storage.bundles.pretrained import StartingWeights, load_starting_weights
from cifake_ray.storage.bundles.teachers import Teacher, identify_teachers, load_teachers
from cifake_ray.storage.datasets.training_rows import TrainingRows, read_training_rows
from cifake_ray.storage.io.paths import resolve_path
from cifake_ray.storage.presets.augmentation import read_augmentation
from cifake_ray.storage.runs.train_run import TrainRun


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A training that is ready to start."""

    config: TrainConfig  # its `augment` is parsed
    rows: TrainingRows
    rows_hash: str
    detector: Detector  # with its starting weights; training changes it in place
    weights: StartingWeights | None  # None if initialised at random
    teachers: list[Teacher]

    @property
    def settings(self) -> dict[str, Any]:
        """Return what the fingerprint of the run covers."""
        settings = {**describe_options(self.config), "rows": self.rows_hash}
        if self.weights is not None:  # another path to the same weights is the same run
            settings["weights"] = self.weights.digest
        settings["teacher"] = identify_teachers(self.teachers)
        return settings


def describe_options(config: TrainConfig) -> dict[str, Any]:
    """Return the fingerprint's options, with the steps of the augmentation instead of its name."""
    return {**fingerprint_settings(config), "augment": config.policy.to_dict()}


def build_checked(config: TrainConfig) -> Detector:
    """Build the detector with random weights. UsageError when the options do not fit together."""
    torch.manual_seed(config.seed)
    detector = build_for_training(config)
    make_optimizer(detector.network, config)
    return detector


def prepare_training(config: TrainConfig) -> Prepared:
    """Read the rows, build the detector, load its starting weights and its teachers.

    UsageError or BundleError when shards, options, weights and teachers do not fit together.
    """
    config = replace(config, augment=read_augmentation(config))
    run = TrainRun(resolve_path(config.run, config.store))
    rows = read_training_rows(config, run.read_digests())
    detector = build_checked(config)
    return Prepared(
        config=config,
        rows=rows,
        rows_hash=rows.hash_rows(),
        detector=detector,
        weights=load_starting_weights(config, detector),
        teachers=load_teachers(config),
    )
