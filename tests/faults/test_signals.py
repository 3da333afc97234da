"""Ctrl-C and SIGTERM while Ray works: the promised exit code, one line, one JSON object."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from benchmarks.interrupts import find_fault, start_group
from faults.command import wait_until

pytestmark = pytest.mark.timeout(600)


def start(command: list[str], env: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "cifake_ray", *command, "--json"],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # pytest in the background of a shell has SIGINT ignored, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def interrupt(
    command: list[str],
    env: dict[str, str],
    is_time: Callable[[], object],
    number: signal.Signals,
    code: int,
) -> str:
    """What a command says that is sent a signal when it is time."""
    process = start(command, env)
    wait_until(is_time)
    os.kill(process.pid, number)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == code, errors
    assert json.loads(output)["exit_code"] == code
    assert "run the same command again" in errors
    return errors


@pytest.mark.parametrize(
    ("number", "code", "ray", "options"),
    [
        (signal.SIGINT, 130, "own_ray", ["--num-workers", "2"]),
        (signal.SIGINT, 130, "own_ray", []),
        (signal.SIGTERM, 143, "env", []),
    ],
)
def test_a_signal_during_the_work_ends_it_with_a_word(
    request: pytest.FixtureRequest,
    many_images: Path,
    tmp_path: Path,
    number: signal.Signals,
    code: int,
    ray: str,
    options: list[str],
) -> None:
    """With a Ray that ends too, without one, and on a cluster that stays."""
    env, out = request.getfixturevalue(ray), tmp_path / "out"
    command = ["score", str(many_images), str(out), "--shard-size", "20", *options]
    errors = interrupt(command, env, lambda: list(out.glob("scores/part-*")), number, code)
    assert "Traceback" not in errors, "a thread of ours was told of Ray's end"
    assert not (out / "_SUCCESS").exists()


@pytest.mark.parametrize(
    ("verb", "options", "number"),
    [
        ("score", ["--num-workers", "2"], signal.SIGTERM),
        ("score", [], signal.SIGINT),
        ("train", ["--epochs", "500", "--num-workers", "1"], signal.SIGINT),
        ("train", ["--epochs", "500"], signal.SIGTERM),
    ],
)
def test_a_signal_to_the_whole_group_at_any_moment_ends_it_with_a_word(
    many_images: Path,
    shards: Path,
    own_ray: dict[str, str],
    tmp_path: Path,
    verb: str,
    options: list[str],
    number: signal.Signals,
) -> None:
    """Ray's own processes are told too, and Ray ends a process that has lost them."""
    options = options + ["--cache-dir", str(tmp_path)] * (verb == "train")
    source = {"score": many_images, "train": shards}[verb]
    command = [verb, str(source), str(tmp_path / "out"), *options]
    process = start_group(command, own_ray, tmp_path / "errors")
    latest_s = 8 if options else 4  # without Ray it is soon over
    time.sleep(random.Random(f"{verb} {number}").uniform(1, latest_s))
    os.killpg(process.pid, number)
    assert find_fault(process, tmp_path / "errors", number) is None


def test_training_ends_even_when_nobody_is_left_to_read(
    shards: Path, own_ray: dict[str, str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = ["train", str(shards), str(run), "--epochs", "500", "--cache-dir", str(tmp_path)]
    process = start(command, own_ray)
    wait_until((run / "history.jsonl").exists)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    process.stderr.close()
    process.terminate()
    assert process.wait(timeout=60) == 143


def test_a_search_ends_with_a_word_and_its_threads_start_no_other_ray(
    shards: Path, own_ray: dict[str, str], tmp_path: Path
) -> None:
    run, cache = tmp_path / "run", tmp_path / "cache"
    command = ["tune", str(shards), str(run), "--cache-dir", str(cache), "--epochs", "500"]
    errors = interrupt(
        command,
        own_ray,
        lambda: list(run.glob("trials/*/run-0/history.jsonl")),
        signal.SIGINT,
        130,
    )
    assert "SIGTERM handler" not in errors, "Ray was started by a thread"
    assert not (run / "_SUCCESS").exists()
