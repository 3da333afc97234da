"""train_bare.py SHARDS OUT CACHE EPOCHS PROCESSES: a plain PyTorch loop over arrays in memory.

Two or more processes are DistributedDataParallel over gloo. The rate is that of the last epoch.
"""

from __future__ import annotations

import os
import sys
import time

from shared import NUM_CORES, Share, run_processes

from cifake_ray.stages.malloc import keep_freed_memory


def train_share(rank: int) -> Share:
    import numpy as np
    import torch
    import torch.distributed as dist

    from cifake_ray.config import TrainConfig
    from cifake_ray.core.training.optimizer import build_for_training, make_optimizer, make_schedule
    from cifake_ray.storage.datasets.training_set import open_training_data, read_training_rows

    shards, out, cache = sys.argv[1:4]
    epochs, num_ranks = int(sys.argv[4]), int(sys.argv[5])
    torch.set_num_threads(max(1, NUM_CORES // num_ranks))
    keep_freed_memory()  # as our workers do, so that the ratio is about everything else
    torch.manual_seed(0)
    config = TrainConfig(shards=shards, run=out, cache_dir=cache, epochs=epochs)
    detector = build_for_training(config)
    rows = read_training_rows(config)
    data = open_training_data(rows, detector.preprocessing, config, 1).train
    labels = torch.from_numpy(data.labels)
    images = torch.from_numpy(data.read(np.arange(len(labels))))
    model: torch.nn.Module = detector
    if num_ranks > 1:
        os.makedirs(out, exist_ok=True)
        meeting = f"file://{out}/meeting"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=num_ranks)
        model = torch.nn.parallel.DistributedDataParallel(detector)
    num_steps = len(labels) // config.batch_size
    optimizer = make_optimizer(detector.network, config)
    schedule = make_schedule(optimizer, config, num_steps * epochs)
    num_images = 0
    for epoch in range(epochs):
        started_s, images_before = time.time(), num_images
        model.train()
        total = torch.zeros((), dtype=torch.float64)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(epoch))
        for step in range(num_steps):
            start = step * config.batch_size
            share = order[start + rank : start + config.batch_size : num_ranks]
            mirrored = torch.rand(len(share)) < 0.5
            pixels = images[share]
            pixels = torch.where(mirrored[:, None, None, None], pixels.flip(2), pixels)
            loss = torch.nn.functional.cross_entropy(model(pixels), labels[share])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
            num_images += len(share)
    finished_s = time.time()
    if num_ranks > 1:
        dist.destroy_process_group()
    return Share(num_images, num_images - images_before, started_s, finished_s)


if __name__ == "__main__":
    run_processes(train_share, int(sys.argv[5]))
