"""convert: every key once, bytes untouched, the same rows however it is run."""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cifake_ray.config import ConvertConfig
from cifake_ray.core.schema import SHARD_FIELDS
from cifake_ray.errors import NothingToDo, ResourceError, RunMismatch, StorageError
from cifake_ray.pipeline import run_verb
from cifake_ray.stages.batch.summary import BatchSummary, Progress
from cifake_ray.stages.convert import convert_images
from cifake_ray.storage.runs.shards import SEAL_KEY

pytestmark = pytest.mark.usefixtures("ray_cluster")

ODD_NAMES = [
    "_leading.jpg",
    ".hidden.jpg",
    "two  spaces.jpg",
    "per%20cent.jpg",
    "hash#tag.jpg",
    "question?.jpg",
    "plus+and&.jpg",
    "nfc-\u00e9.jpg",
    "nfd-e\u0301.jpg",
    "single'quote.jpg",
    'double"quote.jpg',
    "new\nline.jpg",
    "back\\slash.jpg",
    "no-extension",
    "[glob]*.jpg",
    "{brace}.jpg",
    "\u202eright-to-left.jpg",
    "l" * 246 + ".jpg",
]


def run_convert(src: Path, out: Path, **options: Any) -> BatchSummary:
    progress: list[Progress] = []
    config = ConvertConfig(src=str(src), out=str(out), **options)
    summary = convert_images(config, src, out, progress.append, time.monotonic())
    assert isinstance(summary, BatchSummary)
    assert summary.listed == summary.done + summary.failed
    return summary


def read_rows(out: Path) -> dict[str, dict[str, Any]]:
    rows = pq.read_table(out / "shards").to_pylist()
    keyed = {row["key"]: row for row in rows}
    assert len(keyed) == len(rows), "a key stands twice"
    return keyed


def encode(mode: str = "RGB", kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (32, 32), 128 if mode == "L" else None).save(buffer, kind)
    return buffer.getvalue()


def make_broken_files() -> dict[str, bytes]:
    jpeg, png = encode(), encode(kind="PNG")
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    return {
        "empty.jpg": b"",
        "text.jpg": b"this is no picture at all, only words\n" * 5,
        "page.jpg": b"<!DOCTYPE html><html><body>404</body></html>",
        "json.jpg": b'{"error": "denied"}',
        "bomb.png": bomb.getvalue(),
        "pcx.jpg": encode(kind="PCX"),
        "ppm.jpg": encode(kind="PPM"),
        "eps.jpg": encode(kind="EPS"),
        "tga.tga": encode(kind="TGA"),
        "zeros.jpg": bytes(1000),
        "ones.jpg": b"\xff" * 1000,
        "soi-only.jpg": b"\xff\xd8",
        "header-cut.jpg": jpeg[:60],
        "signature-only.png": png[:8],
        "header-cut.png": png[:20],
        "gif-cut.gif": b"GIF89a",
        "riff.webp": b"RIFF\x10\x00\x00\x00WEBP",
        "zip.jpg": b"PK\x03\x04" + bytes(100),
        "pdf.jpg": b"%PDF-1.7\n" + bytes(100),
        "utf16.jpg": "text".encode("utf-16") * 50,
    }


@pytest.mark.smoke
def test_bytes_are_kept_and_facts_are_true(sample_folder: Path, shards: Path) -> None:
    rows = read_rows(shards)
    files = [path for path in sample_folder.rglob("*") if path.is_file()]
    assert len(rows) == len(files)
    for path in files:
        row = rows[path.relative_to(sample_folder).as_posix()]
        data = path.read_bytes()
        assert row["image"]["bytes"] == data
        assert row["sha256"] == hashlib.sha256(data).digest()
        assert (row["width"], row["height"], row["format"]) == (32, 32, "JPEG")
        split, label = path.relative_to(sample_folder).parts[:2]
        assert (row["split"], row["label"]) == (split, {"REAL": 0, "FAKE": 1}[label])


def test_shards_have_the_promised_schema(shards: Path) -> None:
    for path in (shards / "shards").iterdir():
        assert pq.read_schema(path).remove_metadata() == pa.schema(SHARD_FIELDS)


def test_hugging_face_datasets_shows_images_and_class_names(shards: Path, tmp_path: Path) -> None:
    data = datasets.load_dataset(
        "parquet",
        data_files=str(shards / "shards" / "*.parquet"),
        split="train",
        cache_dir=str(tmp_path),
    )
    assert data.features["label"].names == ["REAL", "FAKE"]
    image = data[0]["image"]
    assert image.size == (32, 32)
    assert np.asarray(image).shape == (32, 32, 3)


