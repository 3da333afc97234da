"""Training whose workers or nodes die: the same steps on the same images, with who is left."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faults.command import (
    end_command,
    find_workers,
    finish_command,
    start_command,
    wait_until,
)
from ray.cluster_utils import Cluster
from ray_head import JobsCluster

pytestmark = pytest.mark.timeout(600)

CHECKPOINT_STEPS = "7"  # of some 90 in an epoch
START_TIMEOUT_S = "10"  # Ray Train waits so long for workers of a node not yet known to be dead
NOTICE_S = 10  # before a spot node goes; clouds give 30 to 120


def make_arguments(shards: Path, run: Path, num_workers: str, *options: str) -> list[str]:
    words = ["train", str(shards), str(run), "--num-workers", num_workers, *options]
    words += ["--batch-size", "16", "--checkpoint-steps", CHECKPOINT_STEPS]
    return [*words, "--cpus-per-worker", "1", "--cache-dir", str(shards.parent / "cache")]


def finish(process: Any) -> dict[str, Any]:
    code, result, errors = end_command(process)
    assert code == 0, errors
    return result


def read_history(run: Path) -> list[dict[str, Any]]:
    path = run / "history.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def drop_timings(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.endswith("_s")} for row in history]


def test_a_worker_killed_within_an_epoch_goes_on_from_there(
    shards: Path, head: JobsCluster, env: dict[str, str], tmp_path: Path
) -> None:
    """Equal weights are equal steps on equal images; the checkpoint says they were not redone."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    options = ("--epochs", "3")
    finish_command(make_arguments(shards, whole, "2", *options), env)
    process = start_command(make_arguments(shards, run, "2", *options), env)
    checkpoint = run / "checkpoints" / "last.pt"
    wait_until(checkpoint.exists)
    first = find_workers(head.pid, "RayTrainWorker")
    assert len(first) == 2
    first[1].kill()
    wait_until(
        lambda: {p.pid for p in find_workers(head.pid, "RayTrainWorker")} - {p.pid for p in first}
    )
    summary = finish(process)
    assert summary["steps"] == json.loads((whole / "_SUCCESS").read_text())["steps"]
    assert drop_timings(read_history(run)) == drop_timings(read_history(whole))
    weights = [path / "bundle" / "model.safetensors" for path in (run, whole)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Two machines with one CPU each."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    yield cluster
    cluster.shutdown()


def test_elastic_training_goes_on_with_the_node_that_is_left(
    shards: Path, two_nodes: Cluster, own_ray: dict[str, str], tmp_path: Path
) -> None:
    run, epochs = tmp_path / "run", 4
    options = ("--epochs", str(epochs), "--address", two_nodes.address)
    waits = {**own_ray, "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": START_TIMEOUT_S}
    process = start_command(make_arguments(shards, run, "1:2", *options), waits)
    wait_until(lambda: read_history(run))
    (node,) = two_nodes.worker_nodes
    two_nodes.remove_node(node, allow_graceful=False)
    summary = finish(process)
    workers = [row["workers"] for row in read_history(run)]
    assert workers[0] == 2
    assert workers[-1] == 1
    assert summary["epochs"] == epochs
    assert summary["steps"] == epochs * (summary["train_images"] // 16)


def test_a_spot_node_that_is_taken_away_in_time_is_no_failure(
    shards: Path, two_nodes: Cluster, own_ray: dict[str, str], tmp_path: Path
) -> None:
    """Ray is told before the node goes, as by `ray start --block` or its autoscaler."""
    run, epochs = tmp_path / "run", 4
    options = ("--epochs", str(epochs), "--address", two_nodes.address, "--max-failures", "0")
    waits = {**own_ray, "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": START_TIMEOUT_S}
    process = start_command(make_arguments(shards, run, "1:2", *options), waits)
    wait_until(lambda: read_history(run))
    (node,) = two_nodes.worker_nodes
    drain = ["ray.scripts.scripts", "drain-node", "--address", two_nodes.address]
    drain += ["--node-id", node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    drain += ["--reason-message", "spot", "--deadline-remaining-seconds", str(NOTICE_S)]
    subprocess.run([sys.executable, "-m", *drain], env=own_ray, check=True)
    time.sleep(NOTICE_S)
    two_nodes.remove_node(node, allow_graceful=False)
    summary = finish(process)
    assert summary["epochs"] == epochs
    assert read_history(run)[-1]["workers"] == 1


def test_a_search_loses_no_trial_and_no_epoch_with_a_node(
    shards: Path, two_nodes: Cluster, own_ray: dict[str, str], tmp_path: Path
) -> None:
    run, epochs = tmp_path / "run", 6
    (tmp_path / "space.yaml").write_text("lr: {loguniform: [0.0005, 0.02]}\n")
    (tmp_path / "recipe.yaml").write_text(f"epochs: {epochs}\nbatch_size: 16\n")
    words = ["tune", str(shards), str(run), "--scheduler", "none", "--trials", "3"]
    words += ["--search", str(tmp_path / "space.yaml"), "--recipe", str(tmp_path / "recipe.yaml")]
    words += ["--cache-dir", str(shards.parent / "cache"), "--address", two_nodes.address]

    def read_trials() -> list[list[dict[str, Any]]]:
        folders = sorted(run.glob("trials/*/run-0"))
        return [read_history(folder) for folder in folders]

    process = start_command(words, own_ray)
    wait_until(lambda: sum(len(history) > 1 for history in read_trials()) == 2)
    before = read_trials()
    (node,) = two_nodes.worker_nodes
    two_nodes.remove_node(node, allow_graceful=False)
    summary = finish(process)
    assert summary["ends"] == {f"all {epochs} epochs done": 3}
    for known, history in zip(before, read_trials(), strict=False):
        assert history[: len(known)] == known, "an epoch was trained twice"
        assert [row["epoch"] for row in history] == list(range(1, epochs + 1))
