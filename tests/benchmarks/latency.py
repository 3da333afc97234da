"""Measure how fast a worker scores images from a store with latency.

    python tests/benchmarks/latency.py [--images 4000] [--latency-ms 0 30 100]

The store answers from memory after the given milliseconds, on one core; the worker has the other.
The worker's own way (64 concurrent requests, prefetching while it scores) is compared with fewer
requests and with no prefetching.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from multiprocessing.connection import Connection

import pyarrow as pa
from compare import NUM_CORES
from measure import format_table
from plan import make_images

from cifake_ray.config import StoreConfig
from cifake_ray.core.schema import MANIFEST_FIELDS
from cifake_ray.errors import ImageError
from cifake_ray.stages.batch.image_batches import slice_rows
from cifake_ray.stages.resources import ONE_WORKER
from cifake_ray.stages.score import MakeScoreProcessor
from cifake_ray.storage.bundles.built_ins import locate_bundle
from cifake_ray.storage.bundles.bundle import read_bundle_info
from cifake_ray.storage.s3.limits import DEFAULT_LIMITS, S3Limits
from cifake_ray.storage.sources.s3_prefix import S3PrefixSource

BATCH_SIZE = 256
WAYS = {
    "reading on, 64 requests at once": (DEFAULT_LIMITS, True),
    "reading on, 16": (replace(DEFAULT_LIMITS, max_in_flight=16), True),
    "batch by batch, 16": (replace(DEFAULT_LIMITS, max_in_flight=16), False),
}


async def serve(image: bytes, latency_s: float, ready: Connection) -> None:
    """Answer every GET with the image, in its time."""
    head = f'HTTP/1.1 200 OK\r\nETag: "0"\r\nContent-Length: {len(image)}\r\n\r\n'.encode()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError:
                return writer.close()
            await asyncio.sleep(latency_s)
            writer.write(head + image)

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    ready.send(server.sockets[0].getsockname()[1])
    await server.serve_forever()


def run_store(image: bytes, latency_s: float, ready: Connection) -> None:
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[-1]})
    asyncio.run(serve(image, latency_s, ready))


def make_rows(count: int, size_bytes: int) -> pa.Table:
    keys = [f"{number:06d}.jpg" for number in range(count)]
    columns: dict[str, list[object]] = {
        "key": keys,
        "location": [f"s3://slow/{key}" for key in keys],
    }
    columns |= {"size_bytes": [size_bytes] * count}
    rows = [columns.get(f.name) or pa.nulls(count, f.type) for f in MANIFEST_FIELDS]
    return pa.table(rows, schema=pa.schema(MANIFEST_FIELDS))


def read_batches(
    source: S3PrefixSource, rows: pa.Table, reads_on: bool
) -> Iterator[tuple[pa.Table, list[bytes | ImageError]]]:
    coming = source.read_images(rows) if reads_on else None
    for some in slice_rows(rows, BATCH_SIZE):
        images = islice(coming, some.num_rows) if coming else source.read_images(some)
        yield some, list(images)


def measure(
    port: int, size_bytes: int, limits: S3Limits, reads_on: bool, num_images: int
) -> tuple[float, float]:
    """Return images per second, and CPU milliseconds per image."""
    store = StoreConfig(s3_endpoint_url=f"http://127.0.0.1:{port}", s3_anonymous=True)
    source = S3PrefixSource("slow", "", store, {}, limits=limits)
    bundle = read_bundle_info(locate_bundle(None))
    work = MakeScoreProcessor(bundle, bundle.threshold(None), BATCH_SIZE)(ONE_WORKER)
    batches = read_batches(source, make_rows(num_images + BATCH_SIZE, size_bytes), reads_on)
    rows, images = next(batches)  # warm up connections and buffers
    work.finish(rows, work.prepare(images))
    started_s, cpu_s = time.perf_counter(), time.process_time()
    for rows, images in batches:
        work.finish(rows, work.prepare(images))
    elapsed_s, cpu_s = time.perf_counter() - started_s, time.process_time() - cpu_s
    return num_images / elapsed_s, 1000 * cpu_s / num_images


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--latency-ms", nargs="+", type=float, default=[0, 30, 100])
    parser.add_argument("--side", type=int, default=32, help="side of the images in pixels")
    options = parser.parse_args()
    (image,) = make_images(options.side, 1)
    if NUM_CORES > 1:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    table = [["", *(f"{latency:g} ms" for latency in options.latency_ms)]]
    cells: dict[str, list[str]] = {name: [] for name in WAYS}
    for latency_ms in options.latency_ms:
        mine, its = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        server = context.Process(target=run_store, args=(image, latency_ms / 1000, its))
        server.start()
        port = mine.recv()
        for name, (limits, reads_on) in WAYS.items():
            images_per_s, cpu_ms = measure(port, len(image), limits, reads_on, options.images)
            cells[name].append(f"{images_per_s:,.0f} ({cpu_ms:.2f} ms CPU)")
        server.terminate()
        server.join()
    print(f"images of {options.side} pixels, {len(image):,} bytes: images/s of one worker")
    print(format_table([*table, *([name, *values] for name, values in cells.items())]))


if __name__ == "__main__":
    main()
