"""The demo as a new user meets it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_the_demo_learns_the_sample_and_leaves_a_report(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    process = subprocess.run(
        [sys.executable, "-m", "cifake_ray", "demo", "--out", str(out), "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")},
    )
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout)
    print(f"demo: accuracy {result['accuracy']:.1%} on {result['test_images']} test images")
    assert result["accuracy"] > 0.85
    assert (out / "report" / "report.html").exists()
    for name in ("shards", "run", "report", "scores"):
        assert (out / name / "_SUCCESS").exists()
