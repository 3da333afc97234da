"""Draw the batches of each rank: its share of a global batch, augmented and mixed.

They follow from the seed, the epoch and the step alone, so that a killed run can resume.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol, cast

import numpy as np
import torch

from cifake_ray.config import Augmentation, TrainConfig
from cifake_ray.core.imaging.preprocessing import Preprocessing
from cifake_ray.core.training.augmentation import Draws, degrade, draw_augmentation, mirror
from cifake_ray.core.training.lanes import order_lanes, pair_lanes
from cifake_ray.core.training.mixup import draw_mix, mix_images, mix_labels
from cifake_ray.core.training.native_crops import NativeImage, cut_random_crop
from cifake_ray.core.training.pairs import count_coupled, draw_couples, draw_shared_couples
from cifake_ray.core.training.sampling import draw_both_classes, draw_by_source

AHEAD_BYTES = 1 << 30  # of batches that wait for a GPU, in its memory


class Images(Protocol):
    """Decoded, labelled images by number, for several threads."""

    labels: np.ndarray  # int64[N], REAL or FAKE

    def order_epoch(self, rng: np.random.Generator) -> np.ndarray:
        """Return int64[N], a new permutation in which reading is cheap."""
        ...

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Return uint8[len(indices), S, S, 3]."""
        ...


class CropImages(Images, Protocol):
    """Images of which crops are cut, `--fit crops`."""

    preprocessing: Preprocessing

    def map_native(
        self, indices: np.ndarray, cut: Callable[[NativeImage, int], np.ndarray]
    ) -> list[np.ndarray]:
        """Return what `cut` makes of each image and its place in `indices`."""
        ...


class StreamedImages(Images, Protocol):
    """Images that are read in row groups, in lanes: see `lanes.py`."""

    group: np.ndarray  # int32[N], sorted
    num_lanes: int

    def expect(self, indices: np.ndarray) -> None:
        """Read ahead images that will be read, each once, in about this order."""
        ...


def find_streamed(images: Images) -> StreamedImages | None:
    """Return images that are streamed, None for others."""
    is_streamed = getattr(images, "num_lanes", None) is not None
    return cast(StreamedImages, images) if is_streamed else None


class Batch(NamedTuple):
    """A rank's share of a global batch of `size` images."""

    images: torch.Tensor  # uint8[B, S, S, 3], float32 after mixup
    labels: torch.Tensor  # int64[B], or the share of each class as float32[B, 2]
    size: int
    clean: torch.Tensor | None = None  # the images before they were degraded, for --consistency


