"""List and freeze very many keys by workers: keys per second, peak memory and temporary bytes.

    python tests/benchmarks/freeze.py [--keys 1000000 10000000] [--workers 2] [--out FOLDER] [--s3]

Keys of 60 bytes below 2,000 prefixes, with random etags, are generated in the process that lists
them, so this measures what a listing costs beside the store. With `--s3` they come as pages of
ListObjectsV2 from the server of `listing.py`, 20 ms after each request. The figures are of the
clients; the last two columns are how many requests the server has answered and its own CPU time,
which is missing to the clients where no core is to spare. Each number of keys is frozen by a fresh
process and its workers, below a temporary folder in FOLDER. On two cores with a load of 10:

          keys workers   seconds  CPU us/key  driver MB  worker MB  temporary B/key  requests
       1000000       1      49.0        18.2        445        405             41.4      1771
       1000000       2      65.6        25.2        442        379             42.6      1830
      10000000       2     316.4        15.3        447        850             38.1     13885

The server answered faster than it was asked; what limited the rate was the CPU, of which it took
3.8 to 5.0 us a key. 1 million without `--s3` took 19.6 us.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from listing import BUCKET, run_server

from cifake_ray.config import StoreConfig
from cifake_ray.core.labels import make_class_names
from cifake_ray.core.schema import MANIFEST_FIELDS
from cifake_ray.errors import ImageError
from cifake_ray.stages.batch.local_pool import LocalPool
from cifake_ray.stages.resources import Placement
from cifake_ray.storage.runs.list_parts import PART_ROWS
from cifake_ray.storage.runs.run_plan import RunPlan
from cifake_ray.storage.sources.s3_prefix import S3PrefixSource
from cifake_ray.storage.sources.source import LISTING_BATCH_ROWS, Listing, Part, Source

NUM_PREFIXES = 2_000
SCHEMA = pa.schema(MANIFEST_FIELDS)
POLL_S = 0.2
LATENCY_S = 0.02  # of the server

Facts = dict[str, Any]  # what a measured process says of itself


@dataclass(frozen=True)
class GeneratedKeys:
    """A source of keys that exist nowhere; a part is the number of a prefix."""

    num_keys: int

    def list_images(
        self, parts: Sequence[Part] | None = None, max_rows: int | None = None
    ) -> Listing:
        todo = [str(part) for part in parts or map(str, range(NUM_PREFIXES))]
        listing = Listing(iter(()))

        def generate() -> Iterator[pa.RecordBatch]:
            num_rows = 0
            while todo and (max_rows is None or num_rows < max_rows):
                for batch in self._list_prefix(int(todo.pop(0))):
                    num_rows += batch.num_rows
                    yield batch
            listing.left = [*todo]

        listing.batches = generate()
        return listing

    def _list_prefix(self, prefix: int) -> Iterator[pa.RecordBatch]:
        size = -(-self.num_keys // NUM_PREFIXES)
        first, last = prefix * size, min((prefix + 1) * size, self.num_keys)
        rng = np.random.default_rng(prefix)
        for start in range(first, last, LISTING_BATCH_ROWS):
            num_rows = min(LISTING_BATCH_ROWS, last - start)
            keys = [
                f"train/FAKE/generator-{prefix:04d}/2026-01-01/image-{n:016d}.jpg"
                for n in range(start, start + num_rows)
            ]
            etags = rng.bytes(16 * num_rows).hex()
            columns = {
                "key": keys,
                "location": [f"s3://bucket/{key}" for key in keys],
                "size_bytes": rng.integers(1_000, 200_000, num_rows),
                "etag": [f'"{etags[n : n + 32]}"' for n in range(0, 32 * num_rows, 32)],
                "label": np.ones(num_rows, np.int64),
                "split": pa.array(["train"]).take(pa.array(np.zeros(num_rows, np.int8))),
                "source": pa.array([f"generator-{prefix:04d}"] * num_rows),
            }
            arrays = [
                pa.array(columns[f.name], f.type)
                if f.name in columns
                else pa.nulls(num_rows, f.type)
                for f in SCHEMA
            ]
            yield pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)

    def read_images(self, rows: pa.Table) -> Iterator[bytes | ImageError]:
        raise AssertionError("no image is read")


class Watch(threading.Thread):
    """Notes the most bytes of temporary files, and of the memory of any worker."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder = folder
        self.temporary_bytes = self.worker_bytes = 0
        self.is_over = threading.Event()

    def run(self) -> None:
        children = Path(f"/proc/self/task/{os.getpid()}/children")
        while not self.is_over.wait(POLL_S):
            files = self.folder.glob("_manifest/.listing-*/*")
            self.temporary_bytes = max(self.temporary_bytes, sum(map(count_bytes, files)))
            for child in children.read_text().split():
                self.worker_bytes = max(self.worker_bytes, read_peak(child))


