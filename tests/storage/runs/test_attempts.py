"""Notes of attempts, on a disk and in a bucket."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cifake_ray.storage.io.files import find_files, make_folder, write_bytes
from cifake_ray.storage.io.paths import AnyPath, resolve_path
from cifake_ray.storage.runs.attempts import (
    clear_attempts,
    find_heartbeat,
    follow_attempt,
    list_attempts,
    read_attempt,
    remove_attempt,
    write_attempt,
)
from cifake_ray.storage.runs.manifest import Manifest
from cifake_ray.storage.runs.run import Run


def make_run(out: AnyPath) -> Run:
    return Run(out, "score", {}, {}, Manifest((), 0, 0), {})


@pytest.fixture(params=["disk", "bucket"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    if request.param == "disk":
        return make_run(tmp_path)
    server = request.getfixturevalue("s3_env")
    return make_run(resolve_path(f"s3://{server.make_bucket()}/out"))


def test_a_note_is_written_read_listed_and_removed(run: Run) -> None:
    assert read_attempt(run, 7) is None
    assert list_attempts(run, "a") == []
    attempt = follow_attempt(None, 7, "a")
    assert (attempt.number, attempt.pid) == (1, os.getpid())
    write_attempt(run, attempt)
    write_attempt(run, replace(attempt, rows_done=512, steps=600))
    assert read_attempt(run, 7) == replace(attempt, rows_done=512, steps=600)
    write_attempt(run, follow_attempt(None, 8, "b"))
    assert [a.shard for a in list_attempts(run, "a")] == [7]
    remove_attempt(run, 7)
    remove_attempt(run, 7)
    assert read_attempt(run, 7) is None
    clear_attempts(run)
    clear_attempts(run)
    assert not any(name.endswith(".json") for name in find_files(run.out))


def test_each_command_counts_its_own_attempts(run: Run) -> None:
    first = follow_attempt(None, 0, "a")
    second = follow_attempt(first, 0, "a")
    assert (second.number, follow_attempt(second, 0, "a").number) == (2, 3)
    assert follow_attempt(second, 0, "b").number == 1


@pytest.mark.parametrize("data", [b"", b"\0" * 30, b"[]", b'{"shard": 1}', b"\xff"])
def test_a_damaged_note_still_calls_for_caution(run: Run, data: bytes) -> None:
    make_folder(run.attempts_folder)
    write_bytes(find_heartbeat(run, 1), data)
    attempt = read_attempt(run, 1)
    assert attempt is not None
    assert follow_attempt(attempt, 1, "a").number == 1
    assert list_attempts(run, "a") == []


def test_a_note_costs_less_than_a_millisecond(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    times_s = []
    for shard in range(50):
        started_s = time.perf_counter()
        write_attempt(run, follow_attempt(read_attempt(run, shard), shard, "a"))
        remove_attempt(run, shard)
        times_s.append(time.perf_counter() - started_s)
    assert sorted(times_s)[len(times_s) // 4] < 0.001
