"""The losses of a batch: cross-entropy, and what holds two views of an image together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F

from cifake_ray.config import TrainConfig
from cifake_ray.core.models.detector import find_head
from cifake_ray.core.training.device_limits import DevicePrecision
from cifake_ray.errors import UsageError


def sum_losses(
    model: nn.Module,
    network: nn.Module,
    images: torch.Tensor,
    clean: torch.Tensor | None,
    labels: torch.Tensor,
    config: TrainConfig,
    precision: DevicePrecision,
) -> torch.Tensor:
    """Return the sum of the losses of B images; `network` is that inside `model`.

    With `clean`, the images before they were degraded, the cross-entropy is the mean of both views,
    and their difference is added with the weight `--consistency`.
    """

    def sum_entropy(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(
            outputs, labels, reduction="sum", label_smoothing=config.label_smoothing
        )

    if clean is None:
        with precision.autocast:
            outputs = model(images)
        return sum_entropy(outputs, labels)
    with precision.autocast, _watch_features(network) as features:
        outputs = model(torch.cat([images, clean]))  # one pass: DDP counts them
    entropy = sum_entropy(outputs, torch.cat([labels, labels])) / 2
    return entropy + config.consistency * sum_differences(features[-1], outputs)


def sum_differences(features: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """Return how much the two halves of a batch, two views of B images, differ, summed over B.

    The cosine distance of `features` [2B, ...] and the symmetric Kullback-Leibler divergence of
    `outputs` float[2B, 2], which is the mean of both directions: DCPT, Yang et al. 2026,
    arXiv 2604.10102.
    """
    one, other = features.float().flatten(1).chunk(2)
    log_p, log_q = outputs.float().log_softmax(dim=1).chunk(2)
    divergence = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(dim=1) / 2
    return (1 - F.cosine_similarity(one, other) + divergence).sum()


@contextmanager
def _watch_features(network: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect what enters the classifier meanwhile.

    UsageError for a network that has several, or does not call it.
    """
    features: list[torch.Tensor] = []
    hook = find_head(network).register_forward_pre_hook(
        lambda _, inputs: features.append(inputs[0])
    )
    try:
        yield features
    finally:
        hook.remove()
    if not features:
        raise UsageError(
            "--consistency: this network has no single classifier whose input could be compared;"
            " leave it out, or choose another --model"
        )
