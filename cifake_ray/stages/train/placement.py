"""Where a training runs, and what is said about it before it starts."""

from __future__ import annotations

import os
from typing import Any

import torch

from cifake_ray.config import Device, TrainConfig
from cifake_ray.core.training.device_limits import choose_precision
from cifake_ray.errors import ResourceError
from cifake_ray.stages.resources import (
    Node,
    Placement,
    Resources,
    choose_gpu,
    count_local_cpus,
    place_workers,
    runs_here,
)
from cifake_ray.stages.train.prepare import Prepared
from cifake_ray.storage.datasets.domain import read_typical_side
from cifake_ray.storage.runs.train_run import TrainRun

MIN_SHARE = 8  # images of a batch for each GPU, unless --num-workers asks for more workers


def place_training(config: TrainConfig, resources: Resources) -> Placement:
    """Return the smallest placement that starts.

    ResourceError, with the numbers, when the cluster is too small.
    """
    least, most = config.worker_range or (None, None)
    use_gpu = choose_gpu(config.device, resources)
    return place_workers(
        resources,
        # Small shares of a batch are slow, and too few for batch norms.
        num_workers=least
        or (min(resources.num_gpus, max(1, config.batch_size // MIN_SHARE)) if use_gpu else 1),
        use_gpu=use_gpu,
        # Workers that join later must get as many as the first ones.
        cpus_per_worker=config.cpus_per_worker or (None if least == most else 1),
    )


def trains_here(config: TrainConfig) -> bool:
    """Return whether this process trains, without Ray: by default if no other could help it."""
    least, _ = config.worker_range or (None, None)
    return runs_here(config, least, config.device, max_gpus=1)


def choose_gpu_here(device: Device) -> bool:
    """Return whether this process uses a GPU. ResourceError when --device cuda finds none."""
    is_there = torch.cuda.is_available()
    if device == "cuda" and not is_there:
        raise ResourceError(
            f"--device cuda: torch {torch.__version__} sees no GPU here; use --device cpu"
        )
    return device != "cpu" and is_there


def describe_plan(prepared: Prepared) -> dict[str, Any]:
    """Return labels, workers, device and precision, as far as they are known without Ray."""
    config, label = prepared.config, prepared.rows.label
    plan: dict[str, Any] = {"labels": {"REAL": int((label == 0).sum()), "FAKE": int(label.sum())}}
    if config.address or os.environ.get("RAY_ADDRESS") not in (None, "", "local"):
        return {**plan, "num_workers": config.num_workers, "device": config.device}
    here = Resources((Node(count_local_cpus(), torch.cuda.device_count()),))
    if config.worker_range == (0, 0):
        num_workers, use_gpu = 0, choose_gpu_here(config.device)
    else:
        placement = place_training(config, here)
        num_workers, use_gpu = placement.num_workers, placement.gpus_per_worker > 0
    device = "cuda" if use_gpu else "cpu"
    dtype = choose_precision(device, config.precision).dtype
    precision = str(dtype).removeprefix("torch.")
    return {**plan, "num_workers": num_workers, "device": device, "precision": precision}


def describe_start(prepared: Prepared, run: TrainRun, epochs_done: int) -> list[str]:
    """Return in words what is trained on what, and where it resumes."""
    config = prepared.config
    size = f"{prepared.detector.preprocessing.image_size} px"
    if config.train_size is not None:
        size += f", trained on crops of {config.train_size}"
    lines = [
        f"{config.model}, {prepared.detector.num_parameters:,} parameters, {size};"
        f" {config.epochs} epoch{'s' * (config.epochs > 1)}, batches of {config.batch_size},"
        f" {config.optimizer}, lr {config.lr:g},"
        f" augment {'on' if config.policy.to_dict() else 'none'}",
    ]
    if prepared.weights:
        lines.append(f"starting from {prepared.weights}")
    if prepared.teachers:
        weight, temperature = config.distill_weight, config.distill_temperature
        names = ", ".join(
            f"{teacher.name} ({teacher.detector.architecture},"
            f" {teacher.detector.preprocessing.image_size} px)"
            for teacher in prepared.teachers
        )
        lines.append(f"taught by {names}; weight {weight:g}, temperature {temperature:g}")
    if epochs_done:
        lines.append(f"resuming after epoch {epochs_done} of {config.epochs}")
    elif run.has_begun():
        lines.append("resuming within epoch 1")
    return lines


def describe_resizing(prepared: Prepared) -> list[str]:
    """Return a warning when images lose most of their pixels before the network sees them."""
    size, side = prepared.detector.preprocessing.image_size, read_typical_side(prepared.rows)
    if side is None or side < 2 * size or prepared.config.fit != "resize":
        return []
    return [
        f"images of about {side:,} pixels are resized to {size}, which removes the fine traces of"
        " generators; a larger --image-size, or --fit crop, keeps more of them"
    ]


def describe_workers(config: TrainConfig, num_workers: int, num_threads: int, use_gpu: bool) -> str:
    device = "cuda" if use_gpu else "cpu"
    precision = config.precision
    if device == "cpu" or torch.cuda.is_available():  # else only a worker knows
        dtype = choose_precision(device, config.precision).dtype
        precision = str(dtype).removeprefix("torch.")  # type: ignore[assignment]
    workers = f"{num_workers} worker{'s' * (num_workers > 1)}"
    return f"{workers}, {num_threads} threads each, device {device}, precision {precision}"
