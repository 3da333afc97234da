"""train on Parquet files that do not say the digests of their images: all are read, but once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_train_here import make_images, run_train, write_shards

from cifake_ray.config import TrainConfig
from cifake_ray.errors import StorageError
from cifake_ray.stages.train import driver
from cifake_ray.stages.train.prepare import prepare_training
from cifake_ray.storage.sources.image_table import ImageTable

FOREIGN_BYTES = sum(len(data) for data, *_ in make_images())


class ImageBytes:
    """Counts the bytes of the images that are read, before a training would begin."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.total, read = 0, ImageTable.read

        def count(table: ImageTable, groups: list[int], columns: list[str]) -> pa.Table:
            rows = read(table, groups, columns)
            if "image" in columns:
                self.total += sum(len(image["bytes"]) for image in rows.column("image").to_pylist())
            return rows

        def end(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(ImageTable, "read", count)
        monkeypatch.setattr(driver, "train_rank", end)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "shards", make_images())


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> ImageBytes:
    return ImageBytes(monkeypatch)


def test_the_driver_all_ranks_and_a_resumed_run_read_the_images_once(
    shards: Path, tmp_path: Path, counted: ImageBytes
) -> None:
    options = {"val_split": None, "val_fraction": 0.3, "test_fraction": 0.1}
    with pytest.raises(KeyboardInterrupt):
        run_train(shards, tmp_path / "run", **options)
    config = TrainConfig(shards=str(shards), run=str(tmp_path / "run"), **options)  # type: ignore[arg-type]
    rows = {prepare_training(config).rows_hash for _ in range(4)}
    with pytest.raises(KeyboardInterrupt):
        run_train(shards, tmp_path / "run", **options)
    assert counted.total == FOREIGN_BYTES
    alone = TrainConfig(shards=str(shards), run=str(tmp_path / "other"), **options)  # type: ignore[arg-type]
    assert rows == {prepare_training(alone).rows_hash}


def test_a_file_that_changed_is_read_again(
    shards: Path, tmp_path: Path, counted: ImageBytes
) -> None:
    config = TrainConfig(shards=str(shards), run=str(tmp_path / "run"), val_split="val")
    with pytest.raises(KeyboardInterrupt):
        run_train(shards, tmp_path / "run")
    before = prepare_training(config).rows
    images = make_images()
    write_shards(shards, [(b"", *images[0][1:]), *images[1:]])
    after = prepare_training(config).rows
    assert counted.total == 2 * FOREIGN_BYTES - len(images[0][0])
    assert len(after.label) == len(before.label) - 1


def test_kept_digests_that_are_damaged_are_told_with_the_remedy(
    shards: Path, tmp_path: Path, counted: ImageBytes
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_train(shards, tmp_path / "run")
    path = tmp_path / "run" / "digests.parquet"
    data = bytearray(path.read_bytes())
    other = pa.BufferOutputStream()
    pq.write_table(pa.table({"file": ["a"], "digest": [1.5]}), other)
    flipped = data[:40] + bytes([data[40] ^ 1]) + data[41:]
    for damaged in (data[:100], flipped, b"", other.getvalue().to_pybytes()):
        path.write_bytes(damaged)
        with pytest.raises(StorageError, match=r"digests.parquet: damaged .*; delete it"):
            run_train(shards, tmp_path / "run")


def test_digests_of_another_number_of_rows_are_not_used(
    shards: Path, tmp_path: Path, counted: ImageBytes
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_train(shards, tmp_path / "run")
    path = tmp_path / "run" / "digests.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)
    with pytest.raises(KeyboardInterrupt):
        run_train(shards, tmp_path / "run")
    assert counted.total == 2 * FOREIGN_BYTES
