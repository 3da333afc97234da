"""kill -9 at any moment, the same command again: the result equals the undisturbed one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from faults.command import make_images, run_command, start_command

pytestmark = pytest.mark.timeout(900)

NUM_IMAGES = 3_000
NUM_KILLS = 3


def finish(arguments: list[str], env: dict[str, str]) -> dict[str, Any]:
    code, result, errors = run_command(arguments, env)
    assert code == 0, errors
    return result


def kill_in(process: subprocess.Popen[str], seconds: float) -> None:
    """SIGKILL after some time, or let it end if it is faster."""
    time.sleep(seconds)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory, NUM_IMAGES)


@pytest.fixture(scope="module")
def shards(images: Path, env: dict[str, str]) -> tuple[Path, float]:
    """Undisturbed shards, and how long they took."""
    out = images.parent / "shards"
    finish(["convert", str(images), str(out), "--shard-size", "100"], env)
    return out, json.loads((out / "_SUCCESS").read_text())["elapsed_s"]


def read_parts(folder: Path) -> dict[str, Any]:
    return {path.name: pq.read_table(path) for path in sorted(folder.glob("part-*"))}


def disturb(
    arguments: list[str], out: Path, elapsed_s: float, env: dict[str, str]
) -> dict[str, Any]:
    """Kill the command at random moments, then let it finish."""
    rng = random.Random(0)
    finished = 0
    for number in range(NUM_KILLS):
        share = (number + rng.random()) / NUM_KILLS  # early, in the middle, late
        kill_in(start_command(arguments, env), share * elapsed_s)
        parts = list(out.glob("*/part-*"))
        assert all(path.stat().st_size for path in parts), "half a shard is visible"
        assert len(parts) >= finished, "a finished shard is gone"
        finished = len(parts)
        stamps = {path: path.stat().st_mtime_ns for path in parts}
    summary = finish(arguments, env)
    again = {path: path.stat().st_mtime_ns for path in stamps}
    assert again == stamps, "a finished shard was made again"
    return summary


def test_a_killed_convert_equals_an_undisturbed_one(
    images: Path, shards: tuple[Path, float], env: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["convert", str(images), str(out), "--shard-size", "100"]
    summary = disturb(arguments, out, shards[1], env)
    assert summary["listed"] == summary["done"] == NUM_IMAGES
    assert read_parts(out / "shards") == read_parts(shards[0] / "shards")
    assert not list(out.glob("*/.writing-*")), "a killed writer left its file behind"


def train_arguments(shards: Path, run: Path, num_workers: str) -> list[str]:
    options = ["--num-workers", num_workers, "--epochs", "4", "--batch-size", "100"]
    cache = ["--cache-dir", str(shards.parent / "cache"), "--cpus-per-worker", "1"]
    return ["train", str(shards), str(run), *options, *cache]


@pytest.fixture(scope="module")
def trained(shards: tuple[Path, float], env: dict[str, str]) -> tuple[dict[str, Any], bytes]:
    """The summary and the weights of an undisturbed training."""
    run = shards[0].parent / "trained"
    summary = finish(train_arguments(shards[0], run, "0"), env)
    return summary, read_weights(run)


def read_weights(run: Path) -> bytes:
    return (run / "bundle" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("workers", "kills"), [("0", (1, 2, 3)), ("1", (2,))])
def test_a_killed_training_takes_the_same_steps(
    shards: tuple[Path, float],
    trained: tuple[dict[str, Any], bytes],
    env: dict[str, str],
    tmp_path: Path,
    workers: str,
    kills: tuple[int, ...],
) -> None:
    run = tmp_path / "run"
    for epochs in kills:  # once so many are committed, somewhere in the next
        process = start_command(train_arguments(shards[0], run, workers), env)
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and process.poll() is None:
            history = run / "history.jsonl"
            if history.exists() and len(history.read_text().splitlines()) >= epochs:
                break
            time.sleep(0.05)
        kill_in(process, 0.1)
        assert not (run / "_SUCCESS").exists(), "it was over before it could be killed"
    summary = finish(train_arguments(shards[0], run, workers), env)
    whole, weights = trained
    assert summary["steps"] == whole["steps"]
    assert read_weights(run) == weights


def test_a_killed_search_tries_the_same_trials_and_trains_no_epoch_twice(
    shards: tuple[Path, float], env: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "space.yaml").write_text("lr: {loguniform: [0.0005, 0.02]}\n")
    (tmp_path / "recipe.yaml").write_text("epochs: 3\nbatch_size: 100\n")

    def arguments(run: Path) -> list[str]:
        files = [f"--search={tmp_path / 'space.yaml'}", f"--recipe={tmp_path / 'recipe.yaml'}"]
        cache = ["--cache-dir", str(shards[0].parent / "cache")]
        trials = ["--trials", "4", "--scheduler", "none"]
        return ["tune", str(shards[0]), str(run), *files, *cache, *trials]

    def read_epochs(run: Path) -> dict[str, list[str]]:
        found = sorted(run.glob("trials/*/run-0/history.jsonl"))
        return {path.parts[-3]: path.read_text().splitlines() for path in found}

    whole = finish(arguments(tmp_path / "whole"), env)
    run = tmp_path / "run"
    for num_epochs in (2, 7):  # over all trials, when it is killed
        process = start_command(arguments(run), env)
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and process.poll() is None:
            if sum(map(len, read_epochs(run).values())) >= num_epochs:
                break
            time.sleep(0.05)
        kill_in(process, 0.1)
        assert not (run / "_SUCCESS").exists(), "it was over before it could be killed"
    before = read_epochs(run)
    summary = finish(arguments(run), env)
    after = read_epochs(run)
    for trial, rows in before.items():
        assert after[trial][: len(rows)] == rows, "an epoch was trained twice"
    assert {name: len(rows) for name, rows in after.items()} == dict.fromkeys(after, 3)
    for name in ("trials", "best_trial", "best", "chosen", "epochs", "steps"):
        assert summary[name] == whole[name]
    assert read_weights(run) == read_weights(tmp_path / "whole")


def test_a_killed_score_equals_an_undisturbed_one(
    images: Path, shards: tuple[Path, float], env: dict[str, str], tmp_path: Path
) -> None:
    def arguments(out: Path) -> list[str]:
        return ["score", str(images), str(out), "--shard-size", "100"]

    whole = finish(arguments(tmp_path / "whole"), env)
    out = tmp_path / "out"
    summary = disturb(arguments(out), out, whole["elapsed_s"], env)
    assert summary["listed"] == summary["done"] == NUM_IMAGES
    assert read_parts(out / "scores") == read_parts(tmp_path / "whole" / "scores")
