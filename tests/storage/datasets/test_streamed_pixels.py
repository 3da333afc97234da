"""Streamed images: every row group is fetched once by all ranks, and trains as from the cache."""

from __future__ import annotations

import io
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import nn

from cifake_ray.config import POLICIES, TrainConfig
from cifake_ray.core.imaging.preprocessing import Preprocessing
from cifake_ray.core.models.detector import HALF, Detector
from cifake_ray.core.schema import FOOTER_KEY
from cifake_ray.core.training.batches import Batches
from cifake_ray.core.training.device_limits import choose_precision
from cifake_ray.core.training.trainer import Trainer
from cifake_ray.errors import StorageError, UsageError
from cifake_ray.storage.datasets import streamed_pixels
from cifake_ray.storage.datasets.streamed_pixels import StreamedPixels
from cifake_ray.storage.datasets.training_rows import TrainingRows, read_training_rows
from cifake_ray.storage.datasets.training_set import TrainingData, open_training_data

SIZE = 8
PREPROCESSING = Preprocessing(image_size=SIZE, fit="resize", mean=HALF, std=HALF)
CROPS = replace(PREPROCESSING, fit="crops", num_crops=2)
EQUAL = [24] * 16


def make_image(number: int, label: int) -> bytes:
    """An image that tells its number: noise, lighter if it is FAKE."""
    pixels = np.random.default_rng(number).integers(0, 160, (SIZE, SIZE, 3)) + 60 * label
    pixels[0, 0] = number % 200, number // 200, label
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_shards(folder: Path, counts: list[int], broken: dict[int, bytes] | None = None) -> Path:
    """Row groups of some rows, two a file; every fourth image validates."""
    folder.mkdir()
    labels = np.random.default_rng(0).integers(0, 2, sum(counts)).tolist()
    rows = [
        {
            "label": label,
            "split": "val" if number % 4 == 3 else "train",
            "source": "rare" if number < 60 else "web" if number % 7 else "camera",
            "error": None,
            "image": {"bytes": (broken or {}).get(number, make_image(number, label))},
        }
        for number, label in enumerate(labels)
    ]
    table, start = pa.Table.from_pylist(rows).replace_schema_metadata({FOOTER_KEY: b"{}"}), 0
    for file in range(0, len(counts), 2):
        with pq.ParquetWriter(folder / f"{file:03}.parquet", table.schema) as writer:
            for count in counts[file : file + 2]:
                writer.write_table(table.slice(start, count), row_group_size=count)
                start += count
    return folder


def make_config(shards: Path, **options: Any) -> TrainConfig:
    values = {"cache_gb": 0.0, "val_split": "val", "batch_size": 16, **options}
    return TrainConfig(
        shards=str(shards), run="r", cache_dir=str(shards.parent / "cache"), **values
    )


def open_data(config: TrainConfig) -> TrainingData:
    preprocessing = CROPS if config.fit == "crops" else PREPROCESSING
    return open_training_data(read_training_rows(config), preprocessing, config, 2)


class Fetches:
    """Counts how often each row group is read."""

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()
        self.lock = threading.Lock()
        self.read = TrainingRows.read_group

    def __call__(self, rows: TrainingRows, number: int) -> pa.ChunkedArray:
        with self.lock:
            self.counts[number] += 1
        return self.read(rows, number)


@pytest.fixture
def fetches(monkeypatch: pytest.MonkeyPatch) -> Fetches:
    counter = Fetches()
    monkeypatch.setattr(TrainingRows, "read_group", lambda *given: counter(*given))
    return counter


def make_batches(data: TrainingData, config: TrainConfig, rank: int, num_ranks: int) -> Batches:
    return Batches(data.train, config, POLICIES["flip"], "cpu", rank, num_ranks)


