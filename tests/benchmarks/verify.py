"""Verify a large output with one worker and with two: GB/s, GB per second of CPU, peak memory.

    python tests/benchmarks/verify.py FOLDER [--gigabytes 100] [--shards 1024] [--ray]

FOLDER gets a finished run whose shards are names of one sparse file, so that it needs no disk: it
is read from memory, and what is measured is the work of a worker, not a disk or a store. A worker
is a process with a CPU of its own; with --ray it is a task of Ray.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa

from cifake_ray.core.schema import MANIFEST_FIELDS
from cifake_ray.storage.io.digest import hash_file
from cifake_ray.storage.io.files import make_folder
from cifake_ray.storage.runs.finish import finish_run
from cifake_ray.storage.runs.run import ShardStats
from cifake_ray.storage.runs.run_plan import RunPlan
from cifake_ray.storage.sources.source import Listing

LARGE_BYTES = 143e12  # shards of a billion images of 143 KB


def make_run(out: Path, num_shards: int, shard_bytes: int) -> None:
    """Write a finished run of `convert` with a row a shard."""
    columns = {field.name: pa.nulls(num_shards, field.type) for field in MANIFEST_FIELDS}
    columns |= {
        name: pa.array([f"{n:06}" for n in range(num_shards)]) for name in ("key", "location")
    }
    batch = pa.RecordBatch.from_pydict(columns, schema=pa.schema(MANIFEST_FIELDS))
    run = RunPlan(
        out=out,
        command="convert",
        settings={"src": "made up"},
        config={},
        list_source=lambda: Listing(iter([batch])),
        shard_rows=1,
    ).open()
    make_folder(run.results_folder)
    first = run.shard_path(0)
    with open(first, "wb") as file:
        file.truncate(shard_bytes)
    digest = hash_file(first)
    for shard in range(1, num_shards):
        os.link(first, str(run.shard_path(shard)))
    stats = [ShardStats(n, 1, {}, {}, shard_bytes, digest) for n in range(num_shards)]
    finish_run(run, stats, {"command": "convert"})


def measure(out: Path, num_workers: int, num_bytes: int, *, use_ray: bool) -> dict[str, float]:
    """Verify in a process that may use so many CPUs; it must find nothing."""
    cpus = sorted(os.sched_getaffinity(0))[:num_workers]
    words = [sys.executable, "-m", "cifake_ray", "verify", str(out), "--json"]
    words += ["--num-workers", str(num_workers)] if use_ray else []
    before, started_s = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    process = subprocess.run(
        words,
        check=True,
        stdout=subprocess.PIPE,
        preexec_fn=None if use_ray else lambda: os.sched_setaffinity(0, cpus),
    )
    elapsed_s = time.monotonic() - started_s
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert json.loads(process.stdout)["damaged"] == {}
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "workers": num_workers,
        "seconds": round(elapsed_s, 1),
        "gb_per_s": round(num_bytes / elapsed_s / 1e9, 3),
        "gb_per_cpu_s": round(num_bytes / cpu_s / 1e9, 3),
        "peak_mb": round(after.ru_maxrss / 1e3),  # of the largest process so far
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=100.0)
    parser.add_argument("--shards", type=int, default=1024)
    parser.add_argument("--ray", action="store_true")
    options = parser.parse_args()
    shard_bytes = int(options.gigabytes * 1e9 / options.shards)
    out = options.folder / "out"
    if not out.exists():
        make_run(out, options.shards, shard_bytes)
    has_sha = "sha_ni" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    print(f"{options.shards:,} shards of {shard_bytes / 1e6:,.1f} MB; SHA instructions: {has_sha}")
    rows = [measure(out, n, shard_bytes * options.shards, use_ray=options.ray) for n in (1, 2)]
    for row in rows:
        print(json.dumps(row))
    print(f"two workers: {rows[1]['gb_per_s'] / rows[0]['gb_per_s']:.2f} times one")
    hours = LARGE_BYTES / 1e9 / rows[0]["gb_per_cpu_s"] / 3600
    print(
        f"143 TB (extrapolated): {hours:,.1f} h of CPU, {hours * 60 / 1000:,.1f} minutes of 1,000"
        " workers where a store or a network does not give less"
    )


if __name__ == "__main__":
    main()
