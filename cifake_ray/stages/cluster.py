"""Connects to Ray and says what it has; refuses at once what it cannot place.

Floor: stages.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray

from cifake_ray.errors import ResourceError


@dataclass(frozen=True)
class Resources:
    """What the cluster has in all, and on its largest node."""

    num_cpus: int
    num_gpus: int
    num_nodes: int
    max_node_cpus: int


@contextmanager
def connect_cluster(address: str | None) -> Iterator[Resources]:
    """The cluster at `address`, or RAY_ADDRESS, or one started here and stopped at the end.

    A Ray that is running already in this process is used and left running.
    ResourceError when the address does not answer.
    """
    if ray.is_initialized():
        yield read_resources()
        return
    # Ray's own chatter; what goes wrong comes to us as an exception, and all of it is in its logs.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {"address": address}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options["include_dashboard"] = False
        options["num_cpus"] = count_local_cpus()
    try:
        with _hold_stderr():
            ray.init(logging_level=logging.ERROR, log_to_driver=False, **options)
    except (ConnectionError, ValueError) as error:
        raise ResourceError(
            f"no Ray cluster answers at {address!r} ({str(error).splitlines()[0]}); check"
            " --address and RAY_ADDRESS, or leave both out to start Ray here"
        ) from error
    try:
        yield read_resources()
    finally:
        ray.shutdown()


@contextmanager
def _hold_stderr() -> Iterator[None]:
    """Keep Ray's native code from greeting on the terminal; what it said is shown if it fails."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held:
        terminal = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(terminal, held.read())
            raise
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)


def read_resources() -> Resources:
    """What the connected cluster has now."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    return Resources(
        num_cpus=int(sum(node.get("CPU", 0) for node in nodes)),
        num_gpus=int(sum(node.get("GPU", 0) for node in nodes)),
        num_nodes=len(nodes),
        max_node_cpus=int(max((node.get("CPU", 0) for node in nodes), default=0)),
    )


@dataclass(frozen=True)
class Placement:
    """What every worker of a plan gets."""

    num_workers: int
    cpus_per_worker: int
    gpus_per_worker: int


def place_workers(
    resources: Resources,
    *,
    num_workers: int | None,
    use_gpu: bool,
    cpus_per_worker: int | None = None,
    default_workers: int,
) -> Placement:
    """Share the cluster out. ResourceError, with the numbers, when it is too small."""
    wanted = num_workers or default_workers
    if use_gpu and wanted > resources.num_gpus:
        raise ResourceError(
            f"{wanted} workers need {wanted} GPUs, the cluster has {resources.num_gpus}; lower"
            " --num-workers, or use --device cpu"
        )
    shared = max(1, resources.num_cpus // wanted)
    cpus = cpus_per_worker or min(shared, max(1, resources.max_node_cpus))
    if wanted * cpus > resources.num_cpus or cpus > resources.max_node_cpus:
        raise ResourceError(
            f"{wanted} workers with {cpus} CPUs each need {wanted * cpus} CPUs, the cluster has"
            f" {resources.num_cpus} (at most {resources.max_node_cpus} on a node); lower"
            " --num-workers"
        )
    return Placement(wanted, cpus, 1 if use_gpu else 0)


def count_local_cpus() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_gpu(device: str, resources: Resources) -> bool:
    """Whether workers use GPUs. ResourceError when they are asked for and there are none."""
    if device == "cuda" and not resources.num_gpus:
        raise ResourceError("--device cuda: the cluster has no GPU; use --device cpu")
    return device == "cuda" or (device == "auto" and resources.num_gpus > 0)
