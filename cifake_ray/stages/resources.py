"""What a machine or a cluster has, and how workers are placed on it."""

from __future__ import annotations

import math
import os
import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cifake_ray.config import ClusterConfig, Device
from cifake_ray.errors import ResourceError

# Where drivers of GPUs are: torch takes seconds to import only to say that there is none.
GPU_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")


class Node(NamedTuple):
    """Resources of one machine."""

    num_cpus: int
    num_gpus: int


@dataclass(frozen=True)
class Resources:
    """Resources of the cluster."""

    nodes: tuple[Node, ...]

    @property
    def num_cpus(self) -> int:
        return sum(node.num_cpus for node in self.nodes)

    @property
    def num_gpus(self) -> int:
        return sum(node.num_gpus for node in self.nodes)

    def count_places(self, cpus: int, gpus: int) -> int:
        """Return how many workers of that size fit; a worker cannot be spread over two nodes."""
        return sum(
            min(node.num_cpus // cpus, node.num_gpus // gpus if gpus else node.num_cpus)
            for node in self.nodes
        )


@dataclass(frozen=True)
class Placement:
    """Number of workers, and what each of them gets."""

    num_workers: int
    cpus_per_worker: int
    gpus_per_worker: int
    num_feeders: int = 0  # concurrent tasks, of one CPU each, that decode for a worker with a GPU

    @property
    def num_fetchers(self) -> int:
        """Return how many processes fetch images at once."""
        return self.num_workers * max(1, self.num_feeders)


ONE_WORKER = Placement(1, 1, 0)


def place_workers(
    resources: Resources,
    *,
    num_workers: int,
    use_gpu: bool,
    cpus_per_worker: int | None,
) -> Placement:
    """Place workers on the cluster; without `cpus_per_worker`, each gets as many CPUs as fit.

    ResourceError, with the numbers, when the cluster is too small.
    """
    gpus = int(use_gpu)
    most = max((node.num_cpus for node in resources.nodes), default=0)
    for cpus in [cpus_per_worker] if cpus_per_worker else range(max(most, 1), 0, -1):
        if resources.count_places(cpus, gpus) >= num_workers:
            return Placement(num_workers, cpus, gpus)
    needed = f"{num_workers * (cpus_per_worker or 1)} CPUs"
    needed += f" and {num_workers} GPUs" if gpus else ""
    nodes = ", ".join(f"{n.num_cpus} CPUs + {n.num_gpus} GPUs" for n in resources.nodes[:8])
    fewer = " or --cpus-per-worker" if (cpus_per_worker or 1) > 1 else ""
    raise ResourceError(
        f"{num_workers} workers need {needed}, the cluster has {resources.num_cpus} CPUs and"
        f" {resources.num_gpus} GPUs (nodes: {nodes}); lower --num-workers{fewer}"
    )


def names_cluster(config: ClusterConfig) -> bool:
    """Return whether `--address` or RAY_ADDRESS names a cluster other than a Ray started here."""
    address = config.address or os.environ.get("RAY_ADDRESS")
    return address not in (None, "", "local")


def is_connected() -> bool:
    """Return whether this process uses Ray already; do not import it to find out."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def runs_here(
    config: ClusterConfig, num_workers: int | None, device: Device, max_gpus: int = 0
) -> bool:
    """Return whether a verb uses processes of this machine, without Ray.

    It does with 0 workers, and by default where no cluster is named or connected and there are no
    more than `max_gpus` GPUs to use: there Ray would cost its start and gain nothing. In a batch
    its tasks decode for a GPU, in training not.
    """
    if num_workers is not None:
        return num_workers == 0
    if config.address or os.environ.get("RAY_ADDRESS") or is_connected():
        return False
    return read_local_resources(device).num_gpus <= max_gpus


def read_local_resources(device: Device) -> Resources:
    """Return the resources of this machine; no GPUs if `device` is cpu."""
    num_gpus = 0
    if device != "cpu" and any(map(os.path.exists, GPU_FILES)):
        import torch

        num_gpus = torch.cuda.device_count()
    return Resources((Node(count_local_cpus(), num_gpus),))


def read_cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """Return what this processor has, in Linux's words, and its vendor; empty where unknown."""
    found = re.findall(r"^(?:vendor_id|flags)\s*:(.*)$", _read_text(cpuinfo) or "", re.MULTILINE)
    return set(" ".join(found[:2]).split())


def count_local_cpus() -> int:
    """Return how many CPUs this process may use: of its affinity and of its container's quota."""
    affinity = getattr(os, "sched_getaffinity", None)
    num_cpus = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, int(min(num_cpus, read_cpu_quota())))


def read_cpu_quota(root: Path = Path("/")) -> float:
    """Return how many CPUs the control groups of this process allow, infinity without a limit."""
    quotas = [math.inf]
    for line in (_read_text(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "cpu" in controllers.split(","):  # of version 2 or 1
            top = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
            group = top / path.lstrip("/")  # in a container it may not be there, but its top is
            above = (folder for folder in group.parents if folder.is_relative_to(top))
            quotas += [_read_group_quota(folder) for folder in (group, *above)]
    return min(quotas)


def _read_group_quota(folder: Path) -> float:
    quota, period = (
        _read_text(folder / "cpu.cfs_quota_us"),
        _read_text(folder / "cpu.cfs_period_us"),
    )
    words = (_read_text(folder / "cpu.max") or f"{quota} {period}").split()
    try:
        return int(words[0]) / int(words[1]) if int(words[0]) > 0 else math.inf
    except ValueError:  # "max", or no such file
        return math.inf


def _read_text(path: Path) -> str | None:
    with suppress(OSError):
        return path.read_text().strip()
    return None


def choose_gpu(device: Device, resources: Resources) -> bool:
    """Return whether workers use GPUs. ResourceError when --device cuda finds none."""
    if device == "cuda" and not resources.num_gpus:
        raise ResourceError("--device cuda: the cluster has no GPU; use --device cpu")
    return device == "cuda" or (device == "auto" and resources.num_gpus > 0)


def find_cause(error: BaseException | None) -> str:
    """Return the last line of what a worker raised, which names the error."""
    lines = [line.strip() for line in str(error or "").splitlines() if line.strip()]
    return lines[-1] if lines else f"{type(error).__name__} without a message"
