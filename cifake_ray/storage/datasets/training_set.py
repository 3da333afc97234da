"""Choose the training images of shards and read their pixels.

Pixels are decoded once per node into a memory-mapped file that all workers and trials share; when
that would be too large, encoded bytes are read and decoded as they are needed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
from collections import Counter, OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from cifake_ray.config import TrainConfig
from cifake_ray.core.imaging.decode import DECODE_POLICY, map_images
from cifake_ray.core.imaging.preprocessing import Preprocessing
from cifake_ray.core.labels import SPLIT_NAMES, parse_split, read_class_label
from cifake_ray.core.schema import FAKE, LABEL_NAMES, REAL
from cifake_ray.errors import ImageError, UsageError
from cifake_ray.storage.io.files import make_folder, stamp_file, write_json
from cifake_ray.storage.io.paths import AnyPath, explain_os_error, resolve_local, resolve_path
from cifake_ray.storage.sources.parquet import (
    find_tables,
    read_columns,
    read_label_names,
    read_row_group,
    use_table,
)

GROUP_SIZE = 8  # row groups that a streamed epoch shuffles together
DECODE_CHUNK = 64  # images a decoding thread takes at once


@dataclass(frozen=True)
class TrainingRows:
    """The labelled rows of the shards that train or validate; parallel arrays."""

    groups: list[tuple[AnyPath, int]]  # (file, row group)
    group: np.ndarray  # int32[N]: number of the row group
    row: np.ndarray  # int32[N]: row inside it
    label: np.ndarray  # int64[N]
    is_val: np.ndarray  # bool[N]

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
    groups: list[tuple[AnyPath, int]] = []
    parts: list[tuple[np.ndarray, ...]] = []
    for path in find_tables(root):
        with use_table(path) as table:
            for number in range(table.num_row_groups):
                columns = _read_group_rows(table, path, number, config)
                parts.append((np.full(len(columns[0]), len(groups), np.int32), *columns))
                groups.append((path, number))
    group, row, label, is_val = (np.concatenate(column) for column in zip(*parts, strict=True))
    rows = TrainingRows(groups, group, row, label, is_val)
    check_both_classes(rows, np.ones(len(label), bool), config)
    return rows


def check_both_classes(rows: TrainingRows, usable: np.ndarray, config: TrainConfig) -> None:
    """Raise UsageError when a class has no usable image to train or to validate on."""
    for name, side in (("training", ~rows.is_val), ("validation", rows.is_val)):
        for value in (REAL, FAKE):
            if not (rows.label[side & usable] == value).any():
                raise UsageError(
                    f"{config.shards}: no labelled {LABEL_NAMES[value]} image for {name} that"
                    " decodes; training takes the rows with split `train` or none (--val-fraction,"
                    " --val-split choose among them)"
                )


def _read_group_rows(
    table: Any, path: AnyPath, number: int, config: TrainConfig
) -> tuple[np.ndarray, ...]:
    """Return row, label and is_val of the usable rows of one row group."""
    names = table.schema_arrow.names
    hashed = "sha256" if "sha256" in names else "image"
    wanted = [n for n in ("label", "split", "error", hashed) if n in names]
    columns = read_columns(table, path, [number], wanted)
    num_rows = columns.num_rows
    class_names = read_label_names(table.schema_arrow)

    def values(name: str, default: Any = None) -> list[Any]:
        present = name in columns.column_names
        return columns.column(name).to_pylist() if present else [default] * num_rows

    file_split = SPLIT_NAMES.get(path.stem.split("-")[0].lower())
    chosen: list[tuple[int, int, bool]] = []
    cells = values("label"), values("split", file_split), values("error"), values(hashed)
    for row, (label, split, error, content) in enumerate(zip(*cells, strict=True)):
        try:
            label, split = read_class_label(label, class_names), parse_split(split)
        except ValueError as problem:
            raise UsageError(f"{path}: {problem}") from problem
        is_empty = content is None or (isinstance(content, dict) and not content["bytes"])
        if label is None or error is not None or is_empty:
            continue
        if config.val_split is not None and split == parse_split(config.val_split):
            chosen.append((row, label, True))
        elif split in (None, "train"):
            is_val = config.val_split is None and _is_val(content, config.val_fraction)
            chosen.append((row, label, is_val))
    row_, label_, is_val_ = zip(*chosen, strict=True) if chosen else ((), (), ())
    return np.array(row_, np.int32), np.array(label_, np.int64), np.array(is_val_, bool)


def _is_val(content: Any, fraction: float) -> bool:
    """Decide by the image's bytes, so that duplicates are never on both sides."""
    content = _get_bytes(content)
    digest = content if len(content) == 32 else hashlib.sha256(content).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _get_bytes(image: Any) -> Any:
    """Return the bytes of a value of the column `image`, a struct or plain bytes."""
    return image["bytes"] if isinstance(image, dict) else image


