"""Code shared by the peers: listing files, one process per core, printing the result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

NUM_CORES = len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Share:
    """What one process did; the clock runs over `steady_images` of its `images`."""

    images: int
    steady_images: int
    started_s: float  # time.time()
    finished_s: float


def list_files(folder: str) -> list[str]:
    """Every file below a folder, sorted."""
    found, pending = [], [folder]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                (pending if entry.is_dir() else found).append(entry.path)
    return sorted(found)


def read_bytes(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def print_result(shares: list[Share]) -> None:
    """One JSON line: images in all, and the rate from the first start to the last finish."""
    steady_s = max(s.finished_s for s in shares) - min(s.started_s for s in shares)
    steady_images = sum(s.steady_images for s in shares)
    images = sum(s.images for s in shares)
    print(json.dumps({"images": images, "steady_images_per_s": steady_images / steady_s}))


def run_processes(work: Callable[[int], Share], num_processes: int = NUM_CORES) -> None:
    """Run `work(rank)` in so many copies of this script at once, and print what they did.

    Only the copies import anything large, inside `work`: the first process adds next to nothing.
    """
    rank = os.environ.get("BENCH_RANK")
    if rank is not None:
        print(json.dumps(asdict(work(int(rank)))))
        return
    copies = [
        subprocess.Popen(
            [sys.executable, *sys.argv],
            env={**os.environ, "BENCH_RANK": str(n)},
            stdout=subprocess.PIPE,
        )
        for n in range(num_processes)
    ]
    outputs = [copy.communicate()[0] for copy in copies]
    if any(copy.returncode for copy in copies):
        sys.exit("a process failed")
    print_result([Share(**json.loads(output.splitlines()[-1])) for output in outputs])


def run_ray_data(make_dataset: Callable[[], Any], out: str, images: int) -> None:
    """Start Ray here, write the dataset as Parquet, and print how long the writing took."""
    import ray

    ray.init(address="local", num_cpus=NUM_CORES, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    dataset = make_dataset()
    started_s = time.time()
    dataset.write_parquet(out)
    print_result([Share(images, images, started_s, time.time())])
    ray.shutdown()
