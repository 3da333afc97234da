"""Training directly on Parquet files that other programs wrote."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cifake_ray.config import TrainConfig
from cifake_ray.core.imaging.preprocessing import Preprocessing
from cifake_ray.core.schema import FAKE, REAL
from cifake_ray.errors import StorageError, UsageError
from cifake_ray.storage.datasets.training_rows import TrainingRows, read_training_rows
from cifake_ray.storage.datasets.training_set import open_training_data
from cifake_ray.storage.sources.parquet import ParquetSource, choose_columns, find_splits

PREPROCESSING = Preprocessing(image_size=8, fit="resize", mean=(0.5,) * 3, std=(0.5,) * 3)
NUM_ROWS = 40
LABELS = [REAL, FAKE] * (NUM_ROWS // 2)


def make_image(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, names: tuple[str, ...] | None = None, **columns: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    features = {"label": {"names": names, "_type": "ClassLabel"}} if names else {}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table({"label": LABELS} | columns)
    pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=16)


def read_rows(folder: Path, **options: Any) -> TrainingRows:
    return read_training_rows(TrainConfig(shards=str(folder), run="run", **options))


@pytest.mark.parametrize(
    "names",
    [
        ("default/train/0000.parquet", "default/test/0000.parquet"),
        ("data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet"),
        ("train.parquet", "eval.parquet"),
        ("Training/a.parquet", "Testing/a.parquet"),
        ("a.parquet", "test_a.parquet"),
        ("data/train-00000-of-00001.parquet", "data/holdout-00000-of-00001.parquet"),
    ],
)
def test_training_takes_no_rows_of_another_split(tmp_path: Path, names: tuple[str, str]) -> None:
    for name in names:
        write(tmp_path / name, image=[make_image(value) for value in range(NUM_ROWS)])
    rows = read_rows(tmp_path)
    assert {path.relative_to(tmp_path).as_posix() for path, _ in rows.groups} == set(names)
    taken = {rows.groups[group][0].relative_to(tmp_path).as_posix() for group in rows.group}
    assert taken == {names[0]}
    assert len(rows.label) == NUM_ROWS
    assert (find_splits(tmp_path) - {"train"}).isdisjoint({"train", None})


@pytest.mark.parametrize("kind", ["struct", "binary", "raw"])
def test_images_are_read_from_a_column_of_any_name(tmp_path: Path, kind: str) -> None:
    images: list[Any] = [make_image(value) for value in range(NUM_ROWS)]
    if kind == "struct":
        images = [{"bytes": data, "path": None} for data in images]
    if kind == "raw":
        shape = {"origin": "", "height": 8, "width": 8, "nChannels": 3, "mode": 16}
        images = [shape | {"data": bytes([value] * 192)} for value in range(NUM_ROWS)]
    # A hash of others may be anything, and so may an error.
    others = {"sha256": ["0" * 64] * NUM_ROWS, "error": ["HTTP 404"] * NUM_ROWS}
    write(tmp_path / "a.parquet", img=[None, *images[1:]], **others)
    config = {"val_fraction": 0.4, "cache_dir": str(tmp_path / "cache")}
    for cache_gb in (8.0, 0.0):
        rows = read_rows(tmp_path, **config, cache_gb=cache_gb)
        data = open_training_data(
            rows, PREPROCESSING, TrainConfig(shards="s", run="r", **config, cache_gb=cache_gb), 1
        )
        read = {}
        for images_read in (data.train, data.val):
            pixels = images_read.read(np.arange(len(images_read.positions)))
            numbers = rows.row[images_read.positions] + 16 * rows.group[images_read.positions]
            read |= dict(zip(numbers.tolist(), pixels[:, 0, 0, 0].tolist(), strict=True))
        assert read == {value: value for value in range(1, NUM_ROWS)}
        assert len(data.val.positions) > 0


def test_what_labels_were_taken_for_is_told(tmp_path: Path) -> None:
    images = [make_image(value) for value in range(NUM_ROWS)]
    write(tmp_path / "a.parquet", image=images, label=[0, 1, 2, -1] * 10)
    rows = read_rows(tmp_path)
    assert len(rows.label) == 20
    (note,) = rows.notes
    for told in ("10 REAL ('0')", "10 FAKE ('1')", "10 unknown ('2')", "10 without"):
        assert told in note


def test_names_that_mean_nothing_are_told_with_the_remedy(tmp_path: Path) -> None:
    images = [make_image(value) for value in range(NUM_ROWS)]
    write(tmp_path / "a.parquet", ("cat", "nature"), image=images)
    told = r"20 unknown \('cat'\).*--fake-name.*`cifake-ray convert` has these options"
    with pytest.raises(UsageError, match=told):
        read_rows(tmp_path)
    source = ParquetSource(tmp_path, choose_columns(tmp_path), labelled=True)
    with pytest.raises(UsageError, match=told):
        list(source.list_images().batches)


def test_paths_in_place_of_images_are_refused_with_the_remedy(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", image=["a.png"] * NUM_ROWS)
    for read in (read_rows, choose_columns):
        with pytest.raises(UsageError, match=r"'image' holds paths.*convert"):
            read(tmp_path)


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", text=["a.png"] * NUM_ROWS)
    with pytest.raises(
        StorageError, match=r"no column with images, only label .*, text \(string\)"
    ):
        read_rows(tmp_path)
