"""repair: redoes what differs, and leaves all as it was when it cannot."""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cifake_ray.config import ConvertConfig, RepairConfig
from cifake_ray.errors import StorageError
from cifake_ray.pipeline import run_verb
from cifake_ray.stages.batch import driver, task_pool
from cifake_ray.stages.verify import verify_output
from cifake_ray.storage.io import digest
from cifake_ray.storage.runs.file_progress import FileProgress
from cifake_ray.storage.runs.verify import DamagedFile, plan_seal_check, verify_files
from cifake_ray.storage.sources.parquet import ParquetSource

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture
def damaged(sample_folder: Path, tmp_path: Path) -> Path:
    """Shards of a folder beside them, one with a flipped byte."""
    source = tmp_path / "source"
    for path in sorted(sample_folder.rglob("*.jpg"))[:40]:
        target = source / path.relative_to(sample_folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    out = tmp_path / "out"
    config = ConvertConfig(src=str(source), out=str(out), shard_size=10)
    run_verb(config, time.monotonic())
    part = out / "shards" / "part-00002.parquet"
    data = bytearray(part.read_bytes())
    data[len(data) // 3] ^= 1
    part.write_bytes(data)
    return out


@pytest.mark.smoke
def test_repair_makes_the_damaged_shard_again_and_only_that(damaged: Path) -> None:
    assert [item.name for item in verify_files(damaged)] == ["shards/part-00002.parquet"]
    summary, code = run_verb(RepairConfig(out=str(damaged)), time.monotonic())
    assert (summary.shards_resumed, summary.shards_total, code) == (4, 5, 0)
    assert verify_files(damaged) == []
    assert pq.read_table(damaged / "shards").num_rows == 40
    hidden = [path.name for path in damaged.rglob(".*") if path.is_file()]
    assert hidden == [".huggingface.yaml"]


def test_who_has_listed_shards_reads_one_that_was_repaired(damaged: Path) -> None:
    source = ParquetSource(damaged)
    rows = pa.Table.from_batches(list(source.list_images().batches))
    with pytest.raises(StorageError, match="`cifake-ray repair` redoes a damaged shard"):
        list(source.read_images(rows))
    run_verb(RepairConfig(out=str(damaged)), time.monotonic())
    images = list(ParquetSource(damaged).read_images(rows))
    assert all(isinstance(image, bytes) for image in images)
    assert len(images) == 40


def test_repair_of_an_undamaged_output_says_so_and_starts_nothing(
    damaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_verb(RepairConfig(out=str(damaged)), time.monotonic())
    monkeypatch.setattr(driver, "LocalPool", None)
    monkeypatch.setattr(driver, "_start_on_ray", None)
    result, code = run_verb(RepairConfig(out=str(damaged)), time.monotonic())
    assert code == 0
    assert result == {
        "command": "repair",
        "out": str(damaged),
        "files": 6,
        "rows": 40,
        "damaged": {},
    }
    record = json.loads((damaged / "_SUCCESS").read_text())
    del record["listed"]
    (damaged / "_SUCCESS").write_text(json.dumps(record))
    with pytest.raises(TypeError):  # it is made again
        run_verb(RepairConfig(out=str(damaged)), time.monotonic())


@pytest.mark.parametrize("what", ["disk", "rights", "folder"])
def test_an_unfinished_run_is_repaired_whatever_one_shard_is(
    damaged: Path, what: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (damaged / "_SUCCESS").unlink()
    part = damaged / "shards/part-00001.parquet"
    aside = part.with_name(f".aside-{part.name}")
    if what == "folder":
        part.unlink()
        part.mkdir()
        (part / "note").write_text("mine")
    else:
        number, open_regular = errno.EIO if what == "disk" else errno.EACCES, digest.open_regular

        def fail(path: Path, *args: Any) -> Any:
            if path == part:
                raise OSError(number, os.strerror(number))
            return open_regular(path, *args)

        monkeypatch.setattr(digest, "open_regular", fail)
    summary, code = run_verb(RepairConfig(out=str(damaged)), time.monotonic())
    monkeypatch.undo()
    assert (summary.shards_resumed, summary.shards_total, code) == (3, 5, 0)
    assert verify_files(damaged) == []
    said = capfd.readouterr().err
    assert "part-00001.parquet is set aside: cannot be read: " in said
    assert "part-00002.parquet is set aside: sha256 differs" in said
    assert aside.exists() == (f"{aside} is a folder" in said) == (what == "folder")
    if what == "folder":
        assert (aside / "note").read_text() == "mine"


def test_repair_of_an_unfinished_run_sets_strange_shards_aside_and_names_other_files(
    damaged: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (damaged / "_SUCCESS").unlink()
    whole = (damaged / "shards/part-00000.parquet").read_bytes()
    for name in ("part-00005.parquet", "part-77777.parquet", "copy.parquet", "_notes"):
        (damaged / "shards" / name).write_bytes(whole)
    run_verb(RepairConfig(out=str(damaged)), time.monotonic())
    said = capfd.readouterr().err
    for name in ("part-00005.parquet", "part-77777.parquet"):
        assert f"shards/{name} is set aside: not committed by this run" in said
    assert "left alone: shards/copy.parquet; readers" in said
    assert verify_files(damaged) == []
    there = {path.name for path in (damaged / "shards").iterdir()}
    assert there == {*(f"part-{n:05}.parquet" for n in range(5)), "copy.parquet", "_notes"}


def test_an_unfinished_run_is_read_by_workers_too(
    damaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (damaged / "_SUCCESS").unlink()
    config = RepairConfig(out=str(damaged), num_workers=0)
    seen: list[FileProgress] = []
    found = verify_output(config, damaged, seen.append, print, plan_seal_check)
    assert found == [DamagedFile("shards/part-00002.parquet", "sha256 differs")]
    assert (seen[-1].done, seen[-1].total, seen[-1].damaged) == (5, 5, 1)
    monkeypatch.setattr(task_pool, "LocalPool", None)
    with pytest.raises(TypeError):
        run_verb(config, time.monotonic())
