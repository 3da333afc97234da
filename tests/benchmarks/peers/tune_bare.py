"""tune_bare.py SHARDS OUT CACHE EPOCHS RATE...: a training for each learning rate.

One process per core, each with its share of the rates, one after another.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from shared import NUM_CORES, Share, run_processes
from train_bare import draw_arrays, fit, read_arrays

from cifake_ray.stages.malloc import keep_freed_memory


def train_trials(arguments: list[str], rates: list[float]) -> list[Share]:
    """Train in one thread for each learning rate."""
    import torch

    from cifake_ray.config import TrainConfig
    from cifake_ray.core.training.optimizer import build_for_training

    shards, out, cache, epochs = arguments
    torch.set_num_threads(1)
    keep_freed_memory()  # as our workers do, so that the ratio is about everything else
    config = TrainConfig(shards=shards, run=out, cache_dir=cache, epochs=int(epochs))
    images, labels = read_arrays(config, build_for_training(config))
    num_steps = len(labels) // config.batch_size
    shares = []
    for rate in rates:
        torch.manual_seed(0)
        trial: Any = replace(config, lr=rate)
        detector = build_for_training(trial)
        draw_epoch = draw_arrays(images, labels, trial.batch_size)
        shares.append(fit(trial, detector, detector, num_steps, draw_epoch))
    return shares


def train_share(rank: int) -> Share:
    rates = [float(word) for word in sys.argv[5:]][rank::NUM_CORES]
    shares = train_trials(sys.argv[1:5], rates)
    num_images = sum(share.images for share in shares)
    return Share(num_images, num_images, shares[0].started_s, shares[-1].finished_s)


if __name__ == "__main__":
    run_processes(train_share, min(NUM_CORES, len(sys.argv) - 5))
