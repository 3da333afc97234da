"""The workers without Ray: what they commit, and what is said when they cannot.

Kills, hangs and signals are in `tests/faults`, which runs the same tests on Ray.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import ray

from cifake_ray.config import ConvertConfig
from cifake_ray.errors import ResourceError
from cifake_ray.pipeline import run_verb
from cifake_ray.stages import convert
from cifake_ray.stages.batch.local_pool import choose_environment
from cifake_ray.stages.batch.summary import BatchSummary


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))


def convert_images(src: Path, out: Path, **options: Any) -> BatchSummary:
    config = ConvertConfig(src=str(src), out=str(out), num_workers=0, shard_size=20, **options)
    summary: BatchSummary = run_verb(config, time.monotonic())[0]
    return summary


def list_children() -> list[str]:
    return [
        word
        for child in psutil.Process().children()
        for word in child.cmdline()
        if "local_pool" in word
    ]


def test_every_image_is_converted_once_and_the_workers_are_gone(
    sample_folder: Path, tmp_path: Path
) -> None:
    summary = convert_images(sample_folder, tmp_path / "out")
    assert (summary.done, summary.shards_total, summary.shards_retried) == (60, 5, 0)
    assert summary.ran_on.endswith("without Ray")
    keys = pq.read_table(tmp_path / "out" / "shards")["key"].to_pylist()
    assert len(keys) == len(set(keys)) == 60
    assert list_children() == []


def test_a_bug_in_a_worker_shows_its_traceback(
    sample_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "MakeConvertProcessor", lambda reencoder: partial(int, "x"))
    with pytest.raises(RuntimeError, match=r"(?s)in a worker process: Traceback.*TypeError"):
        convert_images(sample_folder, tmp_path / "out")
    monkeypatch.undo()
    assert convert_images(sample_folder, tmp_path / "out").done == 60


def test_a_worker_that_never_starts_is_tried_three_times_and_quoted(
    sample_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = tmp_path / "starts"
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho >> {starts}\necho 'no module' >&2\nexit 7\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})
    with pytest.raises(ResourceError, match=r"did not start \(exit code 7; it said 'no module'\)"):
        convert_images(sample_folder, tmp_path / "out")
    assert starts.read_text() == "\n" * 3


def test_each_worker_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert "CUDA_VISIBLE_DEVICES" not in choose_environment(1, use_gpu=False)
    assert choose_environment(1, use_gpu=True)["CUDA_VISIBLE_DEVICES"] == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert choose_environment(1, use_gpu=True)["CUDA_VISIBLE_DEVICES"] == "6"
