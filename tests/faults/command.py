"""The command as people run it: a process of its own, with one JSON object on stdout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray_head import JobsCluster

from cifake_ray.config import SampleConfig
from cifake_ray.storage.datasets.sample_folder import write_sample

# Runs on a cluster and without one are compared; by default the latter may be in int8.
SAME_PRECISION = {"CIFAKE_RAY_PRECISION": "float32"}


def make_images(factory: pytest.TempPathFactory, num_images: int) -> Path:
    """A folder with a sample of images."""
    folder = factory.mktemp("sample") / "images"
    return write_sample(SampleConfig(out=str(folder), images=num_images))


def make_env(**variables: str) -> dict[str, str]:
    """The environment of this moment, for a process of its own, which locks its Ray."""
    env = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}
    return {**env, **SAME_PRECISION, **variables}


def start_command(arguments: list[str], env: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "cifake_ray", *arguments, "--json"],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end_command(
    process: subprocess.Popen[str], timeout_s: float = 300
) -> tuple[int, dict[str, Any], str]:
    """Exit code, the JSON object and everything else that was said."""
    output, errors = process.communicate(timeout=timeout_s)
    assert output, errors
    return process.returncode, json.loads(output), errors


def run_command(arguments: list[str], env: dict[str, str]) -> tuple[int, dict[str, Any], str]:
    return end_command(start_command(arguments, env))


def finish_command(arguments: list[str], env: dict[str, str]) -> dict[str, Any]:
    """The JSON object of a command that succeeds."""
    code, result, errors = run_command(arguments, env)
    assert code == 0, errors
    return result


def join(head: JobsCluster) -> dict[str, str]:
    """The environment of a command that works on a cluster that is running."""
    return {**head.env, **SAME_PRECISION, "RAY_ADDRESS": head.ray_address}


def wait_until(condition: Callable[[], object], timeout_s: float = 240) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


def read_parts(out: Path) -> dict[str, pa.Table]:
    """The shards of a run by their names."""
    return {path.name: pq.read_table(path) for path in sorted(out.glob("*/part-*"))}


def count_parts(out: Path) -> int:
    return len(list(out.glob("*/part-*")))


def find_workers(pid: int | None, name: str) -> list[psutil.Process]:
    """The processes of Ray below a command or a head whose names hold a word."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        try:
            if any(name in word for word in child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found
