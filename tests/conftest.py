"""What several test files stand on: images to work with, and one Ray for the whole session."""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from cifake_ray.config import SampleConfig
from cifake_ray.storage.samples import write_sample

# Images taken from each folder of CIFAKE: 4,000 in all.
CIFAKE_QUOTA = {"train/REAL": 1500, "train/FAKE": 1500, "test/REAL": 500, "test/FAKE": 500}


@pytest.fixture(scope="session")
def sample_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 labelled images, 48 of them for training; not to be changed by a test."""
    return write_sample(
        SampleConfig(out=str(tmp_path_factory.mktemp("sample") / "images"), images=60)
    )


@pytest.fixture(scope="session")
def cifake_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first images of each folder of the real CIFAKE set, balanced; not to be changed."""
    archive = Path(os.environ.get("CIFAKE_TEST_DATA", "")) / "cifake.tar.xz"
    if not archive.is_file():
        pytest.skip("CIFAKE_TEST_DATA names no folder with cifake.tar.xz")
    out = tmp_path_factory.mktemp("cifake")
    taken: Counter[str] = Counter()
    with tarfile.open(archive, "r|xz") as members:
        for member in members:
            folder = member.name.removeprefix("./").rpartition("/")[0]
            if not member.isfile() or taken[folder] >= CIFAKE_QUOTA.get(folder, 0):
                continue
            members.extract(member, out, filter="data")
            taken[folder] += 1
            if taken == CIFAKE_QUOTA:
                break
    assert taken == CIFAKE_QUOTA
    return out


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A Ray of two CPUs in this process, started once; whatever connects to a cluster finds it."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
