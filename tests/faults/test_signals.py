"""Ctrl-C and SIGTERM while Ray works: the promised exit code, one line, one JSON object."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults.command import make_images

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory, 3000)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_during_the_work_ends_it_with_a_word(
    images: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    out = tmp_path / "out"
    command = ["score", str(images), str(out), "--shard-size", "20", "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "cifake_ray", *command],
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # pytest in the background of a shell has SIGINT ignored, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 120
    while not list(out.glob("scores/part-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, number)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == code, errors
    assert json.loads(output)["exit_code"] == code
    assert "run the same command again" in errors
    assert not (out / "_SUCCESS").exists()
