"""What fits where, and what is refused before anything starts."""

from __future__ import annotations

import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

import cifake_ray
from cifake_ray.config import ClusterConfig
from cifake_ray.errors import ResourceError, UsageError
from cifake_ray.stages import cluster
from cifake_ray.stages.cluster import (
    Node,
    Placement,
    Resources,
    _check_address,
    connect_cluster,
    count_local_cpus,
    leave_cluster,
    place_workers,
    read_cpu_quota,
)


def place(nodes: list[tuple[int, int]], **options: object) -> Placement:
    defaults = {"num_workers": 1, "use_gpu": False, "cpus_per_worker": None}
    resources = Resources(tuple(Node(*node) for node in nodes))
    return place_workers(resources, **{**defaults, **options})  # type: ignore[arg-type]


def test_one_worker_gets_the_cpus_of_the_largest_node() -> None:
    assert place([(2, 0), (8, 0)]) == Placement(1, 8, 0)


def test_a_worker_is_never_spread_over_two_nodes() -> None:
    assert place([(3, 0), (3, 0)], num_workers=3) == Placement(3, 1, 0)
    assert place([(3, 0), (3, 0)], num_workers=2) == Placement(2, 3, 0)


def test_gpus_are_placed_where_there_are_cpus_for_them() -> None:
    assert place([(8, 4), (8, 0)], num_workers=4, use_gpu=True) == Placement(4, 2, 1)
    with pytest.raises(ResourceError, match="need 5 CPUs and 5 GPUs, the cluster has 16 CPUs"):
        place([(8, 4), (8, 0)], num_workers=5, use_gpu=True)


def test_what_does_not_fit_is_refused_with_the_numbers() -> None:
    with pytest.raises(ResourceError, match="3 workers need 3 CPUs, the cluster has 2 CPUs"):
        place([(2, 0)], num_workers=3)
    with pytest.raises(ResourceError, match="1 workers need 4 CPUs"):
        place([(2, 0), (2, 0)], num_workers=1, cpus_per_worker=4)


def test_an_address_where_nobody_listens_is_refused_at_once() -> None:
    with pytest.raises(ResourceError, match=r"no Ray cluster answers at .127\.0\.0\.1:1"):
        _check_address("127.0.0.1:1")


def test_credentials_in_an_address_are_refused_and_not_repeated() -> None:
    for address in ("me:CANARY@host:6379", "ray://me:CANARY@host:10001", "http://me:CANARY@host"):
        with pytest.raises(UsageError, match="holds credentials") as caught:
            _check_address(address)
        assert "CANARY" not in str(caught.value)


def test_the_address_of_a_jobs_api_is_for_submit() -> None:
    with pytest.raises(UsageError, match="cifake-ray submit"):
        _check_address("http://head:8265")


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/", {}, math.inf),
        ("0::/", {"cpu.max": "max 100000"}, math.inf),
        ("0::/", {"cpu.max": "250000 100000"}, 2.5),
        ("0::/pod/box", {"pod/cpu.max": "100000 50000", "pod/box/cpu.max": "max 100000"}, 2),
        ("0::/only/on/the/host", {"cpu.max": "300000 100000"}, 3),
        (
            "5:memory:/box\n4:cpu,cpuacct:/box\n0::/",
            {"cpu/box/cpu.cfs_quota_us": "400000", "cpu/box/cpu.cfs_period_us": "100000"},
            4,
        ),
        (
            "4:cpu,cpuacct:/host/box",
            {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"},
            0.5,
        ),
        ("4:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, math.inf),
    ],
)
def test_the_quota_of_a_container_is_read(
    tmp_path: Path, groups: str, files: dict[str, str], quota: float
) -> None:
    written = {"proc/self/cgroup": groups, **{f"sys/fs/cgroup/{n}": t for n, t in files.items()}}
    for name, text in written.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    assert read_cpu_quota(tmp_path) == quota


@pytest.mark.parametrize(("quota", "num_cpus"), [(math.inf, 64), (2.5, 2), (0.5, 1), (100.0, 64)])
def test_local_workers_are_as_many_as_the_container_may_use(
    monkeypatch: pytest.MonkeyPatch, quota: float, num_cpus: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.setattr(cluster, "read_cpu_quota", lambda: quota)
    assert count_local_cpus() == num_cpus


def test_after_a_failure_ray_ends_with_the_process_or_when_it_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its native code could end the process in the middle of the callers' clean-up."""
    started: list[dict[str, Any]] = []
    stopped: list[None] = []

    def start(**options: Any) -> Any:
        started.append(options)
        return SimpleNamespace(dashboard_url="")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", start)
    monkeypatch.setattr(ray, "nodes", lambda: [])
    monkeypatch.setattr(cluster, "stop_ray", lambda: stopped.append(None))
    for failure in (KeyboardInterrupt, ValueError):
        with pytest.raises(failure), connect_cluster(ClusterConfig(address="head")):
            raise failure
        assert not stopped
    leave_cluster()
    leave_cluster()
    assert len(stopped) == 1
    searched = started[0]["job_config"]._py_driver_sys_path
    searched.extend(["/images"])
    assert set(searched) <= {str(Path(cifake_ray.__file__).parents[1])}
