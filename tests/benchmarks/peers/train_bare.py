"""train_bare.py SHARDS OUT CACHE EPOCHS PROCESSES: a plain PyTorch loop over arrays in memory.

Two or more processes are DistributedDataParallel over gloo. The rate is that of the last epoch.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from shared import NUM_CORES, Share, run_processes

from cifake_ray.stages.malloc import keep_freed_memory

if TYPE_CHECKING:
    import torch

DrawEpoch = Callable[[int], "Iterable[tuple[torch.Tensor, torch.Tensor]]"]


def read_arrays(config: Any, detector: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8[N, S, S, 3] and int64[N] of the training images, decoded or from the cache."""
    import numpy as np
    import torch

    from cifake_ray.storage.datasets.training_rows import read_training_rows
    from cifake_ray.storage.datasets.training_set import open_training_data

    rows = read_training_rows(config)
    data = open_training_data(rows, detector.preprocessing, config, 1).train
    labels = torch.from_numpy(data.labels)
    return torch.from_numpy(data.read(np.arange(len(labels)))), labels


def fit(config: Any, detector: Any, model: Any, num_steps: int, draw_epoch: DrawEpoch) -> Share:
    """Train with the optimiser, schedule and flips of our `train`; `num_steps` are an epoch's."""
    import torch

    from cifake_ray.core.training.optimizer import make_optimizer, make_schedule

    optimizer = make_optimizer(detector.network, config)
    schedule = make_schedule(optimizer, config, num_steps * config.epochs)
    num_images = 0
    for epoch in range(config.epochs):
        started_s, images_before = time.time(), num_images
        model.train()
        total = torch.zeros((), dtype=torch.float64)
        for pixels, labels in draw_epoch(epoch):
            mirrored = torch.rand(len(pixels)) < 0.5
            pixels = torch.where(mirrored[:, None, None, None], pixels.flip(2), pixels)
            loss = torch.nn.functional.cross_entropy(model(pixels), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
            num_images += len(pixels)
    return Share(num_images, num_images - images_before, started_s, time.time())


def draw_arrays(
    images: torch.Tensor, labels: torch.Tensor, batch_size: int, rank: int = 0, num_ranks: int = 1
) -> DrawEpoch:
    """Draw a rank's share of each whole batch, in another order each epoch."""
    import torch

    def draw_epoch(epoch: int) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(epoch))
        for start in range(0, len(labels) // batch_size * batch_size, batch_size):
            share = order[start + rank : start + batch_size : num_ranks]
            yield images[share], labels[share]

    return draw_epoch


def train_share(rank: int) -> Share:
    import torch
    import torch.distributed as dist

    from cifake_ray.config import TrainConfig
    from cifake_ray.core.training.optimizer import build_for_training

    shards, out, cache = sys.argv[1:4]
    epochs, num_ranks = int(sys.argv[4]), int(sys.argv[5])
    torch.set_num_threads(max(1, NUM_CORES // num_ranks))
    keep_freed_memory()  # as our workers do, so that the ratio is about everything else
    torch.manual_seed(0)
    config = TrainConfig(shards=shards, run=out, cache_dir=cache, epochs=epochs)
    detector = build_for_training(config)
    images, labels = read_arrays(config, detector)
    model: torch.nn.Module = detector
    if num_ranks > 1:
        os.makedirs(out, exist_ok=True)
        meeting = f"file://{out}/meeting"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=num_ranks)
        model = torch.nn.parallel.DistributedDataParallel(detector)
    draw_epoch = draw_arrays(images, labels, config.batch_size, rank, num_ranks)
    share = fit(config, detector, model, len(labels) // config.batch_size, draw_epoch)
    if num_ranks > 1:
        dist.destroy_process_group()
    return share


if __name__ == "__main__":
    run_processes(train_share, int(sys.argv[5]))
