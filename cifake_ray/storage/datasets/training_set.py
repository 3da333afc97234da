"""Choose the training images of shards and read their pixels.

Pixels are decoded once per node into a memory-mapped file that all workers and trials share; when
that would be too large, encoded bytes are read and decoded as they are needed
(`streamed_pixels.py`). The file holds every row of the shards, so it serves all trainings on them,
whatever they take and however they validate.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from typing import Any, Protocol

import numpy as np

from cifake_ray.config import TrainConfig
from cifake_ray.core.imaging.decode import DECODE_POLICY, map_images
from cifake_ray.core.imaging.preprocessing import Preprocessing
from cifake_ray.core.training.lanes import choose_num_lanes, order_lanes
from cifake_ray.core.training.native_crops import MAX_WHOLE_PIXELS, NativeImage, load_native
from cifake_ray.errors import UsageError
from cifake_ray.storage.datasets.native_cache import NativeCache
from cifake_ray.storage.datasets.pixel_cache import DecodedCache, PixelCache, locate_cache
from cifake_ray.storage.datasets.streamed_pixels import Load, StreamedPixels
from cifake_ray.storage.datasets.training_rows import (
    TrainingRows,
    check_usable,
    read_bytes_of,
)

DECODE_CHUNK = 64  # images a decoding thread takes at once
NATIVE_CHUNK = 4  # of any size, so that few are in memory
LOG_INTERVAL_S = 5.0


class Pixels(Protocol):
    """Decoded images by position in `TrainingRows`."""

    def read(self, positions: np.ndarray) -> np.ndarray:
        """Return uint8[len(positions), S, S, 3] of images that have been made to fit."""
        ...

    def map(self, positions: np.ndarray, cut: Callable[[Any, int], np.ndarray]) -> list[np.ndarray]:
        """Return what `cut` makes of each image and its place in `positions`."""
        ...


class MappedPixels:
    """Rows of the cache, which all processes of a node share."""

    def __init__(self, array: Any, slots: np.ndarray) -> None:
        """`array` is a numpy array or a `NativeArray`."""
        self.array, self.slots = array, slots

    def read(self, positions: np.ndarray) -> np.ndarray:
        pixels: np.ndarray = self.array[self.slots[positions]]
        return pixels

    def map(self, positions: np.ndarray, cut: Callable[[Any, int], np.ndarray]) -> list[np.ndarray]:
        return [cut(self.array[slot], n) for n, slot in enumerate(self.slots[positions].tolist())]


@dataclass
class ImageSet:
    """The training or validation images: `core.training.batches.Images`, and `CropImages`."""

    rows: TrainingRows
    pixels: Pixels
    positions: np.ndarray
    labels: np.ndarray
    preprocessing: Preprocessing
    twin_of: np.ndarray | None = None  # int64[N]: the image that each is a twin of, else -1
    source: np.ndarray | None = None  # int32[N]: number of each's source, with --balance-sources

    def read(self, indices: np.ndarray) -> np.ndarray:
        return self.pixels.read(self.positions[indices])

    def map_native(
        self, indices: np.ndarray, cut: Callable[[NativeImage, int], np.ndarray]
    ) -> list[np.ndarray]:
        return self.pixels.map(self.positions[indices], cut)

    @cached_property
    def group(self) -> np.ndarray:
        """The row group of each image, int32[N], sorted."""
        group: np.ndarray = self.rows.group[self.positions]
        return group

    @cached_property
    def num_lanes(self) -> int | None:
        """The lanes in which streamed images are read; None when all are decoded."""
        if isinstance(self.pixels, MappedPixels):
            return None
        parts = [self.group]
        if self.source is not None:  # most may be drawn from the one with the largest row groups
            parts = [self.group[self.source == number] for number in np.unique(self.source)]
        mean_bytes = max(float(self.rows.group_bytes[np.unique(part)].mean()) for part in parts)
        return choose_num_lanes(len(np.unique(self.group)), mean_bytes)

    def order_epoch(self, rng: np.random.Generator) -> np.ndarray:
        """Return a permutation, of streamed images by lanes."""
        if self.num_lanes is None:
            return rng.permutation(len(self.positions))
        return order_lanes(self.group, self.labels, self.num_lanes, rng)

    def expect(self, indices: np.ndarray) -> None:
        """Read streamed images ahead, each once, in about this order."""
        if isinstance(self.pixels, StreamedPixels):
            self.pixels.expect(self.positions[indices])

    def count_usable(self, errors: dict[int, str]) -> int:
        """Return the number of images that are not known to fail to decode."""
        return len(self.positions) - int(np.isin(self.positions, list(errors)).sum())


@dataclass(frozen=True)
class TrainingData:
    train: ImageSet
    val: ImageSet
    # Of images that do not decode, by position in `TrainingRows`; when streaming, those met so far.
    errors: dict[int, str]

    @property
    def unusable(self) -> dict[str, int]:
        """The number of images that do not decode, by error class."""
        return dict(Counter(self.errors.values()))


def open_training_data(
    rows: TrainingRows,
    preprocessing: Preprocessing,
    config: TrainConfig,
    num_threads: int,
    log: Callable[[str], None] = lambda message: None,
) -> TrainingData:
    """Return the training data, decoded if need be by the first process of each node.

    CacheError when the folder for decoded images cannot be used.
    """
    num_rows, size = int(rows.group_rows.sum()), preprocessing.image_size
    is_native = preprocessing.fit == "crops"
    identity = [
        *(DECODE_POLICY, rows.hash_files()),
        *(size, preprocessing.fit, preprocessing.jpeg_scale),
        *((preprocessing.num_crops, MAX_WHOLE_PIXELS) if is_native else ()),
    ]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
    path, max_bytes = locate_cache(config.cache_dir) / key, int(config.cache_gb * 1e9)
    about = f"{num_rows:,} images of {config.shards}, {preprocessing.fit} at {size} pixels"
    array, unusable = None, dict[int, str]()  # by number among all rows of the files
    if is_native:
        load: Load = partial(load_native, preprocessing=preprocessing)
        cache: DecodedCache | None = NativeCache(path, about, max_bytes, num_rows, size)
    else:
        load, shape = preprocessing.load_image, (num_rows, size, size, 3)
        cache = PixelCache(path, about, max_bytes, shape) if math.prod(shape) <= max_bytes else None
    if cache is not None:
        chunk = NATIVE_CHUNK if is_native else DECODE_CHUNK
        cache.fill(lambda: _decode_rows(rows, load, chunk, num_threads, log), log)
        unusable, array = cache.read()
    if array is None and rows.twin_of is not None:
        raise UsageError(
            f"--twins: images and twins, decoded, are more than --cache-gb {config.cache_gb:g}, and"
            " pairs cannot be streamed; raise it"
        )
    slots = rows.slots
    if array is None:
        errors, usable = dict[int, str](), np.ones(len(slots), bool)
        pixels: Pixels = StreamedPixels(rows, load, num_threads, errors)
    else:
        pixels, usable = MappedPixels(array, slots), ~np.isin(slots, list(unusable))
        errors = {n: unusable[int(slots[n])] for n in np.flatnonzero(~usable).tolist()}
        if rows.twin_of is not None:  # a twin alone tells styles, not traces
            usable &= (rows.twin_of < 0) | usable[rows.twin_of]
        check_usable(rows, usable, config)
    make_set = partial(_make_set, rows, pixels, preprocessing)
    return TrainingData(
        train=make_set(usable & ~rows.is_val), val=make_set(usable & rows.is_val), errors=errors
    )


def _make_set(
    rows: TrainingRows, pixels: Pixels, preprocessing: Preprocessing, chosen: np.ndarray
) -> ImageSet:
    positions, twin_of = np.flatnonzero(chosen), rows.twin_of
    if twin_of is not None:
        places = np.cumsum(chosen) - 1  # of each row in the set
        twin_of = np.where(twin_of >= 0, places[twin_of], -1)[positions]
    source = None if rows.source is None else rows.source[positions]
    label = rows.label[positions]
    return ImageSet(rows, pixels, positions, label, preprocessing, twin_of, source)


def _decode_rows(
    rows: TrainingRows,
    load: Load,
    chunk_size: int,
    num_threads: int,
    log: Callable[[str], None],
) -> Iterator[tuple[int, Any]]:
    """Yield slot and pixels, or the ImageError, of every row of the files that holds an image."""

    def decode(images: list[Any]) -> list[Any]:
        return map_images(load, images)

    num_rows, logged_s = int(rows.group_rows.sum()), time.monotonic()
    starts = np.cumsum(rows.group_rows) - rows.group_rows
    with ThreadPoolExecutor(num_threads) as threads:
        for number, start in enumerate(starts.tolist()):
            cells = [read_bytes_of(cell) for cell in rows.read_group(number).to_pylist()]
            errors = rows.read_errors(number)
            places = [  # an image with an error may kill its decoder
                n for n, error in enumerate(errors) if error is None and cells[n] is not None
            ]
            for some in _split(places, 2 * num_threads * chunk_size):  # so many are in memory
                chunks = ([cells[n] for n in chunk] for chunk in _split(some, chunk_size))
                images = chain.from_iterable(threads.map(decode, chunks))
                for place, image in zip(some, images, strict=True):
                    yield start + place, image
                    if time.monotonic() - logged_s >= LOG_INTERVAL_S:
                        logged_s = time.monotonic()
                        num_done = start + place + 1
                        log(f"train: decoded {num_done:,} of {num_rows:,} images into the cache")


def _split(places: list[int], size: int) -> list[list[int]]:
    return [places[i : i + size] for i in range(0, len(places), size)]
