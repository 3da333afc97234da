"""Measure how evenly a run's shards are spread over its workers, and what a lost node costs.

    python tests/benchmarks/blocks.py [simulate] [run] [driver] [--shards 2000] [--mean-s 2.0]

`simulate`: 60,000 shards on 1,000 workers, event by event around the real `deal_shards`, with four
nodes lost. `run`: a real Ray with four nodes of 16 CPUs that are none, whose workers sleep as long
as a shard takes; one node is lost in the middle, and another one comes. `driver`: the CPU time that
the driver takes for a shard, of these actors and of Ray Data with a block for each shard.
"""

from __future__ import annotations

import argparse
import heapq
import logging
import math
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import ray
from ray.exceptions import ActorDiedError

from cifake_ray.stages.batch import ray_pool

SIGMA = 0.3  # of the logarithm of a shard's time
NODE_CPUS, NUM_NODES = 16, 4
QUICK_LOOKS = {"health_check_period_ms": 500}  # a node is dead after 2.5 s, not Ray's 15


def draw_seconds(shard: int, mean_s: float) -> float:
    """Return how long a shard takes: log-normal, the same at each attempt."""
    return random.Random(shard).lognormvariate(math.log(mean_s) - SIGMA**2 / 2, SIGMA)


# --- simulated ------------------------------------------------------------------------------------


@dataclass
class SimulatedCluster:
    """The answers to come, by their time."""

    seconds: list[float]  # of each shard
    answer_s: float = 0.01  # until the driver has an answer and the worker its next shard
    detect_s: float = 15.0  # until Ray knows that a node is lost
    replace_s: float = 180.0  # until there is another one
    now_s: float = 0.0
    events: list[tuple[float, int, Callable[[], Any]]] = field(default_factory=list)
    numbers: Any = field(default_factory=count)

    def at(self, time_s: float, act: Callable[[], Any]) -> None:
        heapq.heappush(self.events, (time_s, next(self.numbers), act))

    def take_answer(self) -> tuple[Any, Any]:
        while True:
            self.now_s, _, act = heapq.heappop(self.events)
            if (answer := act()) is not None:
                return answer


@dataclass(eq=False)
class SimulatedSlot:
    """A worker of the simulation."""

    cluster: SimulatedCluster
    life: int = 0
    is_lost: bool = False

    def start(self) -> None:
        wait_s = self.cluster.replace_s if self.is_lost else random.uniform(0, 2)
        self.is_lost = False
        self._answer(wait_s, lambda: None)

    def give(self, shard: int) -> None:
        self._answer(self.cluster.seconds[shard], lambda: shard)

    def _answer(self, after_s: float, answer: Callable[[], Any]) -> None:
        life = self.life
        self.cluster.at(
            self.cluster.now_s + after_s + self.cluster.answer_s,
            lambda: (self, answer) if life == self.life else None,
        )

    def die(self) -> None:
        """End now, which is known later."""
        self.life += 1
        self.is_lost = True

        def fail() -> None:
            raise ActorDiedError

        self._answer(self.cluster.detect_s, fail)


def simulate(seconds: list[float], num_workers: int, lost_nodes: int) -> tuple[float, float, float]:
    """Return wall time / even time, when the first report came and the longest pause after it."""
    random.seed(0)
    cluster = SimulatedCluster(seconds)
    slots = [SimulatedSlot(cluster) for _ in range(num_workers)]
    even_s = sum(seconds) / num_workers
    for node in range(lost_nodes):  # of 8 workers each, evenly over the run
        for slot in slots[8 * node : 8 * node + 8]:
            cluster.at(even_s * (node + 0.5) / lost_nodes, slot.die)
    times = [cluster.now_s for _ in ray_pool.deal_shards(len(seconds), slots, cluster.take_answer)]
    return times[-1] / even_s, times[0], max(end - start for start, end in pairwise(times))


