"""Build what training needs before the first step: network, optimizer, schedule.

timm's optimizer and layer groups are imported only when they are asked for, torch's compiler never.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from cifake_ray.config import NUM_CROPS, TrainConfig
from cifake_ray.core.models.detector import Detector, build_detector, check_size, find_head
from cifake_ray.errors import UsageError


class _Uncompiled(torch.optim.Optimizer):
    """An optimizer without the decorators that keep torch's compiler out of its methods.

    They import it to do so, which takes a second, and nothing but the network is compiled here.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)


class AdamW(_Uncompiled, torch.optim.AdamW):
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


class SGD(_Uncompiled, torch.optim.SGD):
    step = torch.no_grad()(inspect.unwrap(torch.optim.SGD.step))


def build_for_training(config: TrainConfig) -> Detector:
    """Build the detector that a run trains, with weights from torch's global generator.

    UsageError as `build_detector`, and for a `--train-size` that the network cannot take.
    """
    detector = build_detector(
        config.model,
        image_size=config.image_size,
        fit=config.fit,
        num_crops=config.num_crops or NUM_CROPS,
        drop_path=config.drop_path,
    )
    preprocessing = replace(
        detector.preprocessing,
        test_time_flip=config.test_time_flip,
        jpeg_scale=config.fit == "resize",  # crops need every pixel
    )
    detector.set_preprocessing(preprocessing)
    if config.train_size is not None:
        check_size(detector, config.train_size)
    if config.channels_last:
        detector.network.to(memory_format=torch.channels_last)
    return detector


def sync_batch_norms(network: nn.Module, device: str) -> nn.Module:
    """Share the statistics of batch norms among ranks, on GPUs; names of weights stay the same."""
    if device == "cpu":
        return network
    from timm.layers import convert_sync_batchnorm  # type: ignore[attr-defined]

    shared: nn.Module = convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
    return shared


def make_optimizer(network: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Make adamw, sgd with Nesterov's momentum, or timm's muon. UsageError for impossible layers.

    Weights with two axes or more decay, as in timm, but biases and norms do not. Muon leaves those
    and the head to AdamW at the same rate (Jordan 2024: it is for hidden layers).
    """
    groups = _make_groups(network, config)
    if config.optimizer == "sgd":
        return SGD(
            groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0, fused=True
        )
    if config.optimizer == "muon":
        from timm.optim.muon import Muon

        muon: torch.optim.Optimizer = Muon(
            groups, lr=config.lr, momentum=config.momentum, betas=(config.momentum, 0.95)
        )
        return muon
    # fused: one pass over each tensor instead of one for each operation
    return AdamW(groups, lr=config.lr, betas=(config.momentum, 0.999), fused=True)


def _make_groups(network: nn.Module, config: TrainConfig) -> list[dict[str, object]]:
    """Group parameters by decay, and with `--layer-decay` by layer."""
    if config.layer_decay is not None:
        if not hasattr(network, "group_matcher"):
            raise UsageError(
                f"--layer-decay: timm knows no layers of {config.model}; leave it out, or take an"
                " architecture of timm"
            )
        from timm.optim import param_groups_layer_decay  # type: ignore[attr-defined]

        groups = param_groups_layer_decay(
            network, weight_decay=config.weight_decay, layer_decay=config.layer_decay
        )
        for group in groups:
            group["lr"] = config.lr * group["lr_scale"]
    else:
        trained = [p for p in network.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
    if config.optimizer == "muon":
        head = {id(p) for p in find_head(network).parameters()}
        groups = [
            {**group, "params": chosen, **({"use_fallback": True} if is_head else {})}
            for group in groups
            for is_head in (False, True)
            if (chosen := [p for p in group["params"] if (id(p) in head) == is_head])
        ]
    return list(groups)


def make_schedule(
    optimizer: torch.optim.Optimizer, config: TrainConfig, num_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Make the schedule: up to `lr` in the warm-up share of the steps, then by `--schedule`.

    onecycle: Smith 2018, from lr / 25 up and down to almost 0, both as cosines. cosine: Loshchilov
    2017, one half wave without restarts, after a straight warm-up.
    """
    if config.schedule == "onecycle":
        num_steps = max(num_steps, 3)  # it divides by the length of each of its two phases
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=[group["lr"] for group in optimizer.param_groups],
            total_steps=num_steps,
            pct_start=max(config.warmup, 2 / num_steps),
            cycle_momentum=False,
        )
    num_warm = round(config.warmup * num_steps)

    def factor(step: int) -> float:
        if step < num_warm:
            return (step + 1) / num_warm
        if config.schedule == "constant":
            return 1.0
        return (1 + math.cos(math.pi * (step - num_warm) / max(1, num_steps - num_warm))) / 2

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    checkpoint: dict[str, Any],
) -> None:
    """Load moments and schedule, but keep the rates and the decay of this run's options.

    They differ where population based training continues from another trial's weights.
    """
    groups = [{**group} for group in optimizer.param_groups]
    base_rates = schedule.base_lrs
    optimizer.load_state_dict(checkpoint["optimizer"])
    schedule.load_state_dict(checkpoint["schedule"])
    schedule.base_lrs = base_rates
    for group, own in zip(optimizer.param_groups, groups, strict=True):
        rate = group["lr"] * own["initial_lr"] / group["initial_lr"]
        group.update({**own, "lr": rate})
