"""train_timm.py SOURCE OUT EPOCHS PROCESSES THREADS LOADERS LAYOUT: timm's loop on a folder.

timm's `train.py` is in its repository but not in its wheel, so this is a loop of the same form on
what the wheel has: timm's data set, loader, normalisation, task and meters, no autocast, a step of
the schedule for each update. Network, optimiser, schedule and batch size are those of our `train`;
of timm's augmentation only the horizontal flip is left. Each process computes in THREADS threads
and has LOADERS processes that load; LAYOUT is `default` or `channels-last`, as with timm's option.
Two or more processes are DistributedDataParallel over gloo. The rate is that of the last epoch.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from shared import Share, run_processes

from cifake_ray.stages.malloc import keep_freed_memory


def make_loader(preprocessing: Any, batch_size: int, num_ranks: int, num_loaders: int) -> Any:
    import torch
    from timm.data import create_dataset, create_loader

    return create_loader(
        create_dataset("", root=sys.argv[1], split="train"),
        input_size=preprocessing.image_size,
        batch_size=batch_size // num_ranks,
        is_training=True,
        scale=(1.0, 1.0),  # the whole image
        ratio=(1.0, 1.0),
        hflip=0.5,
        color_jitter=0.0,
        mean=preprocessing.mean,
        std=preprocessing.std,
        num_workers=num_loaders,
        distributed=num_ranks > 1,
        device=torch.device("cpu"),
    )


def train_one_epoch(task: Any, loader: Any, optimizer: Any, schedule: Any, layout: Any) -> int:
    """How many images this process trained on."""
    from timm.utils import AverageMeter

    losses, seconds = AverageMeter(), AverageMeter()
    task.train()
    step_started_s = time.time()
    for images, labels in loader:
        loss = task(images.contiguous(memory_format=layout), labels)["loss"]
        losses.update(loss.item(), len(images))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        seconds.update(time.time() - step_started_s)
        step_started_s = time.time()
    return int(losses.count)


def train_share(rank: int) -> Share:
    import torch
    import torch.distributed as dist
    from timm.task import ClassificationTask

    from cifake_ray.config import TrainConfig
    from cifake_ray.core.training.optimizer import build_for_training, make_optimizer, make_schedule

    source, out = sys.argv[1:3]
    epochs, num_ranks, num_threads, num_loaders = map(int, sys.argv[3:7])
    is_last = sys.argv[7] == "channels-last"
    torch.set_num_threads(num_threads)
    keep_freed_memory()  # as our workers do, so that the ratio is about everything else
    torch.manual_seed(0)
    config = TrainConfig(shards=source, run=out, epochs=epochs, channels_last=is_last)
    detector = build_for_training(config)
    task = ClassificationTask(detector.network, torch.nn.CrossEntropyLoss(), verbose=False)
    if num_ranks > 1:
        os.makedirs(out, exist_ok=True)
        meeting = f"file://{out}/meeting"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=num_ranks)
        task.prepare_distributed()
    loader = make_loader(detector.preprocessing, config.batch_size, num_ranks, num_loaders)
    optimizer = make_optimizer(detector.network, config)
    schedule = make_schedule(optimizer, config, len(loader) * epochs)
    layout = torch.channels_last if is_last else torch.contiguous_format
    num_images = 0
    for epoch in range(epochs):
        if num_ranks > 1:
            loader.sampler.set_epoch(epoch)
        started_s, images_before = time.time(), num_images
        num_images += train_one_epoch(task, loader, optimizer, schedule, layout)
    finished_s = time.time()
    if num_ranks > 1:
        dist.destroy_process_group()
    return Share(num_images, num_images - images_before, started_s, finished_s)


if __name__ == "__main__":
    run_processes(train_share, int(sys.argv[4]))
