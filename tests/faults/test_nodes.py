"""Nodes and whole clusters that die: what is in storage is enough to go on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faults.command import (
    count_parts,
    end_command,
    read_parts,
    start_command,
    wait_until,
)
from faults.conftest import NUM_MANY, SHARD_SIZE
from ray.cluster_utils import Cluster

pytestmark = pytest.mark.timeout(600)

# A node is dead after five looks that nobody answers: 2.5 s, not Ray's 15.
QUICK_LOOKS = {"health_check_period_ms": 500}


def start(verb: str, source: Path, out: Path, env: dict[str, str], *options: str) -> Any:
    words = [verb, str(source), str(out), "--shard-size", SHARD_SIZE, *options]
    return start_command(words, env)


def finish(process: Any, code: int = 0, timeout_s: float = 300) -> dict[str, Any]:
    found, result, errors = end_command(process, timeout_s)
    assert found == code, errors
    return result


@pytest.fixture(scope="module")
def whole(scores: Path) -> dict[str, Any]:
    """The shards of an undisturbed run."""
    return read_parts(scores)


def start_head(num_cpus: int) -> Cluster:
    options = {"include_dashboard": False, "_system_config": QUICK_LOOKS}
    return Cluster(initialize_head=True, head_node_args={"num_cpus": num_cpus, **options})


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head with one CPU; a test adds the second node, and may kill it."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    cluster = start_head(num_cpus=1)
    yield cluster
    cluster.shutdown()


def test_a_node_that_dies_takes_no_row_with_it(
    many_images: Path,
    whole: dict[str, Any],
    two_nodes: Cluster,
    own_ray: dict[str, str],
    tmp_path: Path,
) -> None:
    node = two_nodes.add_node(num_cpus=1)
    two_nodes.wait_for_nodes()
    out = tmp_path / "out"
    process = start("score", many_images, out, own_ray, "--address", two_nodes.address)
    wait_until(lambda: count_parts(out) >= 10)
    two_nodes.remove_node(node, allow_graceful=False)
    summary = finish(process)
    assert summary["listed"] == summary["done"] == NUM_MANY
    assert read_parts(out) == whole


def test_a_run_whose_cluster_is_lost_goes_on_in_another(
    many_images: Path,
    whole: dict[str, Any],
    two_nodes: Cluster,
    own_ray: dict[str, str],
    env: dict[str, str],
    tmp_path: Path,
) -> None:
    two_nodes.add_node(num_cpus=1)
    two_nodes.wait_for_nodes()
    out = tmp_path / "out"
    process = start("score", many_images, out, own_ray, "--address", two_nodes.address)
    wait_until(lambda: count_parts(out) >= 10)
    for node in [*two_nodes.worker_nodes, two_nodes.head_node]:
        node.kill_all_processes(check_alive=False, allow_graceful=False)
    process.kill()
    process.communicate()
    done = count_parts(out)
    assert not (out / "_SUCCESS").exists()
    summary = finish(start("score", many_images, out, env, "--num-workers", "1"))
    assert summary["shards_resumed"] >= min(done, 10)
    assert summary["listed"] == summary["done"] == NUM_MANY
    assert read_parts(out) == whole


def test_a_run_that_cannot_be_placed_any_more_ends_and_says_so(
    many_images: Path,
    whole: dict[str, Any],
    own_ray: dict[str, str],
    env: dict[str, str],
    tmp_path: Path,
) -> None:
    """All CPUs are on the node that dies."""
    cluster = start_head(num_cpus=0)
    try:
        node = cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        out = tmp_path / "out"
        options = ("--address", cluster.address, "--stall-timeout-s", "15")
        process = start("score", many_images, out, own_ray, *options)
        wait_until(lambda: count_parts(out) >= 10)
        cluster.remove_node(node, allow_graceful=False)
        summary = finish(process, code=6, timeout_s=120)
    finally:
        cluster.shutdown()
    assert "no progress for 15 s" in summary["error"]
    assert "1 nodes alive with 0 CPUs" in summary["error"]
    assert "Run the same command again" in summary["error"]
    assert finish(start("score", many_images, out, env))["done"] == NUM_MANY
    assert read_parts(out) == whole


def test_a_cluster_whose_cpus_are_taken_is_waited_for_only_so_long(
    many_images: Path, own_ray: dict[str, str], tmp_path: Path, two_nodes: Cluster
) -> None:
    hog = """
import ray, sys, time
ray.init(address=sys.argv[1], log_to_driver=False)

@ray.remote(num_cpus=1)
def hold():
    print("held", flush=True)
    open(sys.argv[2], "w").close()
    time.sleep(600)

ray.get(hold.remote())
"""
    held = tmp_path / "held"
    script = hog.replace("sys.argv[2]", repr(str(held)))
    other = subprocess.Popen([sys.executable, "-c", script, two_nodes.address], env=own_ray)
    try:
        wait_until(held.exists)
        options = ("--address", two_nodes.address, "--stall-timeout-s", "5")
        summary = finish(start("convert", many_images, tmp_path / "out", own_ray, *options), code=6)
    finally:
        other.kill()
        other.wait()
    assert "no worker is at work on a shard" in summary["error"]
    assert "1 nodes alive with 1 CPUs, 0 of them free" in summary["error"]