class Flat(nn.Module):
    """Sees each image alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(SIZE * SIZE * 3, 2))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.layers(images)
        return found


def make_trainer(data: TrainingData, config: TrainConfig, rank: int = 0, of: int = 1) -> Trainer:
    torch.manual_seed(0)
    detector = Detector("flat", Flat(), PREPROCESSING)
    precision = choose_precision("cpu", "float32")
    trainer = Trainer(detector, detector, config, data.train, data.val, precision)
    trainer.rank = trainer.batches.rank = rank
    trainer.num_ranks = trainer.batches.num_ranks = of
    return trainer


@pytest.mark.parametrize("options", [{}, {"mixup": 0.5}, {"mixup": 0.5, "cutmix": 1.0}])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_ranks_fetch_each_row_group_once_in_all(
    tmp_path: Path, fetches: Fetches, num_ranks: int, options: dict[str, float]
) -> None:
    config = make_config(write_shards(tmp_path / "shards", EQUAL), batch_size=32, **options)
    for rank in range(num_ranks):  # each reads as a process of its own
        for _ in make_batches(open_data(config), config, rank, num_ranks).draw(0, 0):
            pass
    assert fetches.counts == dict.fromkeys(range(16), 1)


def test_partners_of_other_ranks_are_read_from_the_same_fetch(
    tmp_path: Path, fetches: Fetches
) -> None:
    """Three ranks share all lanes, and mix images of each other."""
    config = make_config(write_shards(tmp_path / "shards", EQUAL), batch_size=32, mixup=0.5)
    for rank in range(3):
        for _ in make_batches(open_data(config), config, rank, 3).draw(0, 0):
            pass
    assert fetches.counts == dict.fromkeys(range(16), 3)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_ranks_validate_each_row_group_once_in_all(
    tmp_path: Path, fetches: Fetches, num_ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(write_shards(tmp_path / "shards", [24, 8, 40, 4, 16, 32, 20, 48, 8]))
    monkeypatch.setattr("torch.distributed.broadcast", lambda *_: None)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda *_: None)
    parts = []
    for rank in range(num_ranks):
        data = open_data(config)
        parts.append(make_trainer(data, config, rank, num_ranks).predict(data.val))
    assert fetches.counts == dict.fromkeys(range(9), 1)
    whole = make_trainer(data, config).predict(data.val)
    assert torch.allclose(sum(parts), whole, atol=1e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("balance", "options"), [(0.5, {}), (1.0, {"fit": "crops", "crops_per_image": 2})]
)
def test_balanced_draws_are_those_of_the_cache_and_fetch_once(
    tmp_path: Path, fetches: Fetches, balance: float, options: dict[str, Any]
) -> None:
    """Of row groups of all sizes, one source of which is in few of them."""
    counts = np.random.default_rng(5).integers(4, 60, 30).tolist()
    config = make_config(
        write_shards(tmp_path / "shards", counts), balance_sources=balance, **options
    )
    cached = open_data(replace(config, cache_gb=1.0))
    for epoch in range(2):
        orders = [
            make_batches(data, config, 0, 1)._order(np.random.default_rng((config.seed, epoch)))
            for data in (cached, open_data(config))
        ]
        assert np.array_equal(*map(np.sort, orders))
        num_drawn = len(np.unique(cached.train.group[orders[0]]))
        for num_ranks in (1, 2, 4):
            fetches.counts.clear()
            for rank in range(num_ranks):
                for _ in make_batches(open_data(config), config, rank, num_ranks).draw(epoch, 0):
                    pass
            assert fetches.counts.total() <= num_drawn + 2 * (num_ranks - 1)


def test_row_groups_of_all_sizes_are_hardly_read_twice(tmp_path: Path, fetches: Fetches) -> None:
    counts = np.random.default_rng(5).integers(4, 60, 30).tolist()
    config = make_config(write_shards(tmp_path / "shards", counts), mixup=0.2)
    for num_ranks in (1, 2, 4):
        fetches.counts.clear()
        for rank in range(num_ranks):
            for _ in make_batches(open_data(config), config, rank, num_ranks).draw(0, 0):
                pass
        assert 29 <= fetches.counts.total() <= 30 + 2 * (num_ranks - 1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mixup": 0.5},
        {"fit": "crops", "crops_per_image": 2},
        {"balance_sources": 0.7},
        {"balance_sources": 1.0, "fit": "crops", "crops_per_image": 2, "mixup": 0.5},
    ],
)
@pytest.mark.parametrize("num_ranks", [2, 4, 3])
def test_ranks_make_the_batches_of_one(
    tmp_path: Path, options: dict[str, Any], num_ranks: int
) -> None:
    """Also from the middle of an epoch on, and of a batch that is not divided evenly."""
    shards = write_shards(tmp_path / "shards", [24, 8, 40, 4, 16, 32, 20, 48, 8])
    config = make_config(shards, batch_size=22, **options)
    data = open_data(config)
    whole = list(make_batches(data, config, 0, 1).draw(0, 0))
    for start in (0, 3):
        ranks = (make_batches(data, config, r, num_ranks) for r in range(num_ranks))
        drawn = [list(batches.draw(0, start)) for batches in ranks]
        for step, shares in enumerate(zip(*drawn, strict=True), start):
            found = [image.numpy().tobytes() for share in shares for image in share.images]
            assert sorted(found) == sorted(i.numpy().tobytes() for i in whole[step].images)
            assert {len(share.labels) for share in shares} <= {22 // num_ranks, -(-22 // num_ranks)}
    assert len(whole) == len(data.train.labels) * config.crops_per_image // 22


@pytest.mark.parametrize("options", [{}, {"mixup": 0.3}, {"balance_sources": 0.5}])
def test_losses_are_those_of_the_cache(
    tmp_path: Path, options: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = write_shards(tmp_path / "shards", [24, 8, 40, 4, 16, 32, 20, 48, 8])
    histories = []
    streamed = open_data(make_config(shards, **options))
    for cache_gb in (0.0, 1.0):
        config = make_config(shards, cache_gb=cache_gb, epochs=3, lr=0.01, **options)
        data = open_data(config)
        assert (data.train.num_lanes is None) == bool(cache_gb)
        trainer = make_trainer(data, config)
        if cache_gb:
            like = make_trainer(streamed, config).batches
            monkeypatch.setattr(trainer.batches, "_order", like._order)
            monkeypatch.setattr(trainer.batches, "_pair_places", like._pair_places)
        trainer.fit(lambda: None)
        histories.append([(r["train_loss"], r["val_loss"]) for r in trainer.state.history])
    assert np.abs(np.subtract(*histories)).max() < 1e-5
    assert histories[0][2][0] < histories[0][0][0]


def test_row_groups_are_fetched_ahead_within_bounds(
    tmp_path: Path, fetches: Fetches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of their first use; what has been read is let go."""
    data = open_data(make_config(write_shards(tmp_path / "shards", EQUAL)))
    pixels, rows = data.train.pixels, data.train.rows
    assert isinstance(pixels, StreamedPixels)
    monkeypatch.setattr(streamed_pixels, "AHEAD_BYTES", int(3.5 * rows.group_bytes.mean()))
    data.train.expect(np.arange(len(data.train.labels)))
    pixels.fetchers.shutdown(wait=True)
    assert fetches.counts == dict.fromkeys(range(3), 1)
    for bound in (0, 1):  # one row group at least
        data = open_data(make_config(tmp_path / "shards"))
        monkeypatch.setattr(streamed_pixels, "AHEAD_BYTES", bound)
        pixels = data.train.pixels
        assert isinstance(pixels, StreamedPixels)
        data.train.expect(np.arange(len(data.train.labels)))
        for index in range(0, len(data.train.labels), 6):
            data.train.read(np.arange(index, index + 6))
            held = [f for each in pixels.fetches.values() for f in each if f.images is not None]
            assert len(held) <= 2
    assert not any(pixels.fetches.values())


