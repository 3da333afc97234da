"""doctor: report what this machine has, and check that detector and Ray work."""

from __future__ import annotations

import platform
import shutil
import tempfile
from importlib.metadata import version
from typing import Any

import ray
import torch

from cifake_ray.config import ClusterConfig
from cifake_ray.errors import CifakeError, ExitCode
from cifake_ray.stages.cluster import connect_cluster, count_local_cpus
from cifake_ray.storage.bundles.bundle import load_bundle, locate_bundle


def examine_machine() -> tuple[dict[str, Any], int]:
    """Return what was found and the exit code, 1 when a check fails."""
    disk = shutil.disk_usage(tempfile.gettempdir())
    found: dict[str, Any] = {
        "python": platform.python_version(),
        **{name: version(name) for name in ("ray", "torch", "timm", "pyarrow")},
        "cpus": count_local_cpus(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "temporary_disk_free_gb": round(disk.free / 1e9, 1),
    }
    problems = []
    try:
        detector, bundle = load_bundle(locate_bundle(None))
        found["built-in detector"] = f"{detector.architecture}, {bundle.fingerprint[:12]}"
    except CifakeError as error:
        problems.append(str(error))
    try:
        with connect_cluster(ClusterConfig()) as resources:
            found["ray cluster"] = (
                f"{len(resources.nodes)} nodes, {resources.num_cpus} CPUs,"
                f" {resources.num_gpus} GPUs"
            )
            one = ray.get(ray.remote(num_cpus=0)(lambda: 1).remote(), timeout=60)
            found["ray task"] = "ran" if one == 1 else "failed"
    except (CifakeError, ray.exceptions.GetTimeoutError) as error:
        problems.append(str(error))
    found["problems"] = problems or "none"
    return found, ExitCode.UNEXPECTED if problems else ExitCode.OK
