"""Draw the batches of each rank: its share of a global batch, augmented and mixed.

They follow from the seed, the epoch and the step alone, so that a killed run can resume.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch

from cifake_ray.config import Augmentation, TrainConfig
from cifake_ray.core.training.augmentation import Draws, augment, draw_augmentation
from cifake_ray.core.training.mixup import draw_mix, mix_images, mix_labels


class Images(Protocol):
    """Decoded, labelled images by number."""

    labels: np.ndarray  # int64[N], REAL or FAKE

    def order_epoch(self, rng: np.random.Generator) -> np.ndarray:
        """Return int64[N], a new permutation in which reading is cheap."""
        ...

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Return uint8[len(indices), S, S, 3]."""
        ...


class Batch(NamedTuple):
    """A rank's share of a global batch of `size` images."""

    images: torch.Tensor  # uint8[B, S, S, 3], float32 after mixup
    labels: torch.Tensor  # int64[B], or the share of each class as float32[B, 2]
    size: int


def count_steps(num_images: int, batch_size: int) -> int:
    """Return the optimiser steps in an epoch: whole batches only, but at least one step."""
    return max(1, num_images // batch_size)


def to_device(array: np.ndarray, device: str) -> torch.Tensor:
    """Return an array as a tensor; the copy to a GPU overlaps with its work."""
    tensor = torch.from_numpy(array)
    return tensor if device == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


@dataclass
class Batches:
    """The batches of one rank."""

    images: Images
    config: TrainConfig
    augmentation: Augmentation
    device: str
    rank: int
    num_ranks: int

    def __post_init__(self) -> None:
        self.batch_size = min(self.config.batch_size, len(self.images.labels))
        self.steps_per_epoch = count_steps(len(self.images.labels), self.batch_size)

    def draw(self, epoch: int, start: int) -> Iterator[Batch]:
        """Yield the batches of an epoch from step `start` on, both counted from 0.

        Seeds torch for each step, so that dropout repeats too; each rank has its own seed.
        """
        rng = np.random.default_rng((self.config.seed, epoch))
        order = self.images.order_epoch(rng)
        mirrored = rng.random(len(order)) < self.augmentation.flip
        places = np.arange(self.rank, self.batch_size, self.num_ranks)
        for step in range(start, self.steps_per_epoch):
            batch = slice(step * self.batch_size, (step + 1) * self.batch_size)
            # Not (seed, epoch, step): numpy seeds (s, e, 0) as it does (s, e).
            step_rng = np.random.default_rng((self.config.seed, epoch, step + 1))
            draws = draw_augmentation(step_rng, mirrored[batch])
            images, labels = self._read(order[batch], draws, places)
            mix = draw_mix(step_rng, self.config, images.shape[1])
            if mix is not None:  # partners are read too: they may be another rank's
                others = self._read(order[batch], draws, self.batch_size - 1 - places)
                images = mix_images(images, others[0], mix)
                labels = mix_labels(labels, others[1], mix)
            torch.manual_seed(int(step_rng.integers(2**62)) + self.rank)
            yield Batch(images, labels, self.batch_size)

    def _read(
        self, batch: np.ndarray, draws: Draws, places: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return augmented images and labels at some places of a global batch."""
        indices = batch[places]
        images = to_device(self.images.read(indices), self.device)
        labels = to_device(self.images.labels[indices], self.device)
        return augment(images, self.augmentation, draws.take(places)), labels
