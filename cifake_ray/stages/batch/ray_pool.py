"""Run the workers of a batch as actors of Ray Data.

One row of Ray Data is one shard number, and only a report travels back, so no image crosses the
object store.
"""

from __future__ import annotations

import logging
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import ray
from ray.data import ActorPoolStrategy, DataContext

from cifake_ray.errors import CifakeError
from cifake_ray.stages.batch.prometheus import WorkMetrics
from cifake_ray.stages.batch.shard_worker import ShardReport, ShardWorker, WorkerTask
from cifake_ray.stages.cluster import read_resources

BLOCK_IMAGES = 4_096  # a Ray Data task costs tens of milliseconds; give it that many images
BLOCKS_PER_WORKER = 4  # at least, if there are enough shards: then all workers end together
MAX_BLOCKS = 4_096
ANSWER_TIMEOUT_S = 10.0  # of the cluster


class ShardActor:
    """A ShardWorker as Ray Data calls it, with metrics for Prometheus."""

    def __init__(self, task: WorkerTask) -> None:
        self.worker = ShardWorker(task, WorkMetrics(task.run.command))

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[ShardReport | CifakeError]]:
        return {"report": [self.worker.report_shard(int(shard)) for shard in batch["shard"]]}


def report_shards(task: WorkerTask) -> Generator[ShardReport | CifakeError, None, None]:
    """Commit all shards on the connected cluster; yield a report of each."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Ray would give up after half an hour without a finished block, even if it is processed.
    context.execution_no_progress_timeout_s = -1
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    manifest, placement = task.run.manifest, task.placement
    shards = [{"shard": shard} for shard in range(manifest.num_shards)]
    num_actors = min(placement.num_workers, len(shards))
    num_blocks = choose_blocks(len(shards), manifest.num_rows, num_actors)
    # The list is in the driver, so no read task needs a CPU: the actors may use all of them.
    results = ray.data.from_items(shards, override_num_blocks=num_blocks).map_batches(
        ShardActor,
        fn_constructor_args=(task,),
        batch_size=1,  # a shard; with GPUs Ray insists on a number
        num_cpus=placement.cpus_per_worker,
        num_gpus=placement.gpus_per_worker,
        compute=ActorPoolStrategy(size=num_actors),
    )
    for row in results.iter_rows():
        yield row["report"]


def choose_blocks(num_shards: int, num_images: int, num_workers: int) -> int:
    """Return the number of Ray Data tasks; each takes some shards and commits them one by one."""
    wanted = max(num_images // BLOCK_IMAGES, num_workers * BLOCKS_PER_WORKER)
    return min(num_shards, wanted, MAX_BLOCKS)


def describe_cluster() -> str:
    """Describe nodes and CPUs for an error message, even if the cluster does not answer."""

    def ask() -> str:
        resources = read_resources()
        free = ray.available_resources().get("CPU", 0)  # type: ignore[no-untyped-call]
        return (
            f"the cluster has {len(resources.nodes)} nodes alive with {resources.num_cpus} CPUs,"
            f" {free:g} of them free"
        )

    thread = ThreadPoolExecutor(1)
    answer = thread.submit(ask)
    thread.shutdown(wait=False)
    if wait([answer], ANSWER_TIMEOUT_S).done and not answer.exception():
        return answer.result()
    return "the cluster does not answer"