def test_a_batch_over_the_gap_of_a_row_group_leaves_nothing_behind(
    tmp_path: Path, fetches: Fetches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads what the later fetch of the row group was meant for."""
    monkeypatch.setattr(streamed_pixels, "MAX_GAP", 20)
    data = open_data(make_config(write_shards(tmp_path / "shards", EQUAL)))
    pixels = data.train.pixels
    assert isinstance(pixels, StreamedPixels)
    first, rest = np.arange(18), np.arange(18, len(data.train.labels))
    order = np.concatenate([first[:9], rest[:90], first[9:], rest[90:]])
    for batch_size in (9, 60, 100, 120):
        data.train.expect(order)
        for start in range(0, len(order), batch_size):
            data.train.read(order[start : start + batch_size])
        assert not any(pixels.fetches.values())
        assert pixels.ahead_bytes == 0
    assert fetches.counts[0] <= 2 * 4


def test_memory_is_bounded_while_row_groups_are_read_twice(
    tmp_path: Path, fetches: Fetches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two crops of each image; threads prepare several batches at once, in any order."""
    monkeypatch.setattr(streamed_pixels, "MAX_GAP", 40)
    monkeypatch.setattr("cifake_ray.core.training.lanes.MAX_LANES", 8)
    monkeypatch.setattr("torch.get_num_threads", lambda: 4)
    shards = write_shards(tmp_path / "shards", [24] * 40)
    config = make_config(shards, fit="crops", crops_per_image=2, batch_size=64)
    data = open_data(config)
    pixels, rows = data.train.pixels, data.train.rows
    assert isinstance(pixels, StreamedPixels)
    assert data.train.num_lanes == 8
    sizes = rows.group_bytes
    monkeypatch.setattr(streamed_pixels, "AHEAD_BYTES", int(2 * sizes.mean()))
    # One row group a lane, two where one ends, more for what the threads are ahead.
    most_bytes = (2 * 8 + 5 * 64 // 18 + 2) * sizes.mean()
    for epoch in range(4):
        for _ in make_batches(data, config, 0, 1).draw(epoch, 0):
            with pixels.lock:
                held = [f for each in pixels.fetches.values() for f in each if f.images]
            assert sum(int(sizes[fetch.group]) for fetch in held) <= most_bytes
        assert not any(pixels.fetches.values())
        assert pixels.ahead_bytes == 0


def test_what_was_not_expected_is_read_too(tmp_path: Path, fetches: Fetches) -> None:
    data = open_data(make_config(write_shards(tmp_path / "shards", EQUAL)))
    one = data.train.read(np.array([5, 200, 6]))
    assert np.array_equal(data.train.read(np.array([5, 200, 6])), one)
    data.train.expect(np.array([5, 200, 6]))
    assert np.array_equal(data.train.read(np.array([5, 200, 6])), one)
    assert fetches.counts == {0: 3, 11: 3}


@pytest.fixture
def broken(tmp_path: Path) -> TrainingData:
    """Images 4 (to train on), 30 and 31 (31 validates) do not decode."""
    images = {4: b"no image", 30: make_image(30, 1)[:-40], 31: b"none"}
    return open_data(make_config(write_shards(tmp_path / "shards", EQUAL, images)))


def test_an_image_that_does_not_decode_is_counted_and_replaced_by_its_like(
    broken: TrainingData,
) -> None:
    assert broken.unusable == {}, "nothing is decoded before"
    for images in (broken.train, broken.val):
        pixels = images.read(np.arange(len(images.labels)))
        assert pixels[:, 0, 0, 2].tolist() == images.labels.tolist()
        numbers = pixels[:, 0, 0, 0] + 200 * pixels[:, 0, 0, 1].astype(int)
        replaced = np.flatnonzero(numbers != images.positions)
        assert np.array_equal(
            images.rows.group[images.positions[replaced]], numbers[replaced] // 24
        )
        assert ((numbers % 4 == 3) == (images is broken.val)).all(), "never of the other side"
    assert broken.unusable == {"not_an_image": 2, "truncated": 1}
    assert broken.errors.keys() == {4, 30, 31}
    assert broken.train.count_usable(broken.errors) == len(broken.train.labels) - 2
    assert broken.val.count_usable(broken.errors) == len(broken.val.labels) - 1


def test_the_same_image_takes_its_place_whoever_reads_it(broken: TrainingData) -> None:
    index = int(np.flatnonzero(broken.train.positions == 30)[0])
    first = broken.train.read(np.array([index]))
    again = broken.train.read(np.arange(len(broken.train.labels)))[index]
    assert np.array_equal(first[0], again)


def test_a_row_group_without_any_image_is_named(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", EQUAL, dict.fromkeys(range(24), b"no image"))
    data = open_data(make_config(shards))
    with pytest.raises(StorageError, match=r"000.parquet: no \w+ image of row group 0 decodes"):
        data.train.read(np.arange(4))


def test_balanced_sources_with_large_row_groups_have_fewer_lanes(tmp_path: Path) -> None:
    """Most of what is drawn may be of them, so of these as many as fit the memory are open."""
    shards = write_shards(tmp_path / "shards", EQUAL)
    for balance, wanted in ((None, 16), (1.0, 8)):
        train = open_data(make_config(shards, balance_sources=balance)).train
        size_bytes = np.where(np.arange(16) < 3, 256 << 20, 1 << 20)  # those of the source `rare`
        train.rows = replace(train.rows, group_bytes=size_bytes)
        assert train.num_lanes == wanted


@pytest.mark.parametrize("cache_gb", [0.0, 1.0])
def test_a_training_goes_on_with_the_same_images_only(tmp_path: Path, cache_gb: float) -> None:
    """Images that do not decode are known before the first epoch only if all are decoded."""
    shards = write_shards(tmp_path / "shards", EQUAL, {4: b"no image"})
    config = make_config(shards, cache_gb=cache_gb)
    checkpoint = make_trainer(open_data(config), config).to_checkpoint()
    make_trainer(open_data(config), config).resume(checkpoint)
    other = replace(config, cache_gb=1.0 - cache_gb)
    with pytest.raises(UsageError, match="resume with --cache-gb as before"):
        make_trainer(open_data(other), other).resume(checkpoint)


def test_an_epoch_that_has_begun_goes_on_in_its_own_order_only(tmp_path: Path) -> None:
    config = make_config(write_shards(tmp_path / "shards", EQUAL))
    checkpoint = make_trainer(open_data(config), config).to_checkpoint()
    cached = replace(config, cache_gb=1.0)
    other = make_trainer(open_data(cached), cached)
    other.resume(checkpoint)
    checkpoint["state"]["batch"] = 1
    with pytest.raises(UsageError, match="resume with --cache-gb as before"):
        other.resume(checkpoint)
    del checkpoint["num_lanes"]  # of an earlier version
    other.resume(checkpoint)
