"""Images, their undisturbed runs, and the environments of the commands that these tests run.

Most commands work on one cluster that all tests share (`env`). Those that a test kills with their
Ray, or that have to start one, get the environment `own_ray`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from faults.command import finish_command, join, make_env, make_images
from ray_head import JobsCluster

NUM_IMAGES = 200
NUM_MANY = 2_000  # so many that a run can be disturbed before it is over
SHARD_SIZE = "40"


@pytest.fixture(autouse=True)
def no_command_outlives_its_test() -> Iterator[None]:
    """A command that a failed test has left would take the CPUs of those that follow."""
    yield
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if "cifake_ray" in child.cmdline():
                child.kill()


@pytest.fixture(scope="session")
def own_ray() -> dict[str, str]:
    """For a command that starts its own Ray."""
    return make_env()


@pytest.fixture
def env(head: JobsCluster) -> dict[str, str]:
    """For a command that works on the shared cluster, with the rights of the S3 server's
    administrator."""
    return join(head)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NUM_IMAGES images; not to be changed."""
    return make_images(tmp_path_factory, NUM_IMAGES)


@pytest.fixture(scope="session")
def many_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NUM_MANY images; not to be changed."""
    return make_images(tmp_path_factory, NUM_MANY)


def run_undisturbed(verb: str, images: Path, head: JobsCluster) -> Path:
    out = images.parent / verb
    summary = finish_command([verb, str(images), str(out), "--shard-size", SHARD_SIZE], join(head))
    assert summary["done"] == summary["listed"]
    assert summary["shards_retried"] == 0
    return out


@pytest.fixture(scope="session")
def clean(images: Path, running_head: JobsCluster) -> dict[str, Path]:
    """Undisturbed runs over `images`, by verb."""
    return {verb: run_undisturbed(verb, images, running_head) for verb in ("convert", "score")}


@pytest.fixture(scope="session")
def shards(many_images: Path, running_head: JobsCluster) -> Path:
    """`many_images`, converted without a disturbance."""
    return run_undisturbed("convert", many_images, running_head)


@pytest.fixture(scope="session")
def scores(many_images: Path, running_head: JobsCluster) -> Path:
    """`many_images`, scored without a disturbance."""
    return run_undisturbed("score", many_images, running_head)
