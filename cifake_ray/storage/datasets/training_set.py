"""Choose the training images of shards and read their pixels.

Pixels are decoded once per node into a memory-mapped file that all workers and trials share; when
that would be too large, encoded bytes are read and decoded as they are needed. The file holds every
row of the shards, so it serves all trainings on them, whatever they take and however they validate.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from cifake_ray.config import TrainConfig
from cifake_ray.core.imaging.decode import DECODE_POLICY, map_images
from cifake_ray.core.imaging.preprocessing import Preprocessing
from cifake_ray.core.labels import LabelReader, parse_split
from cifake_ray.core.schema import FAKE, LABEL_NAMES, REAL
from cifake_ray.errors import ImageError, UsageError
from cifake_ray.storage.datasets.pixel_cache import PixelCache, locate_cache
from cifake_ray.storage.io.digest import stamp_file
from cifake_ray.storage.io.paths import AnyPath, resolve_path
from cifake_ray.storage.sources.columns import ColumnChoice
from cifake_ray.storage.sources.held_images import get_bytes
from cifake_ray.storage.sources.image_table import ImageTable
from cifake_ray.storage.sources.parquet import HINT_CONVERT, choose_columns, open_tables

GROUP_SIZE = 8  # row groups that a streamed epoch shuffles together
DECODE_CHUNK = 64  # images a decoding thread takes at once
LOG_INTERVAL_S = 5.0
USES = ("to train on", "to validate on", "left out")


@dataclass(frozen=True)
class TrainingRows:
    """The labelled rows of the shards that train or validate; parallel arrays."""

    groups: list[tuple[AnyPath, int]]  # (file, row group)
    group_rows: np.ndarray  # int64[G]: all rows of each row group
    group: np.ndarray  # int32[N]: number of the row group
    row: np.ndarray  # int32[N]: row inside it
    label: np.ndarray  # int64[N]
    is_val: np.ndarray  # bool[N]
    num_in_both: int = 0  # rows whose bytes are also those of a row with the other label
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)  # rows by use and split
    choice: ColumnChoice = ColumnChoice()  # noqa: RUF009 - frozen
    notes: tuple[str, ...] = ()  # how labels of others were read, for the user

    def __str__(self) -> str:
        return "; ".join(
            f"{sum(splits.values()):,} {use} ("
            + ", ".join(f"{n:,} {s}" if len(splits) > 1 else s for s, n in splits.items())
            + ")"
            for use in USES
            if (splits := {split: n for (u, split), n in self.counts.items() if u == use})
        )

    @property
    def slots(self) -> np.ndarray:
        """Return the position of each row among all rows of the files, int64[N]."""
        starts: np.ndarray = np.cumsum(self.group_rows) - self.group_rows
        slots: np.ndarray = starts[self.group] + self.row
        return slots

    def read_group(self, number: int) -> tuple[pa.ChunkedArray, list[str | None]]:
        """Read the images of a row group, and their errors."""
        path, group = self.groups[number]
        with ImageTable(path, path.name, self.choice) as table:
            images = table.read([group], [table.image]).column(table.image)
            return images, table.read_facts([group]).errors

    def hash_rows(self) -> str:
        """Return the sha256 of which rows train and validate, and their labels."""
        digest = hashlib.sha256()
        for column in (self.group, self.row, self.label, self.is_val):
            digest.update(column.tobytes())
        return digest.hexdigest()

    def hash_files(self) -> str:
        """Return a sha256 that changes when a file does."""
        digest = hashlib.sha256()
        for path in dict.fromkeys(path for path, _ in self.groups):
            digest.update(f"{path}|{stamp_file(path)}\n".encode())
        return digest.hexdigest()


def read_training_rows(config: TrainConfig) -> TrainingRows:
    """Find the training and validation rows. UsageError when either has none of a class."""
    root = resolve_path(config.shards, config.store)
    choice, left_out = choose_columns(root), Counter[str]()
    labels, is_foreign = LabelReader(choice.label, choice.class_names), False
    groups: list[tuple[AnyPath, int]] = []
    group_rows: list[int] = []
    parts: list[tuple[np.ndarray, ...]] = []
    counts: Counter[tuple[str, str]] = Counter()
    for table in open_tables(root, choice, left_out):
        is_foreign |= not table.is_ours
        for number in range(table.file.num_row_groups):
            columns = _read_group_rows(table, number, labels, config, counts)
            parts.append((np.full(len(columns[0]), len(groups), np.int32), *columns))
            groups.append((table.path, number))
            group_rows.append(table.file.metadata.row_group(number).num_rows)
    for source in config.exclude_source:
        if not counts[USES[2], f"of the source {source}"]:
            raise UsageError(f"--exclude-source {source}: {root} has no labelled image of it")
    group, row, label, is_val, digest = map(np.concatenate, zip(*parts, strict=True))
    in_both = np.intersect1d(digest[label == REAL], digest[label == FAKE])
    num_in_both = int(np.isin(digest, in_both).sum())
    labels.check(root, HINT_CONVERT)
    rows = TrainingRows(
        groups,
        np.array(group_rows),
        group,
        row,
        label,
        is_val,
        num_in_both,
        counts,
        choice,
        notes=(labels.describe(),) if is_foreign and labels.counts else (),
    )
    check_both_classes(rows, np.ones(len(label), bool), config)
    return rows


def check_both_classes(rows: TrainingRows, usable: np.ndarray, config: TrainConfig) -> None:
    """Raise UsageError when a class has no usable image to train or to validate on."""
    for name, side in (("training", ~rows.is_val), ("validation", rows.is_val)):
        for value in (REAL, FAKE):
            if not (rows.label[side & usable] == value).any():
                raise UsageError(
                    f"{config.shards}: no labelled {LABEL_NAMES[value]} image for {name} that"
                    f" decodes; of its rows, {rows}; training takes those with split `train` or"
                    " none (--val-fraction, --val-split choose among them); `convert` takes names"
                    " of classes by --real-name and --fake-name"
                    + "".join(f"; {note}" for note in rows.notes)
                )


def _read_group_rows(
    table: ImageTable,
    number: int,
    labels: LabelReader,
    config: TrainConfig,
    counts: Counter[tuple[str, str]],
) -> tuple[np.ndarray, ...]:
    """Return row, label, is_val and digest of the usable rows of one row group; count all rows."""
    has_hashes = table.is_ours and "sha256" in table.columns
    hashed = "sha256" if has_hashes else table.image
    contents = table.read([number], [hashed]).column(hashed).to_pylist()
    facts = table.read_facts([number])
    val_split = parse_split(config.val_split)
    chosen: list[tuple[int, int, bool, int]] = []
    understood = table.understand_labels(facts.labels, labels)
    cells = understood, facts.splits, facts.sources, facts.errors, contents
    for row, (label, split, source, error, content) in enumerate(zip(*cells, strict=True)):
        data = content if has_hashes else _get_bytes(content)
        name = f"of split {split}" if split else "without a split"
        if label is None or error is not None or not data:
            name = "with an error" if label is not None or error is not None else "without a label"
            counts[USES[2], name] += 1
            continue
        is_val = val_split is not None and split == val_split
        if not is_val and split not in (None, "train"):
            counts[USES[2], name] += 1
            continue
        if source in config.exclude_source:
            counts[USES[2], f"of the source {source}"] += 1
            continue
        digest = int.from_bytes((data if has_hashes else hashlib.sha256(data).digest())[:8], "big")
        # By the image's bytes, so that duplicates are never on both sides.
        if digest >= (1 - config.test_fraction) * 2**64:
            counts[USES[2], "for a test"] += 1
            continue
        is_val |= val_split is None and digest < config.val_fraction * 2**64
        counts[USES[is_val], name] += 1
        chosen.append((row, label, is_val, digest))
    types = (np.int32, np.int64, bool, np.uint64)
    lists = [list(column) for column in zip(*chosen, strict=True)] or [[]] * len(types)
    return tuple(np.array(column, kind) for column, kind in zip(lists, types, strict=True))


def _get_bytes(value: Any) -> bytes | None:
    """Return the encoded image in a value of a column of images, None when there is none."""
    try:
        return get_bytes(value)
    except ImageError:
        return None


class Pixels(Protocol):
    """Decoded images by position in `TrainingRows`."""

    def read(self, positions: np.ndarray) -> np.ndarray: ...


class MappedPixels:
    """Rows of the cache, which all processes of a node share."""

    def __init__(self, array: np.ndarray, slots: np.ndarray) -> None:
        self.array, self.slots = array, slots

    def read(self, positions: np.ndarray) -> np.ndarray:
        pixels: np.ndarray = self.array[self.slots[positions]]
        return pixels


class StreamedPixels:
    """Images decoded on demand; the encoded bytes of a few row groups stay in memory."""

    def __init__(self, rows: TrainingRows, preprocessing: Preprocessing, num_threads: int) -> None:
        self.rows = rows
        self.preprocessing = preprocessing
        self.threads = ThreadPoolExecutor(num_threads)
        self.loaded: OrderedDict[int, pa.ChunkedArray] = OrderedDict()

    def read(self, positions: np.ndarray) -> np.ndarray:
        groups = self.rows.group[positions]
        size = self.preprocessing.image_size
        pixels = np.empty((len(positions), size, size, 3), np.uint8)
        for group in dict.fromkeys(groups.tolist()):  # in the order of the batch: see order_epoch
            indices = np.flatnonzero(groups == group)
            images = self._load_group(group)
            data = [_get_bytes(images[int(r)].as_py()) for r in self.rows.row[positions[indices]]]
            decoded = self.threads.map(self.preprocessing.load_image, data)
            for index, image in zip(indices, decoded, strict=True):
                pixels[index] = image
        return pixels

    def _load_group(self, group: int) -> pa.ChunkedArray:
        if group not in self.loaded:
            self.loaded[group], _ = self.rows.read_group(group)
            while len(self.loaded) > GROUP_SIZE + 1:
                self.loaded.popitem(last=False)
        self.loaded.move_to_end(group)
        return self.loaded[group]


@dataclass
class ImageSet:
    """The training or validation images: `core.training.batches.Images`."""

    rows: TrainingRows
    pixels: Pixels
    positions: np.ndarray
    labels: np.ndarray

    def read(self, indices: np.ndarray) -> np.ndarray:
        return self.pixels.read(self.positions[indices])

    def order_epoch(self, rng: np.random.Generator) -> np.ndarray:
        """Return a permutation; when streaming, it stays within a few row groups at a time."""
        if isinstance(self.pixels, MappedPixels):
            return rng.permutation(len(self.positions))
        group = self.rows.group[self.positions]
        shuffled = rng.permutation(np.unique(group))
        return np.concatenate(
            [
                rng.permutation(np.flatnonzero(np.isin(group, shuffled[i : i + GROUP_SIZE])))
                for i in range(0, len(shuffled), GROUP_SIZE)
            ]
        )


@dataclass(frozen=True)
class TrainingData:
    train: ImageSet
    val: ImageSet
    unusable: dict[str, int]  # images that do not decode, by error class


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
    shape = (int(rows.group_rows.sum()), *(preprocessing.image_size,) * 2, 3)
    fits = math.prod(shape) <= config.cache_gb * 1e9
    identity = json.dumps(
        [
            *(DECODE_POLICY, rows.hash_files()),
            *(preprocessing.image_size, preprocessing.fit, preprocessing.jpeg_scale),
        ]
    )
    key = hashlib.sha256(identity.encode()).hexdigest()[:32]
    cache = PixelCache(locate_cache(config.cache_dir) / key, shape if fits else None)
    cache.fill(lambda: _decode_rows(rows, preprocessing, num_threads, log), log)
    (unusable, array), slots = cache.read(), rows.slots
    pixels: Pixels = (
        StreamedPixels(rows, preprocessing, num_threads)
        if array is None
        else MappedPixels(array, slots)
    )
    usable = ~np.isin(slots, list(unusable))
    check_both_classes(rows, usable, config)
    return TrainingData(
        train=_make_set(rows, pixels, usable & ~rows.is_val),
        val=_make_set(rows, pixels, usable & rows.is_val),
        unusable=dict(Counter(unusable[slot] for slot in slots[~usable])),
    )


def _make_set(rows: TrainingRows, pixels: Pixels, chosen: np.ndarray) -> ImageSet:
    positions = np.flatnonzero(chosen)
    return ImageSet(rows, pixels, positions, rows.label[positions])


def _decode_rows(
    rows: TrainingRows,
    preprocessing: Preprocessing,
    num_threads: int,
    log: Callable[[str], None],
) -> Iterator[tuple[int, np.ndarray | ImageError]]:
    """Yield slot and pixels of every row of the files that holds an image."""

    def decode(images: list[Any]) -> list[np.ndarray | ImageError]:
        return map_images(preprocessing.load_image, images)

    num_rows, logged_s = int(rows.group_rows.sum()), time.monotonic()
    starts = np.cumsum(rows.group_rows) - rows.group_rows
    with ThreadPoolExecutor(num_threads) as threads:
        for number, start in enumerate(starts.tolist()):
            column, errors = rows.read_group(number)
            cells = [_get_bytes(cell) for cell in column.to_pylist()]
            places = [  # an image with an error may kill its decoder
                n for n, error in enumerate(errors) if error is None and cells[n] is not None
            ]
            chunks = [places[i : i + DECODE_CHUNK] for i in range(0, len(places), DECODE_CHUNK)]
            images = threads.map(decode, ([cells[n] for n in chunk] for chunk in chunks))
            for place, image in zip(places, chain.from_iterable(images), strict=True):
                yield start + place, image
                if time.monotonic() - logged_s >= LOG_INTERVAL_S:
                    logged_s = time.monotonic()
                    num_done = start + place + 1
                    log(f"train: decoded {num_done:,} of {num_rows:,} images into the cache")
