"""verify: each folder is listed once, files are read in parts, and workers find what one finds."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from s3_server import S3Server
from score_run import write_score_run

from cifake_ray.config import RepairConfig, VerifyConfig
from cifake_ray.errors import StorageError
from cifake_ray.pipeline import run_verb
from cifake_ray.stages import verify as verify_stage
from cifake_ray.storage.io import digest
from cifake_ray.storage.io.digest import hash_file, list_sizes
from cifake_ray.storage.io.paths import AnyPath, resolve_path
from cifake_ray.storage.runs import verify as verify_module
from cifake_ray.storage.runs.file_progress import FileProgress
from cifake_ray.storage.runs.verify import (
    CommittedFile,
    DamagedFile,
    check_files,
    check_here,
    plan_check,
    verify_files,
)

NUM_SHARDS = 8


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A finished run of eight shards."""
    images = tmp_path / "images" / "real"
    images.mkdir(parents=True)
    for number in range(4 * NUM_SHARDS):
        (images / f"{number}.png").write_bytes(b"x")
    write_score_run(str(images.parent), tmp_path / "out", shard_rows=4)
    return tmp_path / "out"


def name_of(shard: int) -> str:
    return f"scores/part-{shard:05}.parquet"


def damage_all_ways(out: Path) -> list[DamagedFile]:
    """Damage shards; return what `verify` must say, in its order."""
    for shard, change in {
        6: lambda d: d[:-1],
        4: lambda d: d[:9] + bytes([d[9] ^ 1]) + d[10:],
    }.items():
        path = out / name_of(shard)
        path.write_bytes(change(path.read_bytes()))
    size = (out / name_of(6)).stat().st_size
    (out / name_of(2)).unlink()
    for extra in (99999, 77777):
        (out / name_of(extra)).write_bytes(b"PAR1")
    return [
        DamagedFile(name_of(2), "missing"),
        DamagedFile(name_of(4), "sha256 differs"),
        DamagedFile(name_of(6), f"{size} bytes, not {size + 1}"),
        DamagedFile(name_of(77777), "not committed by this run"),
        DamagedFile(name_of(99999), "not committed by this run"),
    ]


def test_the_damage_is_in_the_order_of_the_files_whoever_is_done_first(out: Path) -> None:
    wanted = damage_all_ways(out)
    check = plan_check(out)
    results = [check_files(out, group) for group in check.groups]
    assert check.judge(results) == check.judge(results[::-1]) == wanted == verify_files(out)


