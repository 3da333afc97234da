"""Training on a GPU: its curve beside the CPU's, mixed precision, and batch norms of two ranks."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

from cifake_ray.config import TrainConfig
from cifake_ray.core.models.detector import build_detector
from cifake_ray.core.models.precision import exact_products
from cifake_ray.core.training.batches import Batch
from cifake_ray.core.training.device_limits import DevicePrecision
from cifake_ray.core.training.optimizer import sync_batch_norms
from cifake_ray.core.training.trainer import Trainer

NUM_IMAGES = 200
MAX_GAP = 5e-4  # of the loss of a step: rounding alone, through 18 steps, makes 1e-6 on a CPU


@dataclass
class Noise:
    """Images of noise; FAKE ones are lighter."""

    num_images: int = NUM_IMAGES
    labels: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.labels = np.arange(self.num_images, dtype=np.int64) % 2
        noise = np.random.default_rng(0).integers(0, 160, (self.num_images, 32, 32, 3))
        self.pixels = (noise + 60 * self.labels[:, None, None, None]).astype(np.uint8)

    def order_epoch(self, rng: np.random.Generator) -> np.ndarray:
        return rng.permutation(self.num_images)

    def read(self, indices: np.ndarray) -> np.ndarray:
        return self.pixels[indices]


class Recorder(Trainer):
    """Keeps the mean loss of every global batch."""

    losses: list[float]

    def _find_gradient(self, batch: Batch) -> torch.Tensor:
        total = super()._find_gradient(batch)
        self.losses.append(self._add_up(total) / batch.size)
        return total


def train(
    device: str, precision: str, model: str, is_distributed: bool = False, **options: Any
) -> list[float]:
    """Return the loss of each of 18 steps, with SGD: Adam blows rounding up.

    A teacher, if `options` name one, has other pixels and random weights.
    """
    torch.manual_seed(0)
    config = TrainConfig(
        **{"shards": "-", "run": "-", "model": model, "batch_size": 32, "epochs": 3},
        **{"optimizer": "sgd", "lr": 0.05, **options},
    )
    detector = build_detector(model)
    if is_distributed:
        detector.network = sync_batch_norms(detector.network, device)
    detector.to(device)
    wrapped = nn.parallel.DistributedDataParallel(detector) if is_distributed else detector
    teachers = [build_detector("small_cnn", image_size=24) for _ in config.teachers]
    if config.compile:
        for each in (detector, *teachers):
            each.network.compile()
    trainer = Recorder(
        *(detector, wrapped, config, Noise(), Noise(20), DevicePrecision(device, precision)),
        teachers=teachers,
    )
    trainer.losses = []
    trainer.fit(lambda: None)
    return trainer.losses


@pytest.mark.parametrize("model", ["cnn", "small_cnn"])
@pytest.mark.usefixtures("exact_float32")
def test_the_curve_in_float32_is_the_cpus(model: str, device: str) -> None:
    expected = train("cpu", "float32", model)
    found = train(device, "float32", model)
    gap = np.abs(np.subtract(found, expected)).max()
    print(f"{model}: loss {found[0]:.3f} -> {found[-1]:.3f}, gap {gap:.2g}")
    assert gap < MAX_GAP


@pytest.mark.usefixtures("exact_float32")
def test_a_teacher_gives_the_curve_that_it_gives_on_the_cpu(device: str) -> None:
    options: dict[str, Any] = {"teacher": "random", "mixup": 0.5, "distill_temperature": 2.0}
    expected = train("cpu", "float32", "cnn", **options)
    found = train(device, "float32", "cnn", **options)
    assert np.abs(np.subtract(found, expected)).max() < MAX_GAP
    assert np.abs(np.subtract(found, train("cpu", "float32", "cnn"))).max() > 10 * MAX_GAP


@pytest.mark.parametrize("options", [{}, {"teacher": "random", "distill": 0.1}])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_loss_falls_in_mixed_precision(
    precision: str, options: dict[str, Any], device: str
) -> None:
    if device == "cpu" and precision == "fp16":
        pytest.skip("fp16 trains on GPUs only")
    losses = train(device, precision, "small_cnn", **options)
    assert np.isfinite(losses).all()
    assert np.mean(losses[-4:]) < 0.7 * losses[0]


def run_rank(rank: int, num_ranks: int, device: str, folder: str) -> None:
    """Train as one rank; nccl takes one rank a GPU, gloo any number."""
    torch.set_num_threads(1)
    if sys.platform == "linux":  # where the host's own name need not resolve
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    backend = "gloo"
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
        if num_ranks <= torch.cuda.device_count():
            backend = "nccl"
    dist.init_process_group(
        backend, init_method=f"file://{folder}/meet-{num_ranks}", rank=rank, world_size=num_ranks
    )
    with exact_products():
        losses = train(device, "float32", pick_model(device), is_distributed=True)
    if rank == 0:
        np.save(f"{folder}/{num_ranks}.npy", losses)
    dist.barrier()  # none leaves while another may still exchange with it
    dist.destroy_process_group()


def pick_model(device: str) -> str:
    """One with batch norms, which only GPUs share among ranks."""
    return "cnn" if device == "cpu" else "small_cnn"


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.usefixtures("exact_float32")
def test_ranks_with_shared_batch_norms_train_as_one(
    num_ranks: int, device: str, tmp_path: Path
) -> None:
    arguments: Any = (num_ranks, device, str(tmp_path))
    torch.multiprocessing.spawn(run_rank, arguments, nprocs=num_ranks)
    found = np.load(tmp_path / f"{num_ranks}.npy")
    expected = train(device, "float32", pick_model(device))
    assert np.abs(found - expected).max() < MAX_GAP
    assert found[-1] < 0.9 * found[0]
