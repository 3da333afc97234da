"""Connect to Ray, read its resources, and place workers on them."""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import ray
from ray.autoscaler.sdk import request_resources
from ray.job_config import JobConfig

from cifake_ray.config import ClusterConfig
from cifake_ray.errors import ResourceError, UsageError
from cifake_ray.stages.local_ray import choose_ray_folder, lock_doors, place_objects, stop_ray
from cifake_ray.stages.resources import (
    ONE_WORKER,
    Node,
    Placement,
    Resources,
    count_local_cpus,
    place_workers,
)

POLL_S = 1.0  # between two reads of the resources while an autoscaler adds nodes
REQUEST_INTERVAL_S = 30.0
TOKEN_REMEDY = (
    "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the file with the cluster's token"
)


_is_abandoned = threading.Event()  # and still connected


class _WorkerPath(list[str]):
    """What workers search for modules first: our package, unless it is installed."""

    def __init__(self) -> None:
        folder = str(Path(__file__).parents[2])
        super().__init__([] if folder in sysconfig.get_paths().values() else [folder])

    def extend(self, folders: Iterable[str]) -> None:
        """Do nothing. Ray adds the working folder here, and a `numpy.py` among images would run."""


@contextmanager
def connect_cluster(
    config: ClusterConfig,
    least: Placement = ONE_WORKER,
    log: Callable[[str], None] = lambda message: None,
) -> Iterator[Resources]:
    """Connect to `config.address` or RAY_ADDRESS, or start Ray here and stop it at the end.

    A Ray that already runs in this process is used and left running. With a
    `config.scale_timeout_s` an autoscaler is asked to make room for `least`.
    ResourceError when the address does not answer, and before Ray is started here if this machine
    has fewer CPUs than `least` has workers.
    """
    if ray.is_initialized():
        yield _make_room(least, config.scale_timeout_s, log)
        return
    # Errors of Ray reach us as exceptions, and all of its messages are in its logs. Any other error
    # is of what nobody waits for any more, such as an answer of a worker that was ended.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    address = config.address or os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {"address": address}
    if not address.startswith("ray://"):  # there the driver is a process of the cluster
        options["job_config"] = JobConfig()
        options["job_config"]._py_driver_sys_path = _WorkerPath()
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Workers compute in threads. With an arena per thread, glibc maps their buffers again for
        # each batch; in the main arena it keeps them: see `malloc.keep_freed_memory`.
        os.environ.setdefault("MALLOC_ARENA_MAX", "1")
        options |= {"include_dashboard": False, "num_cpus": count_local_cpus()}
        options["_temp_dir"] = choose_ray_folder()
        options |= place_objects(options["_temp_dir"])
        here = Resources((Node(count_local_cpus(), 0),))
        place_workers(here, num_workers=least.num_workers, use_gpu=False, cpus_per_worker=1)
    _check_address(address)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    log("starting Ray ..." if address == "local" else f"connecting to Ray at {address} ...")
    try:
        with _hold_stderr(), lock_doors() if address == "local" else nullcontext():
            context = ray.init(logging_level=logging.ERROR, log_to_driver=False, **options)
    except (ConnectionError, ValueError) as error:
        raise ResourceError(
            f"no Ray cluster answers at {address!r} ({str(error).splitlines()[0]}); check"
            " --address and RAY_ADDRESS, or leave both out to use this machine alone"
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():  # Ray replaces them
                signal.signal(number, handler)
    if context.dashboard_url:
        log(f"Ray's dashboard: http://{context.dashboard_url}")
    # Ray reports dead workers on stdout, which is for results; at the latest in its shutdown.
    with redirect_stdout(sys.stderr):
        try:
            yield _make_room(least, config.scale_timeout_s, log)
        except BaseException:
            # Threads still wait inside Ray, whose native code could end this process before the
            # callers have cleaned up. A command ends now, and Ray with it.
            _is_abandoned.set()
            raise
        stop_ray()


def leave_cluster() -> None:
    """Disconnect after a failure or an interrupt, in a process that does not end with it."""
    if _is_abandoned.is_set():
        _is_abandoned.clear()
        stop_ray()


def _check_address(address: str) -> None:
    """Raise ResourceError if HOST:PORT does not answer; Ray itself would try for over a minute.

    UsageError for the address of a Jobs API, and for credentials, which are not repeated.
    """
    if "@" in address:
        raise UsageError(
            f"--address or RAY_ADDRESS holds credentials; leave them out: {TOKEN_REMEDY}"
        )
    if address.startswith(("http://", "https://")):
        raise UsageError(
            "--address or RAY_ADDRESS is http://..., which is for `cifake-ray submit`; give the"
            " HOST:6379 of the cluster, or leave both out to use this machine alone"
        )
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise ResourceError(
            f"no Ray cluster answers at {address!r} ({error}); check --address and RAY_ADDRESS, or"
            " leave both out to use this machine alone"
        ) from error


@contextmanager
def _hold_stderr() -> Iterator[None]:
    """Hold back what Ray's native code writes to the terminal; show it if starting Ray fails."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held:
        terminal = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException as error:
            held.seek(0)
            output = held.read()
            if b"InvalidAuthToken" in output:
                raise ResourceError(f"the cluster refuses the token; {TOKEN_REMEDY}") from error
            if not isinstance(error, KeyboardInterrupt):
                os.write(terminal, output)
            raise
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)


def read_resources() -> Resources:
    """Return the resources that the connected cluster has now."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    return Resources(tuple(Node(int(n.get("CPU", 0)), int(n.get("GPU", 0))) for n in nodes))


def _make_room(least: Placement, timeout_s: float, log: Callable[[str], None]) -> Resources:
    """Return the resources after waiting up to `timeout_s` for the autoscaler; callers check them.

    A cluster keeps only the last request: it is repeated, since other programs may make theirs, and
    withdrawn as soon as there is room. From then on the workers themselves keep the nodes.
    """
    resources, wanted = read_resources(), least.num_workers
    until_s, known, requested_s = time.monotonic() + timeout_s, -1, -math.inf
    shape = {"CPU": least.cpus_per_worker, "GPU": least.gpus_per_worker}
    try:
        while time.monotonic() < until_s:
            places = resources.count_places(least.cpus_per_worker, least.gpus_per_worker)
            if places >= wanted:
                break
            if time.monotonic() - requested_s >= REQUEST_INTERVAL_S:
                requested_s = time.monotonic()
                request_resources(bundles=[{k: v for k, v in shape.items() if v}] * wanted)
            if places != known:
                log(f"waiting for the autoscaler: {places} of {wanted} workers have room")
            known = places
            time.sleep(POLL_S)
            resources = read_resources()
    finally:
        if known >= 0:
            request_resources(bundles=[])  # else the autoscaler would keep the nodes for ever
    return resources
