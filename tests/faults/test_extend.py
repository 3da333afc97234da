"""kill -9 of `score --extend` at any moment: the old run or the extended one remains."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faults.command import count_parts, finish_command, make_env, run_command, start_command

from cifake_ray.config import SampleConfig
from cifake_ray.storage.datasets.sample_folder import write_sample

pytestmark = pytest.mark.timeout(1800)

NUM_IMAGES, SHARD_SIZE = 400, "20"
NUM_OUTPUTS, NUM_KILLS = 5, 4  # of each output


def read_rows(out: Path) -> pa.Table:
    return pq.read_table(out / "scores").sort_by("key")


def test_an_extension_under_20_kills_equals_one_run_over_the_final_listing(tmp_path: Path) -> None:
    env, src, rng = make_env(), tmp_path / "src", random.Random(0)
    images = write_sample(SampleConfig(out=str(tmp_path / "images"), images=NUM_IMAGES))
    files = sorted(images.rglob("*.*"))
    files = [file for file in files if file.suffix in (".jpg", ".png", ".webp")]
    assert len(files) == NUM_IMAGES

    def score(out: Path, *options: str) -> list[str]:
        return [
            "score",
            str(src),
            str(out),
            "--shard-size",
            SHARD_SIZE,
            "--num-workers=0",
            *options,
        ]

    def add(chosen: list[Path]) -> None:
        for file in chosen:
            path = src / file.relative_to(images)
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, path)

    rng.shuffle(files)
    add(files[: NUM_IMAGES // 2])
    old, wanted, timed = tmp_path / "old", tmp_path / "wanted", tmp_path / "timed"
    finish_command(score(old), env)
    add(files[NUM_IMAGES // 2 :])
    finish_command(score(wanted), env)
    shutil.copytree(old, timed)
    started_s = time.monotonic()
    finish_command(score(timed, "--extend"), env)
    duration_s = time.monotonic() - started_s
    assert read_rows(timed) == read_rows(wanted)
    states = set()
    for number in range(NUM_OUTPUTS):
        out = tmp_path / f"out-{number}"
        shutil.copytree(old, out)
        for _ in range(NUM_KILLS):
            process = start_command(score(out, "--extend"), env)
            time.sleep(rng.random() * duration_s)
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
            code, result, errors = run_command(["verify", str(out)], env)
            if code == 0:
                assert result["rows"] in (NUM_IMAGES // 2, NUM_IMAGES)
            else:
                assert "has not finished" in errors
            states.add((result.get("rows"), count_parts(out)))
            for path in (old / "scores").iterdir():
                assert (out / "scores" / path.name).stat().st_mtime_ns == path.stat().st_mtime_ns
        summary = finish_command(score(out, "--extend"), env)
        assert summary["listed"] == summary["done"] == NUM_IMAGES
        assert read_rows(out) == read_rows(wanted)
        assert run_command(["verify", str(out)], env)[0] == 0
        assert not list(out.glob("*/.writing-*"))
    assert len(states) > 2, f"it was always killed in the same state: {states}"
