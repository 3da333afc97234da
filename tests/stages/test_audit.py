"""audit finds what gives labels away, and after each remedy of convert it does not."""

from __future__ import annotations

import io
import json
import shlex
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from PIL import Image

from cifake_ray.config import AuditConfig, ConvertConfig, RepairConfig
from cifake_ray.core.schema import AUDIT_FIELDS, MANIFEST_FIELDS
from cifake_ray.errors import RunMismatch, StorageError, UsageError
from cifake_ray.options import make_command
from cifake_ray.pipeline import run_verb
from cifake_ray.storage.runs.audit_rows import AuditedRows, require_audit
from cifake_ray.storage.runs.verify import find_damage
from cifake_ray.storage.sources.source import Listing

NUM_IMAGES = 16  # of each class and split


def encode(seed: int, quality: int, side: int = 48) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    image = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mostly REAL at quality 90 and FAKE at 70, a few the other way; copies and a broken file."""
    root = tmp_path_factory.mktemp("audit") / "images"
    for number, (split, label) in enumerate(
        (split, label) for split in ("train", "test") for label in ("REAL", "FAKE")
    ):
        folder = root / split / label
        folder.mkdir(parents=True)
        for index in range(NUM_IMAGES):
            is_odd_one = index < 3
            quality = 90 if (label == "REAL") != is_odd_one else 70
            (folder / f"{index:02}.jpg").write_bytes(encode(100 * number + index, quality))
    shutil.copy(root / "train/REAL/00.jpg", root / "test/REAL/copy.jpg")
    shutil.copy(root / "train/REAL/01.jpg", root / "train/FAKE/other-label.jpg")
    (root / "train/FAKE/broken.jpg").write_bytes(b"no image")
    return root


def run(config: Any) -> Any:
    return run_verb(config, time.monotonic())[0]


def audit(src: Path, out: Path, **options: Any) -> dict[str, Any]:
    options = {"num_workers": 0, "shard_size": 32, "max_error_rate": 1.0, **options}
    run(AuditConfig(src=str(src), out=str(out), **options))
    findings = json.loads((out / "audit.json").read_text())
    assert isinstance(findings, dict)
    return findings


def convert(src: Path, out: Path, **options: Any) -> tuple[Any, dict[str, dict[str, Any]]]:
    options = {"num_workers": 0, "max_error_rate": 1.0, **options}
    summary = run(ConvertConfig(src=str(src), out=str(out), **options))
    assert summary.listed == summary.done + summary.failed
    rows = pq.read_table(out / "shards").to_pylist()
    return summary, {row["key"]: row for row in rows}


def name_leaks(findings: dict[str, Any]) -> set[str]:
    return {verdict["name"] for verdict in findings["verdicts"] if verdict["level"] == "LEAK"}


@pytest.fixture(scope="module")
def audited(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("audited") / "out"
    audit(images, out)
    return out


@pytest.mark.smoke
def test_every_image_has_a_row_and_leaks_and_copies_are_found(images: Path, audited: Path) -> None:
    table = pq.read_table(audited / "audit")
    assert table.schema.remove_metadata() == pa.schema(AUDIT_FIELDS)
    keys = sorted(p.relative_to(images).as_posix() for p in images.rglob("*.jpg"))
    assert sorted(table.column("key").to_pylist()) == keys
    errors = {row["key"]: row["error"] for row in table.to_pylist() if row["error"]}
    assert errors == {"train/FAKE/broken.jpg": "not_an_image"}
    findings = json.loads((audited / "audit.json").read_text())
    assert {"JPEG quality", "quantisation", "zero-pixel null"} <= name_leaks(findings)
    assert not {"format", "size", "subsampling", "metadata"} & name_leaks(findings)
    assert findings["duplicates"]["bytes_group"] == {
        "groups": 2,
        "images": 4,
        "pairs": 2,
        "pairs_across_splits": 1,
        "pairs_across_classes": 1,
    }
    assert findings["classes"] == {"REAL": 33, "FAKE": 33}
    page = (audited / "audit.html").read_text()
    assert "JPEG quality" in page
    assert "<script" not in page


def test_the_commands_of_the_verdicts_exist(audited: Path) -> None:
    findings = json.loads((audited / "audit.json").read_text())
    commands = {command for verdict in findings["verdicts"] for command in verdict["remedies"]}
    assert len(commands) >= 3
    made: list[ConvertConfig] = []
    app = typer.Typer()
    app.command()(make_command(ConvertConfig, lambda make, **rest: made.append(make())))
    for command in commands:
        words = shlex.split(command, comments=True)
        assert words[:2] == ["cifake-ray", "convert"]
        typer.main.get_command(app).main(words[2:], standalone_mode=False)
    assert {"jpeg:90", None} == {config.reencode for config in made}
    assert {"none", "bytes"} == {config.dedupe for config in made}


def test_an_interrupted_audit_ends_as_another(images: Path, audited: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(audited, out)
    for name in ("_SUCCESS", "_files.parquet", "audit.json", "audit.html", "_duplicates.parquet"):
        (out / name).unlink()
    (out / "audit/part-00001.parquet").unlink()
    audit(images, out)
    for name in ("audit.json", "_duplicates.parquet", "audit/part-00001.parquet"):
        again, before = ((folder / name).read_bytes() for folder in (out, audited))
        assert again.replace(str(out).encode(), str(audited).encode()) == before, name
    with pytest.raises(RunMismatch, match="seed"):
        audit(images, out, seed=1)


def test_findings_that_were_edited_are_refused_and_may_be_missing(
    images: Path, audited: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(audited, out)
    (out / "audit.json").write_text('{"verdicts": [{"name": 3}]}')
    with pytest.raises(StorageError, match="not the findings of an audit"):
        audit(images, out)
    (out / "audit.json").unlink()
    config = AuditConfig(src=str(images), out=str(out), num_workers=0, shard_size=32)
    assert run(config).verdicts == []


def test_a_damaged_shard_is_repaired(images: Path, audited: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(audited, out)
    shard = out / "audit/part-00000.parquet"
    before = shard.read_bytes()
    shard.write_bytes(before[:100])
    run(RepairConfig(out=str(out)))
    assert shard.read_bytes() == before
    assert find_damage(out) == []


def test_dedupe_keeps_the_copy_of_test_and_none_that_disagree(
    images: Path, audited: Path, tmp_path: Path
) -> None:
    summary, rows = convert(images, tmp_path / "out", audit=str(audited), dedupe="bytes")
    assert summary.left_out == {"duplicate of test": 1, "duplicate with another label": 2}
    left_out = {"train/REAL/00.jpg", "train/REAL/01.jpg", "train/FAKE/other-label.jpg"}
    keys = {p.relative_to(images).as_posix() for p in images.rglob("*.jpg")}
    assert set(rows) == keys - left_out
    assert rows["test/REAL/copy.jpg"]["image"]["bytes"]
    findings = audit(tmp_path / "out", tmp_path / "audited")
    assert [found["pairs"] for found in findings["duplicates"].values()] == [0, 0, 0]


def test_matched_images_give_no_quality_away(images: Path, audited: Path, tmp_path: Path) -> None:
    summary, rows = convert(images, tmp_path / "out", audit=str(audited), match=("quality",))
    counts: dict[tuple[Any, ...], list[int]] = {}
    for row in rows.values():
        cell = counts.setdefault((row["split"], row["jpeg_quality"]), [0, 0])
        cell[row["label"]] += 1
    assert len(counts) == 4
    assert all(real == fake > 0 for real, fake in counts.values())
    assert summary.left_out == {"not matched by quality": 67 - len(rows)}


@pytest.mark.parametrize("encoding", ["jpeg:80", "webp:80", "png"])
def test_images_that_are_encoded_anew_give_nothing_away(
    images: Path, tmp_path: Path, encoding: str
) -> None:
    summary, rows = convert(images, tmp_path / "out", reencode=encoding, reencode_size=32)
    assert summary.errors == {"not_an_image": 1}
    kinds = {(r["format"], r["width"], r["height"]) for r in rows.values() if not r["error"]}
    assert kinds == {(encoding.split(":")[0].upper(), 32, 32)}
    original = Image.open(images / "train/REAL/05.jpg")
    again = Image.open(io.BytesIO(rows["train/REAL/05.jpg"]["image"]["bytes"]))
    difference = np.asarray(original.resize((32, 32)), float) - np.asarray(again.convert("RGB"))
    assert np.abs(difference).mean() < 12
    if encoding == "jpeg:80":
        leaks = name_leaks(audit(tmp_path / "out", tmp_path / "audited"))
        assert not {"JPEG quality", "quantisation", "size"} & leaks


def test_images_of_one_class_have_duplicates_but_no_leaks(images: Path, tmp_path: Path) -> None:
    findings = audit(images, tmp_path / "out", include=("*/REAL/*",))
    assert findings["leaks"] == {}
    assert findings["duplicates"]["bytes_group"]["pairs"] == 1
    assert any("Too few labelled images" in v["text"] for v in findings["verdicts"])


def test_an_audit_without_one_image_says_so(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.jpg").write_bytes(b"no image")
    with pytest.raises(UsageError, match="not one image could be decoded"):
        audit(tmp_path / "images", tmp_path / "out")


def make_listing(*rows: tuple[str, int | None, str]) -> Listing:
    values = {
        "key": [r[0] for r in rows],
        "label": [r[1] for r in rows],
        "split": [r[2] for r in rows],
    }
    columns = [pa.array(values.get(f.name, [None] * len(rows)), f.type) for f in MANIFEST_FIELDS]
    batch = pa.RecordBatch.from_arrays(columns, schema=pa.schema(MANIFEST_FIELDS))
    return Listing(iter([batch]))


def choose(audited: Path, listing: Listing) -> list[str]:
    config = ConvertConfig(src="s", out="o", audit=str(audited), dedupe="bytes")
    AuditedRows(require_audit(audited), config).choose(listing)
    return [key for batch in listing.batches for key in batch.column("key").to_pylist()]


def test_images_that_were_not_audited_are_counted(audited: Path) -> None:
    listing = make_listing(("test/REAL/03.jpg", 0, "test"), ("new.jpg", 0, "test"))
    assert choose(audited, listing) == ["test/REAL/03.jpg"]
    assert dict(listing.left_out) == {"not in the audit": 1}
    assert "is in the audit (left out: 1 not in the audit); give" in listing.explain_empty()


@pytest.mark.parametrize("row", [("test/REAL/03.jpg", 1, "test"), ("test/REAL/03.jpg", 0, "train")])
def test_an_audit_with_other_labels_is_refused(audited: Path, row: tuple[str, int, str]) -> None:
    with pytest.raises(UsageError, match=r"'test/REAL/03.jpg' has another label or split"):
        choose(audited, make_listing(row))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda out: (out / "_SUCCESS").unlink(), UsageError, "has not finished"),
        (lambda out: (out / "_duplicates.parquet").unlink(), StorageError, "_duplicates"),
        (lambda out: (out / "_duplicates.parquet").write_bytes(b"x"), StorageError, "damaged"),
        (lambda out: (out / "_run.json").unlink(), StorageError, r"no _run.json"),
        (lambda out: shutil.rmtree(out / "audit"), StorageError, "part-00000"),
    ],
)
def test_an_audit_that_lacks_something_is_refused(
    audited: Path,
    tmp_path: Path,
    change: Callable[[Path], None],
    error: type[Exception],
    message: str,
) -> None:
    shutil.copytree(audited, tmp_path / "out")
    change(tmp_path / "out")
    with pytest.raises(error, match=message):
        choose(tmp_path / "out", make_listing(("test/REAL/03.jpg", 0, "test")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dedupe": "bytes"}, "--dedupe needs --audit OUT"),
        ({"match": ("size",)}, "--match needs --audit OUT"),
        ({"match": ("colour",), "audit": "a"}, "--match is 'colour'; give size or quality"),
        ({"audit": "a"}, "--audit is used by"),
        ({"reencode": "jpeg"}, "--reencode is 'jpeg'; give jpeg:QUALITY"),
        ({"reencode": "jpeg:101"}, "--reencode"),
        ({"reencode": "gif"}, "--reencode"),
        ({"reencode_size": 32}, "--reencode-size needs --reencode"),
        ({"reencode": "png", "reencode_fit": "crop"}, "--reencode-fit crop needs --reencode-size"),
        ({"reencode": "png", "reencode_size": 0}, "--reencode-size is 0"),
        ({"reencode": "png", "reencode_size": 10**6}, "--reencode-size is 1000000"),
    ],
)
def test_options_that_cannot_mean_anything_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        ConvertConfig(src="s", out="o", **options)
