"""The domain of a detector comes from the images that trained it, and from no others."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cifake_ray.config import TrainConfig
from cifake_ray.core.imaging.preprocessing import Preprocessing
from cifake_ray.core.imaging.training_domain import ANY_SIDE, TrainingDomain
from cifake_ray.core.processing.convert import ConvertProcessor
from cifake_ray.core.schema import FAKE, MANIFEST_FIELDS, REAL
from cifake_ray.storage.datasets.domain import read_domain, read_typical_side
from cifake_ray.storage.datasets.training_rows import read_training_rows
from cifake_ray.storage.datasets.training_set import ImageSet, open_training_data
from cifake_ray.storage.runs.shards import FOOTER_KEY

PREPROCESSING = Preprocessing(image_size=8, fit="resize", mean=(0.5,) * 3, std=(0.5,) * 3)


def make_image(size: tuple[int, int], format: str, seed: int, quality: int = 75) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, quality=quality)
    return buffer.getvalue()


TRAIN = [
    make_image((40, 30), "JPEG", 0, quality=60),
    make_image((20, 200), "PNG", 1),
    make_image((50, 50), "JPEG", 2, quality=90),
]
OTHERS = {
    "broken": make_image((500, 500), "WEBP", 3)[:9000],  # its header is whole
    "text": b"words",
    "unlabelled": make_image((4, 4), "GIF", 4),
    "test": make_image((6, 6), "BMP", 5),
}


def write_shards(path: Path, metadata: dict[bytes, bytes] | None) -> None:
    """Two row groups, as convert would write them but for the footer."""
    rows = [("train", label, image) for label in (REAL, FAKE) for image in TRAIN]
    rows += [("val", label, make_image((700, 7), "PNG", 6)) for label in (REAL, FAKE)]
    rows += [
        ("test" if name == "test" else "train", None if name == "unlabelled" else REAL, image)
        for name, image in OTHERS.items()
    ]
    manifest = pa.table(
        {
            "key": [str(number) for number in range(len(rows))],
            "split": [split for split, _, _ in rows],
            "label": pa.array([label for _, label, _ in rows], pa.int64()),
            "source": pa.nulls(len(rows), pa.string()),
        }
    )
    assert set(manifest.column_names) < {field.name for field in MANIFEST_FIELDS}
    shards = ConvertProcessor().finish(manifest, [image for _, _, image in rows])
    pq.write_table(shards.replace_schema_metadata(metadata), path, row_group_size=7)


def open_images(path: Path, cache: Path) -> ImageSet:
    config = TrainConfig(shards=str(path), run="run", val_split="val", cache_dir=str(cache))
    return open_training_data(read_training_rows(config), PREPROCESSING, config, 1).train


def test_it_is_that_of_the_images_that_train(tmp_path: Path) -> None:
    write_shards(tmp_path / "a.parquet", {FOOTER_KEY: b"{}"})
    images = open_images(tmp_path, tmp_path / "cache")
    assert len(images.positions) == 6
    assert read_domain(images, PREPROCESSING) == TrainingDomain(
        sides=(20, 200), formats=("JPEG", "PNG"), jpeg_qualities=(60, 90)
    )


@pytest.mark.parametrize(("crop_size", "least"), [(8, 8), (20, 20), (64, 20)])
def test_of_crops_any_image_that_is_not_padded_more_than_in_training_is_alike(
    tmp_path: Path, crop_size: int, least: int
) -> None:
    write_shards(tmp_path / "a.parquet", {FOOTER_KEY: b"{}"})
    images = open_images(tmp_path, tmp_path / "cache")
    crops = replace(PREPROCESSING, image_size=crop_size, fit="crops", num_crops=4)
    assert read_domain(images, crops) == TrainingDomain(
        sides=(least, ANY_SIDE), formats=("JPEG", "PNG"), jpeg_qualities=(60, 90)
    )


def test_the_typical_side_is_the_median_of_the_first_rows(tmp_path: Path) -> None:
    write_shards(tmp_path / "a.parquet", {FOOTER_KEY: b"{}"})
    assert read_typical_side(open_images(tmp_path, tmp_path / "cache").rows) == 30
    write_shards(tmp_path / "a.parquet", None)
    assert read_typical_side(open_images(tmp_path, tmp_path / "cache").rows) is None


@pytest.mark.parametrize("metadata", [None, {b"huggingface": b"{}"}])
def test_it_is_not_known_where_another_program_wrote_the_columns(
    tmp_path: Path, metadata: dict[bytes, bytes] | None
) -> None:
    write_shards(tmp_path / "a.parquet", {FOOTER_KEY: b"{}"})
    write_shards(tmp_path / "b.parquet", metadata)
    assert read_domain(open_images(tmp_path, tmp_path / "cache"), PREPROCESSING) is None
