"""List and freeze a list of images, or a Parquet file of them, by workers: CPU time per key.

    python tests/benchmarks/list_tables.py [--keys 300000] [--workers 2] [--tables list.csv ...]

The keys are 60 bytes long and name objects of no store: none is asked for. The driver lists a tenth
of them, the workers the rest. The figures leave out writing the table, but have the starts of the
workers, about 2 s of CPU each.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cifake_ray.config import ConvertConfig
from cifake_ray.stages.batch.local_pool import LocalPool
from cifake_ray.stages.resources import Placement
from cifake_ray.storage.runs.run_plan import RunPlan
from cifake_ray.storage.sources.open_source import open_source
from cifake_ray.storage.sources.source import Listing

TABLES = ["list.csv", "list.jsonl", "list.parquet", "images.parquet"]


def write_table(path: Path, num_keys: int) -> None:
    keys = [
        f"train/FAKE/generator-{n % 2000:04d}/2026-01-01/image-{n:016d}.jpg"
        for n in range(num_keys)
    ]
    uris = [f"s3://bucket/{key}" for key in keys]
    if path.name == "images.parquet":
        images = pa.repeat(pa.scalar(b"\xff\xd8\xff"), num_keys)
        table = pa.table({"key": keys, "image": images, "label": ["FAKE"] * num_keys})
        pq.write_table(table, path, row_group_size=1_000)
    elif path.suffix == ".parquet":
        table = pa.table({"path": uris, "label": ["FAKE"] * num_keys})
        pq.write_table(table, path, row_group_size=10_000)
    elif path.suffix == ".csv":
        path.write_text("path,label\n" + "".join(f"{uri},FAKE\n" for uri in uris))
    else:
        rows = (json.dumps({"path": uri, "label": "FAKE"}) for uri in uris)
        path.write_text("".join(f"{row}\n" for row in rows))


def read_cpu_s() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def freeze(table: Path, out: Path, num_keys: int, num_workers: int) -> str:
    """List and freeze; return what was measured."""
    config = ConvertConfig(src=str(table), out=str(out), allow_prefix=("s3://bucket/",))
    source = open_source(config, table, out)

    def list_source() -> Listing:
        listing = source.list_images(max_rows=num_keys // 10)
        listing.count_rows(describe=False)
        return listing

    started_s, before_s = time.perf_counter(), read_cpu_s()
    driver_before_s = time.process_time()
    with LocalPool(Placement(num_workers, 1, 0)) as pool:
        run = RunPlan(
            out=out,
            command="convert",
            settings={},
            config={},
            list_source=list_source,
            shard_rows=None,
            source=source,
            workers=pool,
        ).open()
    assert run.manifest.num_rows == num_keys
    driver_s = time.process_time() - driver_before_s
    return (
        f"{table.name:15s} {num_keys:8d} {num_workers:7d} {time.perf_counter() - started_s:8.1f}"
        f" {1e6 * (read_cpu_s() - before_s) / num_keys:11.1f} {1e6 * driver_s / num_keys:11.1f}"
        f"  {run.identity[:12]}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, default=300_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tables", nargs="+", default=TABLES, choices=TABLES)
    options = parser.parse_args()
    print(
        "table               keys workers  seconds  CPU us/key  driver's     identity", flush=True
    )
    for name in options.tables:
        with tempfile.TemporaryDirectory() as folder:
            table, out = Path(folder, name), Path(folder, "out")
            write_table(table, options.keys)
            print(freeze(table, out, options.keys, options.workers), flush=True)


if __name__ == "__main__":
    main()
