"""Code shared by the peers: reading a source, one process per core, printing the result.

A source is a folder of files, a folder that `convert` wrote, or s3://BUCKET/PREFIX.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

NUM_CORES = len(os.sched_getaffinity(0))
S3_THREADS = 16  # requests in flight of a process
BATCH_SIZE = 256


@dataclass(frozen=True)
class Share:
    """What one process did; the clock runs over `steady_images` of its `images`."""

    images: int
    steady_images: int
    started_s: float  # time.time()
    finished_s: float


def list_shards(source: str) -> list[str]:
    """The Parquet files of a folder that `convert` wrote; none for any other source."""
    return sorted(map(str, Path(source).glob("shards/*.parquet")))


def open_s3() -> Any:
    """pyarrow's client, at the server that the environment names."""
    from pyarrow.fs import S3FileSystem

    scheme, _, host = os.environ["AWS_ENDPOINT_URL"].partition("://")
    region = os.environ["AWS_REGION"]
    return S3FileSystem(endpoint_override=host, scheme=scheme, region=region)


def list_files(source: str) -> list[str]:
    """Every file below a folder or a prefix, sorted; those in a bucket start with s3://."""
    if source.startswith("s3://"):
        from pyarrow.fs import FileSelector, FileType

        entries = open_s3().get_file_info(FileSelector(source[5:], recursive=True))
        return sorted(f"s3://{e.path}" for e in entries if e.type is FileType.File)
    found, pending = [], [source]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                (pending if entry.is_dir() else found).append(entry.path)
    return sorted(found)


def count_images(source: str) -> int:
    import pyarrow.parquet as pq

    shards = list_shards(source)
    return sum(pq.read_metadata(p).num_rows for p in shards) or len(list_files(source))


def read_bytes(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def read_batches(source: str, rank: int, num_ranks: int) -> Iterator[tuple[list[str], list[bytes]]]:
    """Yield paths and bytes of one rank's share, up to BATCH_SIZE at once.

    The first item is empty: then everything is imported and listed, and the clock may start.
    """
    if shards := list_shards(source):
        import pyarrow.parquet as pq

        yield [], []
        for path in shards[rank::num_ranks]:
            for batch in pq.ParquetFile(path).iter_batches(BATCH_SIZE, columns=["key", "image"]):
                images = batch.column("image").field("bytes")
                yield batch.column("key").to_pylist(), images.to_pylist()
        return
    files = list_files(source)[rank::num_ranks]
    read: Callable[[str], bytes] = read_bytes
    if source.startswith("s3://"):
        client = open_s3()

        def read(path: str) -> bytes:
            with client.open_input_file(path[5:]) as file:
                return file.read()  # type: ignore[no-any-return]

    with ThreadPoolExecutor(S3_THREADS) as threads:
        yield [], []
        for start in range(0, len(files), BATCH_SIZE):
            some = files[start : start + BATCH_SIZE]
            yield some, list((threads.map if source.startswith("s3://") else map)(read, some))


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