def test_odd_names_and_broken_files_get_one_row_each(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ODD_NAMES:
        (source / name).write_bytes(encode())
    broken = make_broken_files()
    for name, data in broken.items():
        (source / name).write_bytes(data)
    (source / os.fsdecode(b"not-utf8-\xff.jpg")).write_bytes(encode())

    summary = run_convert(source, tmp_path / "out")
    rows = read_rows(tmp_path / "out")

    assert len(ODD_NAMES) == 18
    assert len(broken) == 20
    assert rows.keys() == {*ODD_NAMES, *broken, "not-utf8-\\xff.jpg"}
    for name in ODD_NAMES:
        assert rows[name]["error"] is None
        assert rows[name]["image"]["bytes"] == encode()
    for name in broken:
        assert rows[name]["error"] is not None, name
        assert rows[name]["error_detail"], name
        assert rows[name]["image"]["bytes"] == broken[name], "broken bytes are kept too"
    assert rows["empty.jpg"]["error"] == "empty"
    assert rows["bomb.png"]["error"] == "too_many_pixels"
    assert rows["text.jpg"]["error"] == "not_an_image"
    assert rows["pcx.jpg"]["error"] == "format_not_allowed"
    assert rows["not-utf8-\\xff.jpg"]["error"] == "bad_key"
    assert summary.failed == 21
    assert summary.exit_code(0.01) == 3
    assert summary.exit_code(0.6) == 0


def test_one_worker_and_two_workers_give_the_same_rows(
    sample_folder: Path, shards: Path, tmp_path: Path
) -> None:
    run_convert(sample_folder, tmp_path / "one", shard_size=16, num_workers=1)
    for path in sorted((shards / "shards").iterdir()):
        assert pq.read_table(path) == pq.read_table(tmp_path / "one" / "shards" / path.name)


def test_missing_shards_are_made_again_and_only_those(sample_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = run_convert(sample_folder, out, shard_size=16)
    undisturbed = read_rows(out)
    (out / "_SUCCESS").unlink()
    (out / "shards" / "part-00001.parquet").unlink()
    kept = (out / "shards" / "part-00000.parquet").stat().st_mtime_ns
    second = run_convert(sample_folder, out, shard_size=16)
    assert second.shards_total == first.shards_total
    assert second.shards_resumed == first.shards_total - 1
    assert (out / "shards" / "part-00000.parquet").stat().st_mtime_ns == kept
    assert read_rows(out) == undisturbed


def test_a_finished_run_is_not_listed_again_and_says_so(
    sample_folder: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.jpg").write_bytes(encode())
    first = run_convert(source, tmp_path / "out")
    (source / "b.jpg").write_bytes(encode())
    assert run_convert(source, tmp_path / "out") == first
    log: list[str] = []
    config = ConvertConfig(src=str(source), out=str(tmp_path / "out"))
    convert_images(config, source, tmp_path / "out", print, time.monotonic(), log.append)
    assert any("the source was not looked at again: give a new output" in line for line in log)


def test_other_settings_are_refused_with_the_difference(
    sample_folder: Path, tmp_path: Path
) -> None:
    run_convert(sample_folder, tmp_path / "out", shard_size=16)
    with pytest.raises(RunMismatch, match="shard_size: 16 there, 17 here"):
        run_convert(sample_folder, tmp_path / "out", shard_size=17)


def test_a_file_changed_after_the_listing_becomes_a_row(
    sample_folder: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("changed.jpg", "gone.jpg", "same.jpg"):
        (source / name).write_bytes(encode())
    out = tmp_path / "out"
    run_convert(source, out)
    (out / "_SUCCESS").unlink()
    (out / "shards" / "part-00000.parquet").unlink()
    (source / "changed.jpg").write_bytes(encode("L"))
    (source / "gone.jpg").unlink()
    summary = run_convert(source, out)
    assert summary.errors == {"changed": 1, "not_found": 1}
    assert {key: row["error"] for key, row in read_rows(out).items()} == {
        "changed.jpg": "changed",
        "gone.jpg": "not_found",
        "same.jpg": None,
    }


def test_success_adds_up_and_names_every_file(shards: Path) -> None:
    success = json.loads((shards / "_SUCCESS").read_text())
    files = pq.read_table(shards / "_files.parquet").to_pylist()
    assert success["listed"] == success["done"] + success["failed"]
    assert sum(file["rows"] for file in files) == success["listed"]
    assert success["labels"] == {"REAL": 30, "FAKE": 30}
    for file in files:
        data = (shards / file["name"]).read_bytes()
        footer_bytes = int.from_bytes(data[-8:-4], "little") + 8
        assert file["size_bytes"] == len(data)
        assert file["sha256"] == hashlib.sha256(data[-footer_bytes:]).hexdigest()
        seal = json.loads(pq.ParquetFile(shards / file["name"]).metadata.metadata[SEAL_KEY])
        assert seal["bytes_before"] == len(data) - footer_bytes
        assert seal["sha256_before"] == hashlib.sha256(data[:-footer_bytes]).hexdigest()


def test_an_empty_source_is_refused(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    with pytest.raises(NothingToDo, match="holds no file"):
        run_convert(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out" / "_run.json").exists()


def test_a_missing_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no such file or folder"):
        run_convert(tmp_path / "nowhere", tmp_path / "out")


def test_more_workers_than_cpus_are_refused_with_numbers(
    sample_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ResourceError, match="need 99 CPUs, the cluster has 2"):
        run_convert(sample_folder, tmp_path / "out", num_workers=99)


def test_an_output_that_cannot_be_written_ends_the_run(sample_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file stands here")
    with pytest.raises(StorageError, match="a file is where a folder is needed"):
        run_convert(sample_folder, tmp_path / "out")
    out = tmp_path / "late"
    out.mkdir()
    (out / "shards").write_text("the worker meets a file where its folder should be")
    with pytest.raises(StorageError, match="a file is where a folder is needed"):
        run_convert(sample_folder, out)
    assert not (out / "_SUCCESS").exists()


def test_a_dry_run_writes_nothing(sample_folder: Path, tmp_path: Path) -> None:
    config = ConvertConfig(src=str(sample_folder), out=str(tmp_path / "out"), dry_run=True)
    plan, code = run_verb(config, time.monotonic())
    assert code == 0
    assert plan.listed == 60
    assert plan.labels == {"REAL": 30, "FAKE": 30}
    assert sum(plan.splits.values()) == 60
    assert not (tmp_path / "out").exists()
