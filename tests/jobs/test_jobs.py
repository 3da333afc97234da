"""Each job file is the command of its verb."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

JOBS = Path(__file__).parents[2] / "jobs"


@pytest.mark.parametrize(
    "verb", ["audit", "convert", "train", "tune", "evaluate", "score", "pipeline"]
)
def test_a_job_takes_the_options_of_its_verb(verb: str) -> None:
    job = [sys.executable, str(JOBS / f"{verb}.py"), "--help"]
    command = [sys.executable, "-m", "cifake_ray", verb, "--help"]
    texts = [
        subprocess.run(line, capture_output=True, text=True, check=True).stdout
        for line in (job, command)
    ]
    assert texts[0] == texts[1]
    assert "--address" in texts[0]


def test_a_wrong_option_ends_a_job_with_code_2() -> None:
    job = [sys.executable, str(JOBS / "score.py"), "somewhere", "--no-such-option"]
    assert subprocess.run(job, capture_output=True).returncode == 2
