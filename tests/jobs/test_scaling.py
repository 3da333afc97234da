"""A cluster that grows on demand, and one whose object store is far smaller than the data."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from faults.command import end_command, run_command, start_command, wait_until
from PIL import Image
from ray_head import JobsCluster, run_head

from cifake_ray.errors import ExitCode

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
WORKERS = {"cpu": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2}}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobsCluster]:
    """A head without CPUs, as on Kubernetes, and up to two nodes of one CPU."""
    folder = tmp_path_factory.mktemp("head")
    with run_head(folder, num_cpus=0, worker_types=WORKERS) as head:
        yield head


def convert(cluster: JobsCluster, source: Path, out: Path, *options: str) -> tuple[int, str]:
    words = ["convert", str(source), str(out), "--address", cluster.ray_address, *options]
    code, _, errors = run_command(words, cluster.env)
    return code, errors


def test_without_waiting_a_cluster_that_has_no_room_is_refused(
    cluster: JobsCluster, sample_folder: Path, tmp_path: Path
) -> None:
    started_s = time.monotonic()
    code, errors = convert(cluster, sample_folder, tmp_path / "out")
    assert (code, "the cluster has 0 CPUs" in errors) == (ExitCode.RESOURCES, True), errors
    assert time.monotonic() - started_s < 60


def test_who_waits_gets_the_workers_that_were_asked_for(
    cluster: JobsCluster, sample_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = ["--num-workers", "2", "--scale-timeout-s", "120"]
    code, errors = convert(cluster, sample_folder, out, *options)
    assert code == 0, errors
    assert "waiting for the autoscaler: 0 of 2 workers have room" in errors
    assert (out / "_SUCCESS").exists()


def test_what_the_autoscaler_cannot_give_is_refused_with_the_numbers(
    cluster: JobsCluster, sample_folder: Path, tmp_path: Path
) -> None:
    options = ["--num-workers", "3", "--scale-timeout-s", "20"]
    code, errors = convert(cluster, sample_folder, tmp_path / "out", *options)
    assert code == ExitCode.RESOURCES
    assert "3 workers need 3 CPUs, the cluster has" in errors


def test_ten_times_the_object_store_passes_without_spilling(tmp_path: Path) -> None:
    """Images go from the source to their shard within a worker."""
    store_bytes, size_bytes = 80_000_000, 1_000_000
    noise = np.random.default_rng(0).integers(0, 256, (578, 578, 3), np.uint8)
    (source := tmp_path / "images").mkdir()
    Image.fromarray(noise).save(source / "0.png", compress_level=0)
    for number in range(1, 10 * store_bytes // size_bytes + 1):
        os.link(source / "0.png", source / f"{number}.png")
    assert sum(path.stat().st_size for path in source.iterdir()) > 10 * store_bytes
    with run_head(tmp_path, store_bytes=store_bytes) as head:
        assert head.temp_dir
        words = ["convert", str(source), str(tmp_path / "out"), "--address", head.ray_address]
        process = start_command(words, head.env)
        spilled = 0
        while process.poll() is None:  # Ray removes what nobody refers to any more
            spilled = max(spilled, count_spilled(head.temp_dir))
            time.sleep(0.1)
        code, _, errors = end_command(process)
        assert (code, spilled) == (0, 0), errors
        shutil.rmtree(tmp_path / "out")
        command = [sys.executable, "-c", SPILL, head.ray_address]
        with subprocess.Popen(command, env=head.env, stdin=subprocess.PIPE) as holder:
            try:
                wait_until(lambda: count_spilled(cast(Path, head.temp_dir)), timeout_s=120)
            finally:
                holder.kill()


SPILL = """
import sys, numpy, ray
ray.init(sys.argv[1])
held = [ray.put(numpy.ones(20_000_000, numpy.uint8)) for _ in range(8)]
sys.stdin.read()
"""


def count_spilled(temp_dir: Path) -> int:
    """Files that Ray has written of what did not fit."""
    return len(list(temp_dir.glob("session_*/ray_spilled_objects*/*")))
