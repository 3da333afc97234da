"""The command as people run it: a process of its own, with one JSON object on stdout."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any


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
