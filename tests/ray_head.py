"""A cluster with a locked door: real `ray start` processes, the Jobs API and a token."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import requests
from s3_server import find_ports

START_S = 90.0
IDLE_S = 60.0
TOKEN = "a-token-of-the-tests-0123456789abcdef"


@dataclass(frozen=True)
class JobsCluster:
    """Where its Jobs API and Ray itself are, and the environment of one who may use them."""

    address: str
    ray_address: str
    env: dict[str, str]
    temp_dir: Path | None = None  # of the head, on this machine
    pid: int | None = None  # likewise


def make_env(folder: Path, **variables: str) -> dict[str, str]:
    """The environment of a node, or of one who may use the cluster."""
    (folder / "token").write_text(TOKEN)
    (folder / "token").chmod(0o600)
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return env | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "MALLOC_ARENA_MAX": "1",
        # Jobs are started by `python`, which is the one of the head's PATH.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        **variables,
    }


@contextmanager
def run_node(
    words: Sequence[str], env: dict[str, str], log: Path, enter: Sequence[str] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """`ray start`, ended by its process ids: other clusters here are left alone.

    `enter` stands before the command, to run it on another host.
    """
    command = [*enter, sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *words]
    with open(log, "wb") as output:
        node = subprocess.Popen(command, env=env, stdout=output, stderr=output)
    try:
        yield node
    finally:
        with suppress(psutil.NoSuchProcess):
            for process in psutil.Process(node.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        node.kill()
        node.wait()


@contextmanager
def run_head(
    folder: Path,
    *,
    num_cpus: int = 2,
    num_gpus: int = 0,
    store_bytes: int = 100_000_000,
    worker_types: dict[str, Any] | None = None,
    variables: dict[str, str] | None = None,
) -> Iterator[JobsCluster]:
    """A head on loopback, with an object store of `store_bytes` and GPUs that only Ray believes in.

    With `worker_types` an autoscaler starts nodes of them, each a raylet on this machine.
    """
    env = make_env(folder, **(variables or {}))
    port, dashboard, agent = find_ports(3)
    ray_address = f"127.0.0.1:{port}"
    words = ["--head", "--node-ip-address", "127.0.0.1", "--port", str(port)]
    words += ["--dashboard-port", str(dashboard), "--num-cpus", str(num_cpus)]
    words += ["--num-gpus", str(num_gpus)]
    words += ["--object-store-memory", str(store_bytes)]
    words += ["--dashboard-agent-listen-port", str(agent)]
    if worker_types is not None:
        (folder / "scaling.json").write_text(
            json.dumps(make_scaling(ray_address, num_cpus, worker_types))
        )
        words += ["--autoscaling-config", str(folder / "scaling.json")]
        env |= {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    address = f"http://127.0.0.1:{dashboard}"
    with tempfile.TemporaryDirectory(prefix="ray-") as temp_dir:  # names of sockets must be short
        words += ["--temp-dir", temp_dir]
        with run_node(words, env, folder / "head.log") as head:
            wait_for_jobs(address, head, folder / "head.log")
            yield JobsCluster(address, ray_address, env, Path(temp_dir), head.pid)


def make_scaling(address: str, num_cpus: int, worker_types: dict[str, Any]) -> dict[str, Any]:
    """For Ray's own provider of nodes that are raylets on the machine of the head."""
    head = {"resources": {"CPU": num_cpus}, "node_config": {}, "max_workers": 0}
    return {
        "cluster_name": "test",
        "max_workers": 8,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": address,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {"ray.head.default": head, **worker_types},
        "head_node_type": "ray.head.default",
        "idle_timeout_minutes": 1,
        "upscaling_speed": 1.0,
        "auth": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "head_node": {},
        **{f"{node}_start_ray_commands": [] for node in ("head", "worker")},
        **{f"{node}_setup_commands": [] for node in ("head", "worker")},
        "initialization_commands": [],
        "setup_commands": [],
    }


def wait_for_jobs(address: str, head: subprocess.Popen[bytes], log: Path) -> None:
    until_s = time.monotonic() + START_S
    headers = {"Authorization": f"Bearer {TOKEN}"}
    while time.monotonic() < until_s:
        assert head.poll() is None, log.read_text()
        try:
            if requests.get(f"{address}/api/jobs/", headers=headers, timeout=5).ok:
                return
        except requests.RequestException:
            pass
        time.sleep(0.5)
    raise AssertionError(log.read_text())


def wait_for_idle(cluster: JobsCluster) -> None:
    """Return once nothing holds a CPU there: what a killed driver started is gone."""
    until_s = time.monotonic() + IDLE_S
    while held := [*list_states(cluster, "actors"), *list_states(cluster, "placement_groups")]:
        assert time.monotonic() < until_s, held
        time.sleep(0.2)


def list_states(cluster: JobsCluster, kind: str) -> list[dict[str, Any]]:
    """The actors that hold resources, or the placement groups, that are not gone."""
    # Ray Data's own actors stay, and hold nothing.
    return [
        state
        for state in read_states(cluster, kind)
        if state["state"] not in ("DEAD", "REMOVED") and state.get("required_resources", True)
    ]


def read_states(cluster: JobsCluster, kind: str) -> list[dict[str, Any]]:
    """What Ray tells of all its actors or placement groups, those that are gone included."""
    url = f"{cluster.address}/api/v0/{kind}?detail=true&limit=10000"
    answer = requests.get(url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=30)
    states: list[dict[str, Any]] = answer.json()["data"]["result"]["result"]
    return states