def count_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def read_peak(pid: str) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it has ended
        return 0
    peaks = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
    return int(peaks[0]) * 1024 if peaks else 0


def freeze(num_keys: int, num_workers: int, place: str, *, from_s3: bool) -> None:
    """List and freeze, in the measured process."""
    out = Path(place)
    bucket = S3PrefixSource(BUCKET, "", StoreConfig(), make_class_names())
    source: Source = bucket if from_s3 else GeneratedKeys(num_keys)
    watch = Watch(out)
    started_s, dealing_s = time.perf_counter(), list[float]()

    def log(message: str) -> None:
        print(f"{time.perf_counter() - started_s:8.1f} s {message}", file=sys.stderr, flush=True)
        if "dealing" in message:
            dealing_s.append(time.perf_counter() - started_s)

    def list_source() -> Listing:
        listing = source.list_images(max_rows=PART_ROWS)
        listing.count_rows(describe=False)
        return listing

    with LocalPool(Placement(num_workers, 1, 0)) as pool:
        plan = RunPlan(
            out=out,
            command="score",
            settings={},
            config={},
            list_source=list_source,
            shard_rows=None,
            source=source,
            workers=pool,
            log=log,
        )
        watch.start()
        run = plan.open()
        elapsed_s = time.perf_counter() - started_s
        watch.is_over.set()
        watch.join()
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    facts = {
        "keys": run.manifest.num_rows,
        "shards": run.manifest.num_shards,
        "identity": run.identity,
        "elapsed_s": elapsed_s,
        "listing_s": dealing_s[0] if dealing_s else elapsed_s,
        "cpu_s": sum(usage.ru_utime + usage.ru_stime for usage in usages),
        "driver_mb": usages[0].ru_maxrss / 1024,
        "worker_mb": watch.worker_bytes / 2**20,
        "temporary_bytes": watch.temporary_bytes,
        "manifest_bytes": sum(path.stat().st_size for path in out.glob("_manifest/*.parquet")),
    }
    print(json.dumps(facts))


def measure(num_keys: int, num_workers: int, folder: str | None, *, from_s3: bool) -> Facts:
    with ExitStack() as stack:
        out = f"{stack.enter_context(tempfile.TemporaryDirectory(dir=folder))}/out"
        env = dict(os.environ)
        if from_s3:
            server = stack.enter_context(run_server("wide", num_keys, LATENCY_S))
            env = server.make_env()
        # The workers import this module, so it must not be the main one.
        call = f"freeze.freeze({num_keys}, {num_workers}, {out!r}, from_s3={from_s3})"
        paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        done = subprocess.run(
            [sys.executable, "-c", f"import freeze; {call}"],
            env={**env, "PYTHONPATH": os.pathsep.join(paths)},
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        facts: Facts = json.loads(done.stdout.splitlines()[-1])
        if from_s3:
            facts |= {"requests": server.num_requests, "server_cpu_s": server.cpu_s}
        return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", help="where there is room, 100 bytes a key")
    parser.add_argument("--s3", action="store_true", help="list pages of a server on loopback")
    options = parser.parse_args()
    print(
        "      keys workers   seconds  listing   keys/s  CPU us/key  driver MB  worker MB"
        "  temporary B/key  manifest B/key  identity" + "      requests  server us/key" * options.s3
    )
    for num_keys in options.keys:
        facts = measure(num_keys, options.workers, options.out, from_s3=options.s3)
        assert facts["keys"] == num_keys
        print(
            f"{num_keys:10d} {options.workers:7d} {facts['elapsed_s']:9.1f}"
            f" {facts['listing_s']:8.1f} {num_keys / facts['elapsed_s']:8.0f}"
            f" {1e6 * facts['cpu_s'] / num_keys:11.1f} {facts['driver_mb']:10.0f}"
            f" {facts['worker_mb']:10.0f} {facts['temporary_bytes'] / num_keys:16.1f}"
            f" {facts['manifest_bytes'] / num_keys:15.1f}  {facts['identity'][:12]}"
            + (
                f" {facts['requests']:9d} {1e6 * facts['server_cpu_s'] / num_keys:14.1f}"
                if options.s3
                else ""
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
