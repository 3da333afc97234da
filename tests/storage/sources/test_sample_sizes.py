"""The sizes of a few images, seen before a source is listed: the same ones on every machine."""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from s3_server import S3Server

from cifake_ray.config import ConvertConfig, ScoreConfig
from cifake_ray.pipeline import run_verb
from cifake_ray.storage.io.paths import resolve_path
from cifake_ray.storage.s3.client import S3Client
from cifake_ray.storage.s3.location import open_path
from cifake_ray.storage.sources import folder, sample_sizes
from cifake_ray.storage.sources.image_table import ImageTable
from cifake_ray.storage.sources.open_source import open_source

COUNT = 100


def sample(src: Path | str, **options: Any) -> list[tuple[int, int]]:
    config = ScoreConfig(src=str(src), out="/nowhere/out", **options)
    place = open_path(config.src, config.store)
    source = open_source(config, place, resolve_path(config.out))
    return sample_sizes.sample_sizes(source, place, config.src, list)


def encode(width: int, height: int, kind: str = "JPEG", **options: Any) -> bytes:
    data = io.BytesIO()
    noise = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(noise).save(data, kind, **options)
    return data.getvalue()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of images, each of another width, in folders below it."""
    root = tmp_path / "images"
    for number in range(COUNT):
        path = root / f"{number % 7}" / f"{number % 3}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(20 + number, 30))
    return root


def test_the_order_of_the_file_system_changes_nothing(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = sample(images)
    assert len(set(sizes)) == sample_sizes.NUM_SAMPLED
    scan = sample_sizes.scan_folder

    def shuffle(place: Path, below: str) -> Iterator[tuple[str, bool]]:
        entries = list(scan(place, below))
        random.Random(len(below)).shuffle(entries)
        yield from entries

    monkeypatch.setattr(sample_sizes, "scan_folder", shuffle)
    assert sample(images) == sizes
    monkeypatch.setattr(sample_sizes, "MAX_FOLDERS", 9)
    few = sample(images)
    assert 0 < len(few) < COUNT
    assert sample(images) == few
    monkeypatch.setattr(sample_sizes, "scan_folder", scan)
    assert sample(images) == few


def test_very_many_folders_are_looked_into_all_the_same(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_sizes, "MAX_NAMES", 5)  # fewer than folders at the top
    assert len(sample(images)) == sample_sizes.NUM_SAMPLED


def test_only_what_is_to_be_scored_is_looked_at(images: Path) -> None:
    (images / "big.png").write_bytes(encode(900, 40, "PNG"))
    (images / "notes.txt").write_text("no image")
    assert sample(images, include=("*.png",)) == [(900, 40)]
    assert (900, 40) not in sample(images, exclude=("*.png",))
    (images / "broken.png").write_text("no image")
    assert sample(images, include=("*.png",)) == [(900, 40)]
    (images / "big.png").unlink()
    assert sample(images, include=("*.png",)) == []


def test_a_link_out_of_the_folder_is_not_followed(images: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.gif").write_bytes(encode(77, 88, "GIF"))
    (images / "link.gif").symlink_to(tmp_path / "secret.gif")
    assert sample(images, include=("*.gif",)) == []
    assert sample(images, include=("*.gif",), follow_symlinks=True) == [(77, 88)]


def test_of_a_large_file_the_head_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "large.jpg").write_bytes(encode(1500, 1000, quality=95))
    many = encode(500, 400, icc_profile=b"x" * 100_000)  # the header begins behind the head
    (tmp_path / "late.jpg").write_bytes(many)
    reads: list[tuple[str, int | None]] = []
    read = folder.read_local_file

    def watch(path: str, size_bytes: int | None = None, *rest: Any) -> Any:
        reads.append((Path(path).name, size_bytes))
        return read(path, size_bytes, *rest)

    monkeypatch.setattr(folder, "read_local_file", watch)
    assert sorted(sample(tmp_path)) == [(500, 400), (1500, 1000)]
    head = sample_sizes.HEAD_BYTES
    assert sorted(reads) == [("large.jpg", head), ("late.jpg", head), ("late.jpg", len(many))]


def test_lists_tars_and_tables_are_looked_at_too(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = sorted(path.relative_to(images).as_posix() for path in images.rglob("*.jpg"))
    (images / "list.csv").write_text("path\n" + "\n".join(keys))
    assert len(set(sample(images / "list.csv"))) == sample_sizes.NUM_SAMPLED
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        for key in keys:
            tar.add(images / key, key)
    assert len(set(sample(tmp_path / "images.tar"))) == sample_sizes.NUM_SAMPLED
    run_verb(ConvertConfig(src=str(images), out=str(tmp_path / "out"), num_workers=0), 0.0)
    hold = ImageTable.hold_images
    monkeypatch.setattr(ImageTable, "hold_images", lambda *_: pytest.fail("an image was read"))
    sizes = sample(tmp_path / "out")
    assert len(set(sizes)) == sample_sizes.NUM_SAMPLED
    monkeypatch.setattr(ImageTable, "hold_images", hold)
    table = pq.read_table(tmp_path / "out" / "shards").select(["key", "image"])
    pq.write_table(table.replace_schema_metadata(None), tmp_path / "other.parquet")
    assert sample(tmp_path / "other.parquet") == sizes


def test_a_bucket_answers_with_few_requests(
    images: Path, s3_env: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = s3_env.make_bucket()
    s3_env.upload(bucket, images, "set/")
    s3_env.put(bucket, "set/late.jpg", encode(1500, 1000, quality=95))
    lengths: list[int | None] = []
    get = S3Client.get_object

    def watch(client: S3Client, *args: Any) -> bytes:
        data = get(client, *args)
        lengths.append(len(data))
        return data

    monkeypatch.setattr(S3Client, "get_object", watch)
    sizes = sample(f"s3://{bucket}/set/")
    assert len(set(sizes)) == len(lengths) == sample_sizes.NUM_SAMPLED
    assert sample(f"s3://{bucket}/set/") == sizes
    lengths.clear()
    assert sample(f"s3://{bucket}/set/", include=("late.jpg",)) == [(1500, 1000)]
    assert lengths == [sample_sizes.HEAD_BYTES]
