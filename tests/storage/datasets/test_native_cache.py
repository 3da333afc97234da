"""The cache of native pixels: the same crops as from a stream, bounded, and never half-written."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cifake_ray.config import POLICIES, TrainConfig
from cifake_ray.core.imaging.preprocessing import Preprocessing
from cifake_ray.core.schema import FOOTER_KEY
from cifake_ray.core.training import native_crops
from cifake_ray.core.training.batches import Batches
from cifake_ray.core.training.validation import read_scored
from cifake_ray.errors import CacheError
from cifake_ray.storage.datasets import training_set
from cifake_ray.storage.datasets.training_rows import read_training_rows
from cifake_ray.storage.datasets.training_set import TrainingData, open_training_data

PREPROCESSING = Preprocessing(
    image_size=16, fit="crops", num_crops=3, mean=(0.5,) * 3, std=(0.5,) * 3
)
SIDES = [(40, 60), (9, 9), (90, 100), (16, 16), (7, 80), (50, 30)]  # one is too large to keep whole


def encode_image(height: int, width: int, seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def small_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_crops, "WINDOW_SIDE", 40)
    monkeypatch.setattr(native_crops, "MAX_WHOLE_PIXELS", 4 * 40**2)


@pytest.fixture
def images() -> list[bytes]:
    return [encode_image(*SIDES[n % 6], n) for n in range(24)]


@pytest.fixture
def shards(tmp_path: Path, images: list[bytes]) -> Path:
    """24 images of six sizes, the last third for validation, and one that does not decode."""
    rows: list[dict[str, Any]] = [
        {"label": n % 2, "split": "val" if n >= 16 else "train", "image": {"bytes": image}}
        for n, image in enumerate(images)
    ]
    rows.insert(4, {"label": 1, "split": "train", "image": {"bytes": b"no image"}})
    table = pa.Table.from_pylist([{**row, "error": None} for row in rows])
    folder = tmp_path / "shards"
    folder.mkdir()
    table = table.replace_schema_metadata({FOOTER_KEY: b"{}"})
    pq.write_table(table, folder / "a.parquet", row_group_size=5)
    return folder


def make_config(shards: Path, cache: Path, **options: Any) -> TrainConfig:
    return TrainConfig(
        **{"shards": str(shards), "run": "r", "cache_dir": str(cache), "val_split": "val"}
        | {"fit": "crops", "batch_size": 4}
        | options
    )


def open_data(config: TrainConfig) -> TrainingData:
    return open_training_data(read_training_rows(config), PREPROCESSING, config, 2)


def read_crops(data: TrainingData) -> list[list[bytes]]:
    """The scored crops of each image of validation."""
    scored = read_scored(data.val, PREPROCESSING, np.arange(len(data.val.labels)))
    assert scored.num_crops is not None
    ends = np.cumsum(scored.num_crops)
    crops = np.split(scored.pixels, ends[:-1])
    return [[crop.tobytes() for crop in each] for each in crops]


@pytest.mark.parametrize("cache_gb", [1.0, 0.0])
def test_validation_scores_what_scoring_scores(
    shards: Path, tmp_path: Path, images: list[bytes], cache_gb: float
) -> None:
    data = open_data(make_config(shards, tmp_path / "cache", cache_gb=cache_gb))
    expected = [PREPROCESSING.load_image(image) for image in images[16:]]
    assert read_crops(data) == [[crop.tobytes() for crop in each] for each in expected]
    assert {len(each) for each in expected} == {1, 3}
    data.train.map_native(np.arange(len(data.train.labels)), lambda image, _: image.windows[0])
    assert data.unusable == {"not_an_image": 1}
    kept = list((tmp_path / "cache").glob("*.native"))
    assert len(kept) == (1 if cache_gb else 0)


def fail(data: bytes, preprocessing: Preprocessing) -> None:
    raise AssertionError("decoded again")


def test_a_crop_costs_no_decoding(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(shards, tmp_path / "cache", crops_per_image=3)
    open_data(config)
    monkeypatch.setattr(training_set, "load_native", fail)
    data = open_data(config)
    batches = Batches(data.train, config, POLICIES["wild"], "cpu", 0, 1)
    assert len(list(batches.draw(0, 0))) == 12
    assert len(read_crops(data)) == 8


def order_like(images: np.ndarray) -> Callable[[np.random.Generator], np.ndarray]:
    return lambda rng: images[rng.permutation(16)]


def test_a_stream_of_the_files_gives_the_crops_of_the_cache(shards: Path, tmp_path: Path) -> None:
    """Their order differs, and an image that does not decode is left out of the cache only."""
    drawn = []
    for cache_gb in (1.0, 0.0):
        config = make_config(shards, tmp_path / "cache", cache_gb=cache_gb)
        data = open_data(config)
        usable = np.delete(np.arange(17), 4) if cache_gb == 0 else np.arange(16)
        data.train.order_epoch = order_like(usable)  # type: ignore[method-assign]
        batches = Batches(data.train, config, POLICIES["wild"], "cpu", 0, 1)
        drawn.append([batch.images.numpy() for batch in batches.draw(0, 0)])
    assert np.array_equal(drawn[0], drawn[1])


def test_the_file_is_bounded_and_a_higher_bound_makes_it(shards: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    whole = read_crops(open_data(make_config(shards, cache)))
    (path,) = cache.glob("*.native")
    size_gb = path.stat().st_size / 1e9
    data = open_data(make_config(shards, cache, cache_gb=0.9 * size_gb))
    assert isinstance(data.val.pixels, training_set.StreamedPixels), "larger than it may be"
    for file in cache.iterdir():
        file.unlink()
    for share, is_kept in ((0.9, False), (0.5, False), (0.9, False), (1.1, True)):
        data = open_data(make_config(shards, cache, cache_gb=share * size_gb))
        assert read_crops(data) == whole
        assert bool(list(cache.glob("*.native"))) == is_kept
        assert not list(cache.glob("*.writing"))


def test_a_bit_that_has_changed_is_noticed(shards: Path, tmp_path: Path) -> None:
    config = make_config(shards, tmp_path / "cache")
    open_data(config)
    (path,) = (tmp_path / "cache").glob("*.native")
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(CacheError, match="damaged"):
        open_data(config)


def test_damaged_facts_of_it_are_said(shards: Path, tmp_path: Path) -> None:
    config = make_config(shards, tmp_path / "cache")
    open_data(config)
    (path,) = (tmp_path / "cache").glob("*.json")
    for text in ("[]", "{", json.dumps({"over_bytes": "x"})):
        path.write_text(text)
        with pytest.raises(CacheError, match="damaged"):
            open_data(config)
