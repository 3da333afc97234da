"""Containers as Docker makes them: little shared memory, a home that cannot be written, and two of
them, which do not see each other's processes, on one output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from faults.command import read_parts
from faults.conftest import NUM_IMAGES, SHARD_SIZE

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root makes containers"),
]

SMALL = "mount -t tmpfs -o size=64m tmpfs /dev/shm"  # Docker's default
DEVICES = "null zero full random urandom tty"
NONE = f"""
mkdir $BOX/dev && mount -t tmpfs tmpfs $BOX/dev
for name in {DEVICES}; do cp -a /dev/$name $BOX/dev/; done
ln -s /proc/self/fd $BOX/dev/fd
mount --bind $BOX/dev /dev
"""
READ_ONLY_HOME = "export HOME=$BOX/home; mkdir $HOME && mount -t tmpfs -o ro tmpfs $HOME"


def start_contained(
    name: str, box: Path, prepare: str, arguments: list[str], env: dict[str, str]
) -> subprocess.Popen[str]:
    """The command with mounts, processes, and a host name of its own."""
    box.mkdir()
    script = f'set -e\nhostname {name}\n{prepare}\nexec "$@"'
    enter = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
    command = [sys.executable, "-m", "cifake_ray", *arguments, "--json"]
    return subprocess.Popen(
        [*enter, "sh", "-c", script, "sh", *command],
        env={**env, "BOX": str(box)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    "prepare",
    [
        pytest.param(SMALL, id="small"),
        pytest.param(f"{SMALL}; cat /dev/zero > /dev/shm/full 2> /dev/null || true", id="full"),
        pytest.param(f"{READ_ONLY_HOME}; {NONE}", id="none, and nothing at home"),
    ],
)
def test_it_works_with_whatever_shared_memory_there_is(
    images: Path, clean: dict[str, Path], own_ray: dict[str, str], tmp_path: Path, prepare: str
) -> None:
    out = tmp_path / "out"
    arguments = ["score", str(images), str(out), "--shard-size", SHARD_SIZE]
    process = start_contained("box", tmp_path / "box", prepare, arguments, own_ray)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert json.loads(output)["done"] == NUM_IMAGES
    assert read_parts(out) == read_parts(clean["score"])


def test_two_containers_on_one_output_leave_one_set_of_rows(
    images: Path, clean: dict[str, Path], own_ray: dict[str, str], tmp_path: Path
) -> None:
    """Each with temporary files of its own, as a shared disk is all that they have in common."""
    out = tmp_path / "out"
    arguments = ["score", str(images), str(out), "--shard-size", SHARD_SIZE]
    processes = [
        start_contained(
            name, tmp_path / name, "mkdir $BOX/tmp; export TMPDIR=$BOX/tmp", arguments, own_ray
        )
        for name in ("one", "two")
    ]
    for process in processes:
        output, errors = process.communicate(timeout=500)
        assert process.returncode == 0, errors
        summary = json.loads(output)
        assert (summary["listed"], summary["done"]) == (NUM_IMAGES, NUM_IMAGES)
    assert read_parts(out) == read_parts(clean["score"])
    assert not [path.name for path in out.rglob(".writing-*")]
    assert not (out / "_attempts").exists()