def show_simulation() -> None:
    num_shards, num_workers, mean_s = 60_000, 1_000, 27.0
    seconds = [draw_seconds(shard, mean_s) for shard in range(num_shards)]
    blocks = [sum(seconds[n::4_096]) for n in range(4_096)]
    for what, units, lost in (
        ("a shard at a time", seconds, 0),
        ("a shard at a time, 4 nodes of 8 workers lost", seconds, 4),
        ("4,096 blocks, as it was", blocks, 0),
    ):
        wave, first_s, pause_s = simulate(units, num_workers, lost)
        print(
            f"simulated, {num_shards:,} shards of {mean_s:.0f} s on {num_workers:,} workers,"
            f" {what}: wall / even {wave:.3f}, first report after {first_s:.0f} s,"
            f" then one every {pause_s:.1f} s or sooner",
            flush=True,
        )


# --- on Ray ---------------------------------------------------------------------------------------


class SleepingActor:
    """Sleeps as long as a shard takes, and says whether an earlier attempt was lost."""

    def __init__(self, task: Any) -> None:
        self.folder, self.mean_s = task.folder, task.mean_s
        self.name = ray.get_runtime_context().get_actor_id()

    def get_ready(self) -> None:
        pass

    def report_shard(self, shard: int) -> dict[str, Any]:
        started_s = time.time()
        heartbeat = Path(self.folder) / str(shard)
        is_retried = heartbeat.exists()
        heartbeat.touch()
        time.sleep(draw_seconds(shard, self.mean_s))
        return {
            "shard": shard,
            "retried": is_retried,
            "worker": self.name,
            "node": ray.get_runtime_context().get_node_id(),
            "started_s": started_s,
            "finished_s": time.time(),
        }


@dataclass
class SpreadReport:
    """How the shards of a real run were spread."""

    reports: list[dict[str, Any]]
    times_s: list[float]  # when the driver got them
    lost_node: str = ""
    lost_s: float = math.inf  # when it was lost

    @property
    def num_retried(self) -> int:
        return sum(report["retried"] for report in self.reports)

    def measure_wave(self) -> float:
        """Return the workers' time in all / that in which they worked on what was reported.

        A worker is there from its first shard on, to the end of the run or until it is lost.
        """
        first_s: dict[str, float] = {}
        end_s: dict[str, float] = {}
        for report in self.reports:
            worker = report["worker"]
            first_s[worker] = min(first_s.get(worker, math.inf), report["started_s"])
            end_s[worker] = self.lost_s if report["node"] == self.lost_node else self.times_s[-1]
        work_s = sum(report["finished_s"] - report["started_s"] for report in self.reports)
        return (sum(end_s.values()) - sum(first_s.values())) / work_s


def run_on_ray(num_shards: int, mean_s: float, node_cpus: int, num_nodes: int) -> SpreadReport:
    """Deal shards to a worker per CPU of several nodes; lose one in the middle, and add one."""
    from ray.cluster_utils import Cluster

    options = {"include_dashboard": False, "_system_config": QUICK_LOOKS}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": node_cpus, **options})
    real, ray_pool.ShardActor = ray_pool.ShardActor, SleepingActor  # type: ignore[misc,assignment]
    try:
        nodes = [cluster.add_node(num_cpus=node_cpus) for _ in range(num_nodes - 1)]
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        with TemporaryDirectory() as folder:
            task: Any = SimpleNamespace(
                folder=folder,
                mean_s=mean_s,
                placement=SimpleNamespace(
                    num_workers=node_cpus * num_nodes, cpus_per_worker=1, gpus_per_worker=0
                ),
                run=SimpleNamespace(manifest=SimpleNamespace(num_shards=num_shards)),
            )
            found = SpreadReport([], [])

            def collect() -> None:
                for report in ray_pool.report_shards(task, threading.Event()):
                    found.reports.append(report)  # type: ignore[arg-type]
                    found.times_s.append(time.time())

            with ThreadPoolExecutor(1) as thread:
                collecting = thread.submit(collect)
                while len(found.reports) < num_shards // 2 and not collecting.done():
                    time.sleep(0.05)
                lost = nodes.pop()
                found.lost_node, found.lost_s = lost.node_id, time.time()
                cluster.remove_node(lost, allow_graceful=False)
                cluster.add_node(num_cpus=node_cpus)
                collecting.result()
        return found
    finally:
        ray_pool.ShardActor = real  # type: ignore[misc]
        ray.shutdown()
        cluster.shutdown()


