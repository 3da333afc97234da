"""Code among the images never runs, wherever a command is started."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(600)

NAMES = ("numpy", "torch", "pandas", "pyarrow", "timm", "PIL", "yaml", "psutil", "uvloop", "score")


@pytest.mark.parametrize("ray", ["own_ray", "env"])
def test_code_among_the_images_is_never_run(
    request: pytest.FixtureRequest, images: Path, tmp_path: Path, ray: str
) -> None:
    """Neither by a Ray that is started there nor by a cluster, nor by a package beside a module."""
    folder = tmp_path / "images"
    folder.mkdir()
    for image in sorted(images.rglob("*.*"))[:20]:
        shutil.copy(image, folder)
    trap = f"open({str(tmp_path / 'executed')!r}, 'a').write(__name__); raise RuntimeError"
    for name in NAMES:
        (folder / f"{name}.py").write_text(trap)
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(trap)
    command = [sys.executable, "-m", "cifake_ray", "score", ".", str(tmp_path / "out"), "--json"]
    ended = subprocess.run(
        [*command, "--exclude", "*.py"],
        cwd=folder,
        env=request.getfixturevalue(ray),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["done"] == 20
    assert not (tmp_path / "executed").exists()
