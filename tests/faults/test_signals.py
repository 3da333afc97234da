"""Ctrl-C and SIGTERM while Ray works: the promised exit code, one line, one JSON object."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from faults.command import make_images, run_command, wait_until

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory, 3000)


def start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "cifake_ray", *command, "--json"],
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # pytest in the background of a shell has SIGINT ignored, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def interrupt(
    command: list[str], is_time: Callable[[], object], number: signal.Signals, code: int
) -> str:
    """What a command says that is sent a signal when it is time."""
    process = start(command)
    wait_until(is_time, 120)
    os.kill(process.pid, number)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == code, errors
    assert json.loads(output)["exit_code"] == code
    assert "run the same command again" in errors
    return errors


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_during_the_work_ends_it_with_a_word(
    images: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    out = tmp_path / "out"
    command = ["score", str(images), str(out), "--shard-size", "20"]
    errors = interrupt(command, lambda: list(out.glob("scores/part-*")), number, code)
    assert "Traceback" not in errors, "a thread of ours was told of Ray's end"
    assert not (out / "_SUCCESS").exists()


def test_training_ends_even_when_nobody_is_left_to_read(
    images: Path, env: dict[str, str], tmp_path: Path
) -> None:
    shards, run = tmp_path / "shards", tmp_path / "run"
    assert run_command(["convert", str(images), str(shards)], env)[0] == 0
    command = ["train", str(shards), str(run), "--epochs", "500", "--cache-dir", str(tmp_path)]
    process = start(command)
    wait_until((run / "history.jsonl").exists, 120)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    process.stderr.close()
    process.terminate()
    assert process.wait(timeout=60) == 143


def test_a_search_ends_with_a_word_and_its_threads_start_no_other_ray(
    images: Path, env: dict[str, str], tmp_path: Path
) -> None:
    shards, run, cache = tmp_path / "shards", tmp_path / "run", tmp_path / "cache"
    assert run_command(["convert", str(images), str(shards)], env)[0] == 0
    command = ["tune", str(shards), str(run), "--cache-dir", str(cache), "--epochs", "500"]
    errors = interrupt(
        command, lambda: list(run.glob("trials/*/run-0/history.jsonl")), signal.SIGINT, 130
    )
    assert "SIGTERM handler" not in errors, "Ray was started by a thread"
    assert not (run / "_SUCCESS").exists()
