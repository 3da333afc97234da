"""kill -9 at any moment, the same command again: the result equals the undisturbed one."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults.command import (
    count_parts,
    finish_command,
    read_parts,
    start_command,
)
from faults.conftest import NUM_MANY, SHARD_SIZE

pytestmark = pytest.mark.timeout(900)

NUM_SHARDS = NUM_MANY // int(SHARD_SIZE)
START_S = 3.0  # an early kill comes within so many seconds, before the first shard


def kill_once(
    process: subprocess.Popen[str], is_time: Callable[[], object], wait_s: float = 0.0
) -> None:
    """SIGKILL so long after it is time, or let the command end if it is faster."""
    until_s = time.monotonic() + 240
    while time.monotonic() < until_s and process.poll() is None and not is_time():
        time.sleep(0.02)
    time.sleep(wait_s)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


def disturb(arguments: list[str], out: Path, env: dict[str, str]) -> dict[str, Any]:
    """Kill the command early, in the middle and late, then let it finish."""
    rng = random.Random(0)
    finished = 0
    stamps: dict[Path, int] = {}
    for wanted in (0, NUM_SHARDS // 4, NUM_SHARDS // 2):
        process = start_command(arguments, env)
        wait_s = rng.random() * (0.1 if wanted else START_S)
        kill_once(process, lambda wanted=wanted: count_parts(out) >= wanted, wait_s)
        parts = list(out.glob("*/part-*"))
        assert all(path.stat().st_size for path in parts), "half a shard is visible"
        assert len(parts) >= finished, "a finished shard is gone"
        finished = len(parts)
        stamps = {path: path.stat().st_mtime_ns for path in parts}
    assert stamps, "it was never killed with a shard done"
    summary = finish_command(arguments, env)
    again = {path: path.stat().st_mtime_ns for path in stamps}
    assert again == stamps, "a finished shard was made again"
    return summary


@pytest.mark.parametrize("num_workers", ["2", "0"])
def test_a_killed_convert_equals_an_undisturbed_one(
    many_images: Path, shards: Path, own_ray: dict[str, str], tmp_path: Path, num_workers: str
) -> None:
    """Its Ray dies with it, and so do the workers without Ray."""
    out = tmp_path / "out"
    arguments = ["convert", str(many_images), str(out), "--shard-size", SHARD_SIZE]
    arguments += ["--num-workers", num_workers]
    summary = disturb(arguments, out, own_ray)
    assert summary["listed"] == summary["done"] == NUM_MANY
    assert read_parts(out) == read_parts(shards)
    assert not list(out.glob("*/.writing-*")), "a killed writer left its file behind"


@pytest.mark.parametrize("where", ["env", "own_ray"])
def test_a_killed_score_equals_an_undisturbed_one(
    request: pytest.FixtureRequest, many_images: Path, scores: Path, tmp_path: Path, where: str
) -> None:
    """A cluster lives on, and with it, for a moment, its workers."""
    env, out = request.getfixturevalue(where), tmp_path / "out"
    arguments = ["score", str(many_images), str(out), "--shard-size", SHARD_SIZE]
    summary = disturb(arguments, out, env)
    assert summary["listed"] == summary["done"] == NUM_MANY
    assert read_parts(out) == read_parts(scores)


def train_arguments(shards: Path, run: Path, num_workers: str) -> list[str]:
    options = ["--num-workers", num_workers, "--epochs", "4", "--batch-size", "100"]
    cache = ["--cache-dir", str(shards.parent / "cache"), "--cpus-per-worker", "1"]
    return ["train", str(shards), str(run), *options, *cache]


@pytest.fixture(scope="module")
def trained(shards: Path, own_ray: dict[str, str]) -> tuple[dict[str, Any], bytes]:
    """The summary and the weights of an undisturbed training."""
    run = shards.parent / "trained"
    summary = finish_command(train_arguments(shards, run, "0"), own_ray)
    return summary, read_weights(run)


def read_weights(run: Path) -> bytes:
    return (run / "bundle" / "model.safetensors").read_bytes()


def read_lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize(("workers", "kills"), [("0", (1, 2, 3)), ("1", (2,))])
def test_a_killed_training_takes_the_same_steps(
    shards: Path,
    trained: tuple[dict[str, Any], bytes],
    own_ray: dict[str, str],
    tmp_path: Path,
    workers: str,
    kills: tuple[int, ...],
) -> None:
    run, history = tmp_path / "run", tmp_path / "run" / "history.jsonl"
    for epochs in kills:  # once so many are committed, somewhere in the next
        process = start_command(train_arguments(shards, run, workers), own_ray)
        kill_once(process, lambda epochs=epochs: len(read_lines(history)) >= epochs, 0.1)
        assert not (run / "_SUCCESS").exists(), "it was over before it could be killed"
    summary = finish_command(train_arguments(shards, run, workers), own_ray)
    whole, weights = trained
    assert summary["steps"] == whole["steps"]
    assert read_weights(run) == weights


def test_a_killed_search_tries_the_same_trials_and_trains_no_epoch_twice(
    shards: Path, own_ray: dict[str, str], env: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "space.yaml").write_text("lr: {loguniform: [0.0005, 0.02]}\n")
    (tmp_path / "recipe.yaml").write_text("epochs: 3\nbatch_size: 100\n")

    def arguments(run: Path) -> list[str]:
        files = [f"--search={tmp_path / 'space.yaml'}", f"--recipe={tmp_path / 'recipe.yaml'}"]
        cache = ["--cache-dir", str(shards.parent / "cache")]
        trials = ["--trials", "4", "--scheduler", "none"]
        return ["tune", str(shards), str(run), *files, *cache, *trials]

    def read_epochs(run: Path) -> dict[str, list[str]]:
        found = sorted(run.glob("trials/*/run-0/history.jsonl"))
        return {path.parts[-3]: read_lines(path) for path in found}

    whole = finish_command(arguments(tmp_path / "whole"), env)
    run = tmp_path / "run"
    for num_epochs in (2, 7):  # over all trials, when it is killed
        process = start_command(arguments(run), own_ray)
        kill_once(
            process,
            lambda wanted=num_epochs: sum(map(len, read_epochs(run).values())) >= wanted,
            0.1,
        )
        assert not (run / "_SUCCESS").exists(), "it was over before it could be killed"
    before = read_epochs(run)
    summary = finish_command(arguments(run), env)
    after = read_epochs(run)
    for trial, rows in before.items():
        assert after[trial][: len(rows)] == rows, "an epoch was trained twice"
    assert {name: len(rows) for name, rows in after.items()} == dict.fromkeys(after, 3)
    for name in ("trials", "best_trial", "best", "chosen", "epochs", "steps"):
        assert summary[name] == whole[name]
    assert read_weights(run) == read_weights(tmp_path / "whole")