def test_no_file_is_asked_about_alone(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed: list[str] = []

    def count(folder: AnyPath) -> dict[str, int]:
        listed.append(folder.name)
        return list_sizes(folder)

    monkeypatch.setattr(verify_module, "list_sizes", count)
    monkeypatch.setattr(digest, "stamp_file", None)
    assert verify_files(out) == []
    assert sorted(listed) == ["_manifest", "scores"]


def test_a_shard_that_disappears_after_the_listing_is_missing(out: Path) -> None:
    check = plan_check(out)
    (out / name_of(3)).unlink()
    assert check_here(check) == [DamagedFile(name_of(3), "missing")]


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_a_broken_disk_is_damage_of_the_file_and_missing_rights_are_not(
    out: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(path: Path, *args: Any) -> Any:
        if path.name == "part-00001.parquet":
            raise OSError(number, os.strerror(number))
        return open_regular(path, *args)

    open_regular = digest.open_regular
    monkeypatch.setattr(digest, "open_regular", fail)
    if number == errno.EIO:
        reason = "cannot be read: Input/output error"
        assert verify_files(out) == [DamagedFile(name_of(1), reason)]
    else:
        with pytest.raises(StorageError, match="check the permissions"):
            verify_files(out)


def test_the_progress_counts_every_file_and_what_is_damaged(out: Path) -> None:
    damage_all_ways(out)
    seen: list[FileProgress] = []
    check_here(plan_check(out), seen.append)
    assert (seen[-1].done, seen[-1].total) == (NUM_SHARDS + 1, NUM_SHARDS + 1)
    assert seen[-1].damaged == 5
    assert seen[-1].eta_s == 0


def test_workers_are_given_neighbours_by_number_and_by_bytes() -> None:
    def count(num_files: int, size_bytes: int) -> list[int]:
        files = [CommittedFile(str(n), "", size_bytes) for n in range(num_files)]
        groups = list(verify_module._group_files(files))
        assert [file for each in groups for file in each] == files
        return [len(each) for each in groups]

    assert count(20, 10) == [1] * 20  # few files are not held together
    assert count(100_000, 1)[:2] == [64, 64]
    assert set(count(10_000, 40 * 2**20)) == {2}
    assert 19_000 < len(count(500_000, 256 * 2**20)) <= 20_000


def no_line(progress: FileProgress) -> None:
    pass


def test_processes_find_what_threads_find_and_few_files_need_none(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = damage_all_ways(out)
    config = VerifyConfig(out=str(out), num_workers=0)
    assert verify_stage.verify_output(config, out, no_line, print) == wanted
    monkeypatch.setattr("cifake_ray.stages.batch.task_pool.LocalPool", None)
    with pytest.raises(TypeError):
        verify_stage.verify_output(config, out, no_line, print)
    assert verify_stage.verify_output(VerifyConfig(out=str(out)), out, no_line, print) == wanted
    monkeypatch.setattr(verify_stage, "SMALL_FILES", 2)
    monkeypatch.setattr(verify_stage, "SMALL_BYTES", 2)
    with pytest.raises(TypeError):
        verify_stage.verify_output(VerifyConfig(out=str(out)), out, no_line, print)


@pytest.mark.smoke
@pytest.mark.usefixtures("ray_cluster")
def test_tasks_of_ray_find_what_threads_find(out: Path) -> None:
    wanted = damage_all_ways(out)
    result, code = run_verb(VerifyConfig(out=str(out), num_workers=1), 0.0)
    assert result["damaged"] == {item.name: item.reason for item in wanted}
    assert code == 4


@pytest.mark.parametrize("verb", [VerifyConfig, RepairConfig])
@pytest.mark.parametrize("num_workers", [None, 0])
def test_a_folder_without_a_run_and_one_that_is_not_finished_are_named(
    out: Path, verb: Callable[..., Any], num_workers: int | None
) -> None:
    with pytest.raises(StorageError, match=r"no _run\.json"):
        run_verb(verb(out=str(out.parent), num_workers=num_workers), 0.0)
    if verb is VerifyConfig:
        (out / "_SUCCESS").unlink()
        with pytest.raises(StorageError, match="has not finished"):
            run_verb(verb(out=str(out), num_workers=num_workers), 0.0)


# --- in a bucket ---------------------------------------------------------------------------------


def test_an_object_is_read_in_parts_and_has_the_hash_of_its_bytes(
    s3_env: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest, "PART_BYTES", 1000)
    bucket = s3_env.make_bucket()
    for size in (0, 1, 999, 1000, 1001, 12_345):
        data = np.random.default_rng(size).bytes(size)
        (tmp_path / "x").write_bytes(data)
        path = resolve_path(f"s3://{bucket}/folder/{size}")
        path.write_bytes(data)
        assert hash_file(path) == hash_file(path, size) == hash_file(tmp_path / "x")
    sizes = {"0": 0, "1": 1, "1000": 1000, "1001": 1001, "12345": 12_345, "999": 999}
    assert list_sizes(resolve_path(f"s3://{bucket}/folder")) == sizes
    assert list_sizes(resolve_path(f"s3://{bucket}"))["folder"] == -1
    assert list_sizes(resolve_path(f"s3://{bucket}/none")) == {}
    with pytest.raises(StorageError, match=r"12345: .*answered 345 bytes when asked for 655"):
        hash_file(resolve_path(f"s3://{bucket}/folder/12345"), 12_655)


def test_an_output_in_a_bucket_is_verified_by_processes(
    out: Path, s3_env: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = damage_all_ways(out)
    root = resolve_path(f"s3://{s3_env.make_bucket()}/out")
    for path in out.rglob("*"):
        if path.is_file():
            (root / path.relative_to(out).as_posix()).write_bytes(path.read_bytes())
    monkeypatch.setattr(digest, "stamp_file", None)  # a HEAD of each object
    check = plan_check(root)
    assert check_here(check) == wanted
    config = VerifyConfig(out=str(root), num_workers=0)
    assert verify_stage.verify_output(config, root, no_line, print) == wanted
    (root / name_of(0)).unlink()
    assert check_here(check)[0] == DamagedFile(name_of(0), "missing")
