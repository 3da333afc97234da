"""kill -9 of `score --extend` at any moment: the old run or the extended one remains."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faults.command import count_parts, finish_command, make_env, start_command
from faults.test_kill import kill_once

from cifake_ray.config import SampleConfig
from cifake_ray.storage.datasets.sample_folder import write_sample
from cifake_ray.storage.runs.run import is_finished, require_run
from cifake_ray.storage.runs.verify import verify_files

pytestmark = pytest.mark.timeout(1800)

NUM_IMAGES, SHARD_SIZE = 240, "20"
NUM_OUTPUTS = 5  # each is killed four times


def read_rows(out: Path) -> pa.Table:
    return pq.read_table(out / "scores").sort_by("key")


def check_equal(rows: pa.Table, wanted: pa.Table) -> None:
    """Compare all; scores to the last bits, which depend on how many images a batch has."""
    for name in ("logit", "p_fake"):
        np.testing.assert_allclose(rows[name], wanted[name], rtol=1e-5)
    inexact = ["logit", "p_fake"]
    assert rows.drop_columns(inexact) == wanted.drop_columns(inexact)


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
    finish_command(score(timed, "--extend"), env)
    check_equal(read_rows(timed), read_rows(wanted))
    num_old, num_all = count_parts(old), count_parts(timed)
    states = set()
    for number in range(NUM_OUTPUTS):
        out = tmp_path / f"out-{number}"
        shutil.copytree(old, out)
        wanted_parts = sorted(rng.randrange(num_old + 1, num_all) for _ in range(2))
        moments: list[tuple[Callable[[], object], float]] = [
            (lambda: True, 3.0 * rng.random()),  # while it starts or lists
            (lambda out=out: require_run(out).manifest.num_rows == NUM_IMAGES, 0.3 * rng.random()),
            *((lambda n=n, out=out: count_parts(out) >= n, 0.0) for n in wanted_parts),
        ]
        for is_time, wait_s in moments:
            kill_once(start_command(score(out, "--extend"), env), is_time, wait_s)
            run = require_run(out)
            if is_finished(run):
                assert verify_files(out) == []
            states.add((is_finished(run), run.manifest.num_rows, count_parts(out)))
            for path in (old / "scores").iterdir():
                assert (out / "scores" / path.name).stat().st_mtime_ns == path.stat().st_mtime_ns
        summary = finish_command(score(out, "--extend"), env)
        assert summary["listed"] == summary["done"] == NUM_IMAGES
        assert read_rows(out) == read_rows(timed)
        assert verify_files(out) == []
        assert not list(out.glob("*/.writing-*"))
    print(sorted(states))
    assert len(states) > 3, f"it was killed in few states: {states}"