def show_run(num_shards: int, mean_s: float) -> None:
    found = run_on_ray(num_shards, mean_s, NODE_CPUS, NUM_NODES)
    assert sorted(report["shard"] for report in found.reports) == list(range(num_shards))
    first_s = found.times_s[0] - min(report["started_s"] for report in found.reports)
    pause_s = max(end - start for start, end in pairwise(found.times_s))
    wall_s = found.times_s[-1] - min(report["started_s"] for report in found.reports)
    print(
        f"Ray, {num_shards:,} shards of {mean_s:g} s on {NODE_CPUS * NUM_NODES} CPUs that are none,"
        f" {NODE_CPUS} lost in the middle: {wall_s:.0f} s, worker time / work"
        f" {found.measure_wave():.3f}, {found.num_retried} shards retried, first report"
        f" {first_s:.1f} s after the first shard was begun, longest pause {pause_s:.1f} s"
    )


# --- the driver -----------------------------------------------------------------------------------


class IdleActor:
    """Answers at once, as actor of ours and of Ray Data."""

    def __init__(self, task: Any = None) -> None:
        pass

    def get_ready(self) -> None:
        pass

    def report_shard(self, shard: int) -> dict[str, Any]:
        return {"shard": shard, "facts": "x" * 300}

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"report": [self.report_shard(int(shard)) for shard in batch["shard"]]}


def show_driver(num_shards: int, num_workers: int = 8) -> None:
    """Print the driver's CPU time for a shard."""
    options: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False}
    ray.init("local", num_cpus=num_workers, logging_level=logging.ERROR, **options)
    real, ray_pool.ShardActor = ray_pool.ShardActor, IdleActor  # type: ignore[misc,assignment]
    task: Any = SimpleNamespace(
        placement=SimpleNamespace(num_workers=num_workers, cpus_per_worker=1, gpus_per_worker=0),
        run=SimpleNamespace(manifest=SimpleNamespace(num_shards=num_shards)),
    )
    for what, make in (
        ("actors", lambda: ray_pool.report_shards(task, threading.Event())),
        ("Ray Data", lambda: read_from_ray_data(num_shards, num_workers)),
    ):
        cpu_s, started_s = time.process_time(), time.time()
        reports = make()
        next(reports)
        first_cpu_s, first_s = time.process_time() - cpu_s, time.time() - started_s
        for _ in reports:
            pass
        each_ms = 1000 * (time.process_time() - cpu_s - first_cpu_s) / num_shards
        print(
            f"{what}, {num_shards:,} shards on {num_workers} workers: first report after"
            f" {first_s:.1f} s and {first_cpu_s:.1f} s of the driver's CPU, then {each_ms:.2f} ms"
            " of it for each",
            flush=True,
        )
    ray_pool.ShardActor = real  # type: ignore[misc]
    ray.shutdown()


def read_from_ray_data(num_shards: int, num_workers: int) -> Any:
    """Yield reports of Ray Data with a block for each shard."""
    from ray.data import ActorPoolStrategy, DataContext, from_items

    context = DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    shards = [{"shard": shard} for shard in range(num_shards)]
    yield from (
        from_items(shards, override_num_blocks=num_shards)
        .map_batches(
            IdleActor, batch_size=1, num_cpus=1, compute=ActorPoolStrategy(size=num_workers)
        )
        .iter_rows()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", nargs="*", help="which of simulate, run, driver (default: all)")
    parser.add_argument("--shards", type=int, default=2_000, help="of run and driver")
    parser.add_argument("--mean-s", type=float, default=2.0, help="of a shard of run")
    options = parser.parse_args()
    parts: dict[str, Callable[[], None]] = {
        "simulate": show_simulation,
        "run": lambda: show_run(options.shards, options.mean_s),
        "driver": lambda: show_driver(options.shards),
    }
    if unknown := set(options.part) - set(parts):
        parser.error(f"no part is called {', '.join(sorted(unknown))}")
    for name in options.part or parts:
        parts[name]()


if __name__ == "__main__":
    main()