def count_steps(num_images: int, batch_size: int) -> int:
    """Return the optimiser steps in an epoch: whole batches only, but at least one step."""
    return max(1, num_images // batch_size)


def to_device(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """Return a tensor on a device; the copy to a GPU overlaps with its work."""
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
        self.streamed = find_streamed(self.images)
        self.twin_of: np.ndarray | None = getattr(self.images, "twin_of", None)
        per_epoch = len(self.images.labels)
        if self.twin_of is not None:
            per_epoch = count_coupled(self.twin_of)
        self.images_per_epoch = per_epoch * self.config.crops_per_image
        self.batch_size = min(self.config.batch_size, self.images_per_epoch)
        self.steps_per_epoch = count_steps(self.images_per_epoch, self.batch_size)

    def draw(self, epoch: int, start: int) -> Iterator[Batch]:
        """Yield the batches of an epoch from step `start` on, both counted from 0.

        Seeds torch for each step, so that dropout repeats too; each rank has its own seed.
        """
        rng = np.random.default_rng((self.config.seed, epoch))
        order = self._order(rng)
        mirrored = rng.random(len(order)) < self.augmentation.flip

        def prepare(step: int) -> tuple[Batch, int]:
            batch = slice(step * self.batch_size, (step + 1) * self.batch_size)
            # Not (seed, epoch, step): numpy seeds (s, e, 0) as it does (s, e).
            step_rng = np.random.default_rng((self.config.seed, epoch, step + 1))
            draws = self._share(draw_augmentation(step_rng, mirrored[batch]), order[batch])
            places = self._choose_places(step)
            images, labels, clean = self._read(order[batch], draws, places)
            mix = draw_mix(step_rng, self.config, images.shape[1])
            if mix is not None:
                partners = self._pair_places(step)[places]
                if np.isin(partners, places).all():
                    own = np.searchsorted(places, partners)
                    others = images[own], labels[own], None if clean is None else clean[own]
                else:  # some are another rank's
                    others = self._read(order[batch], draws, partners)
                images = mix_images(images, others[0], mix)
                labels = mix_labels(labels, others[1], mix)
                if clean is not None and others[2] is not None:
                    clean = mix_images(clean, others[2], mix)
            seed = int(step_rng.integers(2**62)) + self.rank
            return Batch(images, labels, self.batch_size, clean), seed

        if self.streamed is not None:
            steps = range(start, self.steps_per_epoch)
            parts = [step * self.batch_size + self._list_read(step) for step in steps]
            self.streamed.expect(order[np.concatenate(parts)] if parts else order[:0])
        for batch, seed in self._map_ahead(prepare, range(start, self.steps_per_epoch)):
            torch.manual_seed(seed)
            yield batch

    def _choose_places(self, step: int) -> np.ndarray:
        """Return this rank's places in the global batch of a step, sorted."""
        if self.twin_of is not None:  # whole couples
            couples = np.arange(self.rank, self.batch_size // 2, self.num_ranks)
            return (2 * couples[:, None] + [0, 1]).ravel()
        first = (self.rank - step * self.batch_size) % self.num_ranks  # as lanes are dealt
        return np.arange(first, self.batch_size, self.num_ranks)

    def _pair_places(self, step: int) -> np.ndarray:
        """Return the place that each is mixed with, in the global batch of a step."""
        if self.streamed is None:
            return np.arange(self.batch_size)[::-1]
        return pair_lanes(step * self.batch_size, self.batch_size, self.streamed.num_lanes)

    def _list_read(self, step: int) -> np.ndarray:
        """Return the places that this rank reads: its own, and partners if some are another's."""
        places = self._choose_places(step)
        if self.config.mixup or self.config.cutmix:
            partners = self._pair_places(step)[places]
            if not np.isin(partners, places).all():
                return np.concatenate([places, partners])
        return places

    def _map_ahead(
        self, prepare: Callable[[int], tuple[Batch, int]], steps: range
    ) -> Iterator[tuple[Batch, int]]:
        """Yield what `prepare` makes of each step.

        Threads prepare the next ones for a GPU, and of streamed images, which wait for a store.
        """
        is_ready = self.device == "cpu" and self.streamed is None
        if is_ready or not steps:  # a CPU trains with all threads itself
            yield from map(prepare, steps)
            return
        first = prepare(steps[0])
        num_ahead = min(torch.get_num_threads(), 1 + AHEAD_BYTES // first[0].images.nbytes)
        ahead: deque[Future[tuple[Batch, int]]] = deque()
        threads = ThreadPoolExecutor(num_ahead, initializer=torch.set_num_threads, initargs=(1,))
        try:
            ahead.extend(threads.submit(prepare, step) for step in steps[1 : 1 + num_ahead])
            yield first
            for step in steps[1 + num_ahead :]:
                ahead.append(threads.submit(prepare, step))
                yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            threads.shutdown(cancel_futures=True)

    def _order(self, rng: np.random.Generator) -> np.ndarray:
        """Return the images of an epoch, int64[images_per_epoch], with twins couple by couple."""
        if self.config.balance_sources is None and self.config.twin_share is None:
            return np.concatenate([self._pass(rng) for _ in range(self.config.crops_per_image)])
        labels, share = self.images.labels, self.config.twin_share
        source: np.ndarray | None = getattr(self.images, "source", None)
        draw = partial(
            draw_by_source,
            source=np.zeros(len(labels), np.int32) if source is None else source,
            balance=self.config.balance_sources or 0.0,
            rng=rng,
        )
        if share is None or self.twin_of is None:
            drawn = draw_both_classes(labels, self.images_per_epoch, draw, rng)
            if self.streamed is None:
                return drawn
            group, num_lanes = self.streamed.group[drawn], self.streamed.num_lanes
            order: np.ndarray = drawn[order_lanes(group, labels[drawn], num_lanes, rng)]
            return order
        num_couples = self.images_per_epoch // 2
        return draw_shared_couples(labels, self.twin_of, num_couples, share, draw, rng)

    def _pass(self, rng: np.random.Generator) -> np.ndarray:
        order = self.images.order_epoch(rng)
        return order if self.twin_of is None else draw_couples(order, self.twin_of, rng)

    def _share(self, draws: Draws, batch: np.ndarray) -> Draws:
        """Give a twin the draws of its image, which is in the place before it."""
        if self.twin_of is None:
            return draws
        owner = np.arange(len(batch))
        owner[1::2] -= self.twin_of[batch[1::2]] == batch[::2]
        return draws.take(owner)

    def _read(
        self, batch: np.ndarray, draws: Draws, places: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return augmented images, labels and clean images at some places of a global batch."""
        indices, taken = batch[places], draws.take(places)
        if self.config.fit == "crops":
            pixels = self._cut(cast(CropImages, self.images), indices, taken)
        else:
            pixels = self.images.read(indices)
        clean = mirror(torch.from_numpy(pixels), self.augmentation, taken)
        images = degrade(clean, self.augmentation, taken)
        labels = torch.from_numpy(self.images.labels[indices])
        return (
            to_device(images, self.device),
            to_device(labels, self.device),
            to_device(clean, self.device) if self.config.consistency else None,
        )

    def _cut(self, images: CropImages, indices: np.ndarray, draws: Draws) -> np.ndarray:
        size = self.config.train_size or images.preprocessing.image_size

        def cut(image: NativeImage, place: int) -> np.ndarray:
            u = {name: float(values[place]) for name, values in draws.uniform.items()}
            return cut_random_crop(image, size, self.augmentation, u)

        return np.stack(images.map_native(indices, cut))
