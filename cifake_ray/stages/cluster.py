"""Connects to Ray and says what it has; refuses at once what it cannot place."""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any, NamedTuple

import ray
from ray.autoscaler.sdk import request_resources

from cifake_ray.config import ClusterConfig, Device
from cifake_ray.errors import ResourceError

POLL_S = 1.0  # between two looks at what an autoscaler has done
ASK_AGAIN_S = 30.0
TOKEN_REMEDY = (
    "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the file with the cluster's token"
)


class Node(NamedTuple):
    """What one machine gives to Ray."""

    num_cpus: int
    num_gpus: int


@dataclass(frozen=True)
class Resources:
    """What the cluster has."""

    nodes: tuple[Node, ...]

    @property
    def num_cpus(self) -> int:
        return sum(node.num_cpus for node in self.nodes)

    @property
    def num_gpus(self) -> int:
        return sum(node.num_gpus for node in self.nodes)

    def count_places(self, cpus: int, gpus: int) -> int:
        """How many workers of that size fit; a worker cannot be spread over two nodes."""
        return sum(
            min(node.num_cpus // cpus, node.num_gpus // gpus if gpus else node.num_cpus)
            for node in self.nodes
        )


@dataclass(frozen=True)
class Placement:
    """What every worker of a plan gets."""

    num_workers: int
    cpus_per_worker: int
    gpus_per_worker: int
    num_feeders: int = 0  # tasks at once, of one CPU each, that decode for a worker with a GPU


ONE_WORKER = Placement(1, 1, 0)


@contextmanager
def connect_cluster(
    config: ClusterConfig,
    least: Placement = ONE_WORKER,
    log: Callable[[str], None] = lambda message: None,
) -> Iterator[Resources]:
    """The cluster at `config.address`, or RAY_ADDRESS, or one started here and stopped at the end.

    A Ray that is running already in this process is used and left running. With a
    `config.scale_timeout_s` an autoscaler is asked to make room for `least`.
    ResourceError when the address does not answer, and before Ray is started here if this machine
    has fewer CPUs than `least` has workers.
    """
    if ray.is_initialized():
        yield _make_room(least, config.scale_timeout_s, log)
        return
    # Ray's own chatter; what goes wrong comes to us as an exception, and all of it is in its logs.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    address = config.address or os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {"address": address}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Workers compute in threads. With an arena for each, glibc maps their buffers anew at every
        # batch; in the main arena it keeps them: see `workers.keep_freed_memory`.
        os.environ.setdefault("MALLOC_ARENA_MAX", "1")
        options["include_dashboard"] = False
        options["num_cpus"] = count_local_cpus()
        here = Resources((Node(count_local_cpus(), 0),))
        place_workers(
            here,
            num_workers=least.num_workers,
            use_gpu=False,
            cpus_per_worker=1,
            default_workers=1,
        )
    _check_address(address)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with _hold_stderr():
            context = ray.init(logging_level=logging.ERROR, log_to_driver=False, **options)
    except (ConnectionError, ValueError) as error:
        raise ResourceError(
            f"no Ray cluster answers at {address!r} ({str(error).splitlines()[0]}); check"
            " --address and RAY_ADDRESS, or leave both out to start Ray here"
        ) from error
    if context.dashboard_url:
        log(f"Ray's dashboard: http://{context.dashboard_url}")
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():  # Ray puts its own in their place
            signal.signal(number, handler)
    # Ray tells of workers that died on stdout, which is for results; at the latest in its shutdown.
    with redirect_stdout(sys.stderr):
        try:
            yield _make_room(least, config.scale_timeout_s, log)
        finally:
            ray.shutdown()


def _check_address(address: str) -> None:
    """ResourceError when nobody listens at HOST:PORT; Ray itself would try for over a minute."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise ResourceError(
            f"no Ray cluster answers at {address!r} ({error}); check --address and RAY_ADDRESS, or"
            " leave both out to start Ray here"
        ) from error


@contextmanager
def _hold_stderr() -> Iterator[None]:
    """Keep Ray's native code from greeting on the terminal; what it said is shown if it fails."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held:
        terminal = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException as error:
            held.seek(0)
            said = held.read()
            if b"InvalidAuthToken" in said:
                raise ResourceError(f"the cluster refuses the token; {TOKEN_REMEDY}") from error
            os.write(terminal, said)
            raise
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)


def read_resources() -> Resources:
    """What the connected cluster has now."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    return Resources(tuple(Node(int(n.get("CPU", 0)), int(n.get("GPU", 0))) for n in nodes))


def _make_room(least: Placement, timeout_s: float, log: Callable[[str], None]) -> Resources:
    """What the cluster has, at the latest after `timeout_s`; what is still missing is not said.

    A cluster keeps one request, the last: it is repeated, since others may make theirs, and taken
    back as soon as there is room. From then on the workers themselves hold the nodes.
    """
    resources = read_resources()
    wanted = least.num_workers
    until_s, known, asked_s = time.monotonic() + timeout_s, -1, -math.inf
    shape = {"CPU": least.cpus_per_worker, "GPU": least.gpus_per_worker}
    try:
        while time.monotonic() < until_s:
            places = resources.count_places(least.cpus_per_worker, least.gpus_per_worker)
            if places >= wanted:
                break
            if time.monotonic() - asked_s >= ASK_AGAIN_S:
                asked_s = time.monotonic()
                bundle = {k: v for k, v in shape.items() if v}
                request_resources(bundles=[bundle] * wanted)
            if places != known:
                log(
                    f"waiting for the autoscaler: {places} of {least.num_workers} workers have room"
                )
            known = places
            time.sleep(POLL_S)
            resources = read_resources()
    finally:
        if known >= 0:
            request_resources(bundles=[])  # else the autoscaler would hold them for ever
    return resources


def place_workers(
    resources: Resources,
    *,
    num_workers: int | None,
    use_gpu: bool,
    cpus_per_worker: int | None,
    default_workers: int,
) -> Placement:
    """Share the cluster out; without `cpus_per_worker`, each gets as many CPUs as fit.

    ResourceError, with the numbers, when it is too small.
    """
    wanted, gpus = num_workers or default_workers, int(use_gpu)
    most = max((node.num_cpus for node in resources.nodes), default=0)
    for cpus in [cpus_per_worker] if cpus_per_worker else range(max(most, 1), 0, -1):
        if resources.count_places(cpus, gpus) >= wanted:
            return Placement(wanted, cpus, gpus)
    needed = f"{wanted * (cpus_per_worker or 1)} CPUs" + (f" and {wanted} GPUs" if gpus else "")
    nodes = ", ".join(f"{n.num_cpus} CPUs + {n.num_gpus} GPUs" for n in resources.nodes[:8])
    fewer = " or --cpus-per-worker" if (cpus_per_worker or 1) > 1 else ""
    raise ResourceError(
        f"{wanted} workers need {needed}, the cluster has {resources.num_cpus} CPUs and"
        f" {resources.num_gpus} GPUs (nodes: {nodes}); lower --num-workers{fewer}"
    )


def count_local_cpus() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_gpu(device: Device, resources: Resources) -> bool:
    """Whether workers use GPUs. ResourceError when they are asked for and there are none."""
    if device == "cuda" and not resources.num_gpus:
        raise ResourceError("--device cuda: the cluster has no GPU; use --device cpu")
    return device == "cuda" or (device == "auto" and resources.num_gpus > 0)


def find_cause(error: BaseException | None) -> str:
    """The last line of what a worker raised, which names the error."""
    lines = [line.strip() for line in str(error or "").splitlines() if line.strip()]
    return lines[-1] if lines else f"{type(error).__name__} without a word"