class Pixels(Protocol):
    """Decoded images by position in `TrainingRows`."""

    def read(self, positions: np.ndarray) -> np.ndarray: ...


class MappedPixels:
    """uint8[N, S, S, 3] in a memory-mapped file, which all processes of a node share."""

    def __init__(self, path: Path) -> None:
        self.array = np.load(path, mmap_mode="r")

    def read(self, positions: np.ndarray) -> np.ndarray:
        pixels: np.ndarray = self.array[positions]
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
            path, number = self.rows.groups[group]
            table = read_row_group(path, number, ["image"])
            self.loaded[group] = table.column("image")
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
    rows: TrainingRows, preprocessing: Preprocessing, config: TrainConfig, num_threads: int
) -> TrainingData:
    """Return the training data, decoded if need be by the first process of each node."""
    size_bytes = len(rows.label) * preprocessing.image_size**2 * 3
    fits = size_bytes <= config.cache_gb * 1e9
    folder = locate_cache(config.cache_dir)
    identity = json.dumps(
        [
            DECODE_POLICY,
            rows.hash_files(),
            rows.hash_rows(),
            preprocessing.image_size,
            preprocessing.fit,
        ]
    )
    key = hashlib.sha256(identity.encode()).hexdigest()[:32]
    make_folder(folder)
    with open(folder / f"{key}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        pixels_path, unusable_path = folder / f"{key}.npy", folder / f"{key}.json"
        if not unusable_path.exists() or (fits and not pixels_path.exists()):
            path = pixels_path if fits else None
            _decode_all(rows, preprocessing, num_threads, path, unusable_path)
    unusable = json.loads(unusable_path.read_bytes())["unusable"]
    usable = np.ones(len(rows.label), bool)
    usable[[int(position) for position in unusable]] = False
    pixels: Pixels = (
        MappedPixels(pixels_path) if fits else StreamedPixels(rows, preprocessing, num_threads)
    )
    check_both_classes(rows, usable, config)
    return TrainingData(
        train=_make_set(rows, pixels, usable & ~rows.is_val),
        val=_make_set(rows, pixels, usable & rows.is_val),
        unusable=dict(Counter(unusable.values())),
    )


def _make_set(rows: TrainingRows, pixels: Pixels, chosen: np.ndarray) -> ImageSet:
    positions = np.flatnonzero(chosen)
    return ImageSet(rows, pixels, positions, rows.label[positions])


def locate_cache(cache_dir: str | None) -> Path:
    """Return `--cache-dir`, else the user's cache folder."""
    if cache_dir is not None:
        return resolve_local(cache_dir, "--cache-dir")
    return resolve_local(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "cache") / "cifake_ray"


def _decode_all(
    rows: TrainingRows,
    preprocessing: Preprocessing,
    num_threads: int,
    pixels_path: Path | None,
    unusable_path: Path,
) -> None:
    """Decode every row once: write the pixels, if they fit, and which rows do not decode."""
    size = preprocessing.image_size
    unusable: dict[int, str] = {}
    with tempfile.NamedTemporaryFile(dir=unusable_path.parent, suffix=".writing") as temporary:
        try:
            shape = (len(rows.label) if pixels_path else 0, size, size, 3)
            array = np.lib.format.open_memmap(temporary.name, "w+", np.uint8, shape)
            # Writing to a sparse file on a full disk would kill the process: take the space first.
            os.posix_fallocate(temporary.fileno(), 0, os.stat(temporary.name).st_size)
            for position, pixels in _decode_rows(rows, preprocessing, num_threads):
                if isinstance(pixels, ImageError):
                    unusable[position] = pixels.error
                elif pixels_path:
                    array[position] = pixels
            array.flush()
            if pixels_path:
                os.link(temporary.name, pixels_path)
        except OSError as error:
            raise explain_os_error(error, unusable_path.parent) from error
    write_json(unusable_path, {"unusable": {str(p): error for p, error in unusable.items()}})


def _decode_rows(
    rows: TrainingRows, preprocessing: Preprocessing, num_threads: int
) -> Iterator[tuple[int, np.ndarray | ImageError]]:
    def decode(images: list[Any]) -> list[np.ndarray | ImageError]:
        return map_images(preprocessing.load_image, map(_get_bytes, images))

    starts = np.searchsorted(rows.group, np.arange(len(rows.groups) + 1))
    with ThreadPoolExecutor(num_threads) as threads:
        for group, (path, number) in enumerate(rows.groups):
            start, stop = int(starts[group]), int(starts[group + 1])
            if start == stop:
                continue
            table = read_row_group(path, number, ["image"])
            images = table.column("image").take(pa.array(rows.row[start:stop])).to_pylist()
            chunks = [images[i : i + DECODE_CHUNK] for i in range(0, len(images), DECODE_CHUNK)]
            yield from enumerate(chain.from_iterable(threads.map(decode, chunks)), start)
