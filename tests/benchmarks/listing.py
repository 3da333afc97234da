"""List a large bucket, and freeze it as a manifest: keys per second and peak memory.

    python tests/benchmarks/listing.py [--keys 100000 1000000] [--latency-ms 20] [--shapes wide]

A server on loopback, in its own process, generates the pages of ListObjectsV2 on request and stores
no keys; `server` is its own rate, with a client that only receives. `nested` has 200 folders below
six, `flat` is one folder, `wide` is 2,000 prefixes with keys of 60 bytes; etags look as random as
real ones. Each number of keys is listed by a fresh process, and by another one frozen; memory
should not grow from the first number to the second. CPU time is the client's alone. `freeze.py` and
`kill_listing.py` list from the same server.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import SynchronizedArray
from pathlib import Path
from typing import Literal, get_args
from urllib.parse import parse_qs, urlsplit

import psutil

Shape = Literal["nested", "flat", "wide"]
FOLDERS = [f"{split}/{label}/" for split in ("test", "train", "val") for label in ("FAKE", "REAL")]
SUBFOLDERS = 200
PREFIXES = 2_000  # of `wide`
PAGE_KEYS = 1_000
BUCKET = "benchmark"
ETAG_STEP = 0x9E3779B97F4A7C15F39CC0605CEDC835  # odd, so no etag of two keys is the same
TIMEOUT_S = 3600.0


class Keys(Sequence[str]):
    """All keys in order, generated on access."""

    def __init__(self, shape: Shape, num_keys: int) -> None:
        self.shape = shape
        self.num_keys = num_keys

    def __len__(self) -> int:
        return self.num_keys

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        if self.shape == "flat":
            return f"images/img_{index:09d}.jpg"
        if self.shape == "wide":
            part = index * PREFIXES // self.num_keys
            label = "FAKE" if part < PREFIXES // 2 else "REAL"
            return f"wide/{label}/part-{part:04d}/{index:036d}.jpg"
        folder, rest = divmod(index, -(-self.num_keys // len(FOLDERS)))
        sub, number = divmod(rest, -(-self.num_keys // (len(FOLDERS) * SUBFOLDERS)))
        return f"{FOLDERS[folder]}source-{sub:03d}/{number:07d}.jpg"


class ListingServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, keys: Keys, latency_s: float, counts: SynchronizedArray[int]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.keys = keys
        self.latency_s = latency_s
        self.counts = counts  # of requests, of keys sent

    def handle_error(self, *connection: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # else its client was killed
            super().handle_error(*connection)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: ListingServer

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.send_error(404)  # no object exists

    def do_GET(self) -> None:
        time.sleep(self.server.latency_s)
        url = urlsplit(self.path)
        if url.path.strip("/") != BUCKET:
            return self.send_error(404)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        keys, prefix = self.server.keys, query.get("prefix", "")
        start, end = bisect_left(keys, prefix), bisect_right(keys, prefix + "\U0010ffff")
        if token := query.get("continuation-token"):
            start = int(token)
        elif after := query.get("start-after"):
            start = max(start, bisect_right(keys, after))
        stop = min(start + int(query.get("max-keys", PAGE_KEYS)), end)
        with self.server.counts.get_lock():
            self.server.counts[0] += 1
            self.server.counts[1] += max(0, stop - start)
        contents = "".join(
            f"<Contents><Key>{keys[index]}</Key>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>&quot;{index * ETAG_STEP % 2**128:032x}&quot;</ETag><Size>1000</Size>"
            "<StorageClass>STANDARD</StorageClass></Contents>"
            for index in range(start, stop)
        )
        following = f"<NextContinuationToken>{stop}</NextContinuationToken>" if stop < end else ""
        body = (
            '<?xml version="1.0" encoding="UTF-8"?>'
            '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<EncodingType>url</EncodingType><IsTruncated>{str(stop < end).lower()}</IsTruncated>"
            f"{following}{contents}</ListBucketResult>"
        ).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()


def serve(
    shape: Shape,
    num_keys: int,
    latency_s: float,
    counts: SynchronizedArray[int],
    ready: Connection,
) -> None:
    with ListingServer(Keys(shape, num_keys), latency_s, counts) as server:
        ready.send(server.server_address[1])
        threading.Thread(target=server.serve_forever, daemon=True).start()
        ready.recv()  # until the benchmark is over


def list_bucket(*, freezes: bool) -> None:
    """List, or sort and write the manifest as well, in the measured process."""
    from cifake_ray.config import StoreConfig
    from cifake_ray.core.labels import make_class_names
    from cifake_ray.storage.sources.s3_prefix import S3PrefixSource

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from write_manifest import write_manifest

    # Connected, which takes half a second of botocore's however few keys there are.
    list(S3PrefixSource(BUCKET, "none/", StoreConfig(), make_class_names()).list_images().batches)
    idle_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    source = S3PrefixSource(BUCKET, "", StoreConfig(), make_class_names())
    started_s, cpu_s = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        if freezes:
            keys = write_manifest(Path(folder), "run", source.list_images(), None).num_rows
        else:
            keys = sum(batch.num_rows for batch in source.list_images().batches)
    facts = {
        "keys": keys,
        "elapsed_s": time.perf_counter() - started_s,
        "cpu_s": time.process_time() - cpu_s,
        "idle_mb": idle_kb / 1024,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(json.dumps(facts))


@dataclass(frozen=True)
class ServerProcess:
    """A server in a process of its own."""

    process: psutil.Process
    port: int
    counts: SynchronizedArray[int]

    @property
    def num_requests(self) -> int:
        """How many listings it has answered, of a page or of one key."""
        return self.counts[0]

    @property
    def num_keys(self) -> int:
        """How many keys it has sent."""
        return self.counts[1]

    @property
    def cpu_s(self) -> float:
        times = self.process.cpu_times()
        return float(times.user + times.system)

    def make_env(self) -> dict[str, str]:
        """The environment of a client."""
        return {
            **os.environ,
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "any",
            "AWS_SECRET_ACCESS_KEY": "any",
        }


@contextmanager
def run_server(shape: Shape, num_keys: int, latency_s: float) -> Iterator[ServerProcess]:
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    counts = context.Array("q", 2)
    process = context.Process(target=serve, args=(shape, num_keys, latency_s, counts, theirs))
    process.start()
    try:
        yield ServerProcess(psutil.Process(process.pid), ours.recv(), counts)
    finally:
        ours.send("over")
        process.join()


def measure_server(shape: Shape, num_keys: int) -> float:
    """Keys a second that a client receives, over eight connections, and does not look at."""

    def receive(port: int, first: int) -> None:
        connection = HTTPConnection("127.0.0.1", port)
        for token in range(first * PAGE_KEYS, num_keys, 8 * PAGE_KEYS):
            connection.request("GET", f"/{BUCKET}?continuation-token={token}")
            assert b"</ListBucketResult>" in connection.getresponse().read()[-99:]
        connection.close()

    with run_server(shape, num_keys, 0.0) as server, ThreadPoolExecutor(8) as threads:
        started_s = time.perf_counter()
        list(threads.map(receive, [server.port] * 8, range(8)))
        return num_keys / (time.perf_counter() - started_s)


def measure(shape: Shape, num_keys: int, latency_s: float, verb: str) -> dict[str, float]:
    """What a fresh process says of itself."""
    with run_server(shape, num_keys, latency_s) as server:
        output = subprocess.run(
            [sys.executable, __file__, "--child", verb],
            env=server.make_env(),
            check=True,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        ).stdout
        facts: dict[str, float] = json.loads(output.splitlines()[-1])
        return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--latency-ms", type=float, default=20.0)
    parser.add_argument("--shapes", nargs="+", default=get_args(Shape), choices=get_args(Shape))
    parser.add_argument("--child", choices=["list", "freeze"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return list_bucket(freezes=options.child == "freeze")
    print("                  keys   seconds      keys/s   CPU us each   idle MB   peak MB")
    for shape in options.shapes:
        for num_keys in options.keys:
            print(f"{shape:7s} server {num_keys:8d} {measure_server(shape, num_keys):11.0f}")
            for verb in ("list", "freeze"):
                facts = measure(shape, num_keys, options.latency_ms / 1000, verb)
                assert facts["keys"] == num_keys
                print(
                    f"{shape:7s} {verb:6s} {num_keys:8d} {facts['elapsed_s']:9.1f} "
                    f"{num_keys / facts['elapsed_s']:11.0f} "
                    f"{1e6 * facts['cpu_s'] / num_keys:13.1f} "
                    f"{facts['idle_mb']:9.0f} {facts['peak_mb']:9.0f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
