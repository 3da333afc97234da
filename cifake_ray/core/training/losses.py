"""The losses of a batch: of labels, of teachers, and what holds two views of an image together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F

from cifake_ray.config import TrainConfig
from cifake_ray.core.models.detector import Detector, find_head
from cifake_ray.core.training.device_limits import DevicePrecision
from cifake_ray.core.training.distillation import find_targets, sum_divergences
from cifake_ray.errors import UsageError


def sum_losses(
    model: nn.Module,
    network: nn.Module,
    images: torch.Tensor,
    clean: torch.Tensor | None,
    labels: torch.Tensor,
    config: TrainConfig,
    precision: DevicePrecision,
    teachers: Sequence[Detector] = (),
) -> torch.Tensor:
    """Return the sum of the losses of B images; `network` is that inside `model`.

    The cross-entropy and, with the weight `--distill`, the divergence from `teachers`. With
    `clean`, the images before they were degraded, these are means of both views, and their
    difference is added with the weight `--consistency`.
    """
    weight = config.distill_weight

    def sum_errors(
        outputs: torch.Tensor, images: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        entropy = F.cross_entropy(
            outputs, labels, reduction="sum", label_smoothing=config.label_smoothing
        )
        if weight == 0:
            return entropy
        targets = find_targets(teachers, images, precision)
        divergence = sum_divergences(outputs, targets, config.distill_temperature)
        return (1 - weight) * entropy + weight * divergence

    if clean is None:
        with precision.autocast:
            outputs = model(images)
        return sum_errors(outputs, images, labels)
    views = torch.cat([images, clean])
    with precision.autocast, _watch_features(network) as features:
        outputs = model(views)  # one pass: DDP counts them
    errors = sum_errors(outputs, views, torch.cat([labels, labels])) / 2
    return errors + config.consistency * sum_differences(features[-1], outputs)


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
