"""doctor: report what this machine has, and check detector, folders, a store and, if asked, Ray."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray
import torch

from cifake_ray.config import ClusterConfig, DoctorConfig, StoreConfig
from cifake_ray.errors import CifakeError, ExitCode
from cifake_ray.stages.cluster import connect_cluster
from cifake_ray.stages.resources import count_local_cpus
from cifake_ray.storage.bundles.built_ins import list_built_ins, locate_bundle
from cifake_ray.storage.bundles.bundle import load_bundle
from cifake_ray.storage.datasets.pixel_cache import locate_cache
from cifake_ray.storage.io.paths import resolve_path
from cifake_ray.storage.s3.location import open_path
from cifake_ray.storage.sources.glance import check_there

GB = 1e9
LEAST_MEMORY_GB = 1.5  # Ray and one worker that scores
LEAST_DISK_GB = 1.0


def examine_machine(
    config: DoctorConfig, store: StoreConfig, log: Callable[[str], None]
) -> tuple[dict[str, Any], int]:
    """Return what was found, with its `problems`, and the exit code, 1 when there are any."""
    problems: list[str] = []
    memory_gb, free_gb = _measure_memory()
    found: dict[str, Any] = {
        "python": platform.python_version(),
        **{name: version(name) for name in ("ray", "torch", "timm", "pyarrow")},
        "cpus": count_local_cpus(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "memory_gb": memory_gb,
        "memory_free_gb": free_gb,
    }
    if free_gb is not None and free_gb < LEAST_MEMORY_GB:
        problems.append(
            f"memory: {free_gb} GB are free; end other programs, or give --num-workers 1"
        )
    folders = {
        "temporary": (tempfile.gettempdir(), "set TMPDIR"),
        "cache": (str(locate_cache(None)), "set XDG_CACHE_HOME"),
        "output": (config.out, "choose an output"),
    }
    for name, (folder, remedy) in folders.items():
        try:
            found[f"{name}_disk_free_gb"] = free = _measure_disk(folder)
        except (OSError, CifakeError) as error:
            problems.append(f"{folder}: {error}; {remedy} where you may write")
            continue
        if free < LEAST_DISK_GB:
            problems.append(f"{folder}: {free} GB are free; free some, or {remedy} elsewhere")
    checks: dict[str, Callable[[], str]] = {"built_in_detector": _check_detector}
    if config.store is not None:
        checks["store"] = partial(_check_store, config.store, store)
    if config.ray:
        checks["ray_cluster"] = _check_ray
    for name, check in checks.items():
        log(f"doctor: checking {name.replace('_', ' ')}")
        try:
            found[name] = check()
        except (CifakeError, ray.exceptions.GetTimeoutError) as error:
            problems.append(f"{name.replace('_', ' ')}: {error}")
    found["problems"] = problems
    return found, ExitCode.UNEXPECTED if problems else ExitCode.OK


def _measure_memory() -> tuple[float | None, float | None]:
    """Return all memory and what is free, in GB, of this machine; None where that is unknown."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None, None
    sizes_kb = {line.split(":")[0]: int(line.split()[1]) for line in text.splitlines()}
    return tuple(round(sizes_kb[name] * 1024 / GB, 1) for name in ("MemTotal", "MemAvailable"))  # type: ignore[return-value]


def _measure_disk(folder: str) -> float:
    """Return the free GB where a folder is or would be. PermissionError if it is not writable."""
    path = resolve_path(folder)
    if not isinstance(path, Path):
        raise CifakeError("give a local folder; --store checks a bucket")
    while not path.exists():
        path = path.parent
    if not os.access(path, os.W_OK):
        raise PermissionError(f"{path} is not writable")
    return round(shutil.disk_usage(path).free / GB, 1)


def _check_detector() -> str:
    loaded = {name: load_bundle(locate_bundle(name)) for name in list_built_ins()}
    return "; ".join(
        f"{name}: {detector.architecture}, {bundle.fingerprint[:12]}"
        for name, (detector, bundle) in loaded.items()
    )


def _check_store(uri: str, store: StoreConfig) -> str:
    check_there(open_path(uri, store), uri)
    return f"{uri} is readable"


def _check_ray() -> str:
    with connect_cluster(ClusterConfig()) as resources:
        ray.get(ray.remote(num_cpus=0)(lambda: 1).remote(), timeout=60)
        return (
            f"{len(resources.nodes)} nodes, {resources.num_cpus} CPUs, {resources.num_gpus} GPUs;"
            " a task ran"
        )
