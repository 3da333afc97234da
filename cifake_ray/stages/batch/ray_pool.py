"""Run the workers of a batch as actors on a Ray cluster.

A worker is given one shard number at a time, and only its report travels back, so no image crosses
the object store. One that dies, alone or with its node, is replaced as soon as there is room, and
its shard is given to whoever is free next.

They are plain actors and not those of Ray Data, which takes eight times as much of the driver's CPU
for a shard and plans all shards before the first: deploy/SCALE.md has the figures.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Event
from typing import Any, Protocol

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from cifake_ray.errors import CifakeError
from cifake_ray.stages.batch.prometheus import WorkMetrics
from cifake_ray.stages.batch.shard_worker import ShardReport, ShardWorker, WorkerTask
from cifake_ray.stages.cluster import read_resources
from cifake_ray.storage.s3.throttle import share_requests

LOOK_S = 1.0  # between two looks whether anybody waits for the reports, and Ray is still there
ANSWER_TIMEOUT_S = 10.0  # of the cluster

Reports = Generator[ShardReport | CifakeError, None, None]


class ShardActor:
    """A ShardWorker in an actor, with metrics for Prometheus."""

    def __init__(self, task: WorkerTask) -> None:
        share_requests(task.placement.num_fetchers)
        self.worker = ShardWorker(task, WorkMetrics(task.run.command))

    def get_ready(self) -> None:
        """Answer once the actor has its place in the cluster and its process."""

    def report_shard(self, shard: int) -> ShardReport | CifakeError:
        return self.worker.report_shard(shard)


class WorkerSlot(Protocol):
    """A worker that is replaced when it dies."""

    def start(self) -> None:
        """Start a worker, in the place of one that has died; it answers None when it is ready."""

    def give(self, shard: int) -> None:
        """Give it a shard; it answers with a report. RayError, at the latest then, if it died."""


Answer = Callable[[], ShardReport | CifakeError | None]


def report_shards(task: WorkerTask, is_over: Event) -> Reports:
    """Commit all shards on the connected cluster; yield a report of each as it is committed.

    Once `is_over` is set by another thread, no shard is given out and the workers are ended.
    """
    placement, num_shards = task.placement, task.run.manifest.num_shards
    answers: SimpleQueue[tuple[_ActorSlot, Answer]] = SimpleQueue()
    make_actor = ray.remote(
        num_cpus=placement.cpus_per_worker,
        num_gpus=placement.gpus_per_worker,
        scheduling_strategy="SPREAD",
    )(ShardActor).remote
    task_ref = ray.put(task)
    num_slots = min(placement.num_workers, num_shards)
    slots = [_ActorSlot(lambda: make_actor(task_ref), answers) for _ in range(num_slots)]
    try:
        yield from deal_shards(num_shards, slots, lambda: _take_answer(answers, is_over))
    finally:
        for slot in slots:
            slot.end()


class _ActorSlot:
    """An actor, whose answers go into a queue: no thread waits for one of them."""

    def __init__(self, make_actor: Callable[[], Any], answers: SimpleQueue[Any]) -> None:
        self.make_actor, self.answers = make_actor, answers
        self.actor: Any = None

    def start(self) -> None:
        self.end()  # it may only be out of reach
        self.actor = self.make_actor()
        self._expect(self.actor.get_ready.remote())

    def give(self, shard: int) -> None:
        self._expect(self.actor.report_shard.remote(shard))

    def end(self) -> None:
        if self.actor is not None:
            with suppress(RayError, ValueError):  # of a Ray that was stopped meanwhile
                ray.kill(self.actor)

    def _expect(self, answer: Any) -> None:
        def put(future: Future[Any]) -> None:
            self.answers.put((self, future.result))

        answer.future().add_done_callback(put)


def _take_answer(answers: SimpleQueue[Any], is_over: Event) -> tuple[Any, Answer] | None:
    """Return a slot and its answer, None once it is over or this process has left the cluster."""
    found = None
    while found is None and ray.is_initialized():
        with suppress(Empty):
            found = answers.get(timeout=LOOK_S)
        if is_over.is_set():
            return None
    return found


def deal_shards(
    num_shards: int,
    slots: Sequence[WorkerSlot],
    take_answer: Callable[[], tuple[WorkerSlot, Answer] | None],
) -> Reports:
    """Give each worker a shard whenever it is free; yield the reports.

    The shard of a worker that died is given out before all others. Raise what is a bug: an error
    of a worker that is no CifakeError, or in its making.
    """
    waiting = deque(range(num_shards))
    at_work: dict[WorkerSlot, int] = {}
    idle: list[WorkerSlot] = []
    for slot in slots:
        slot.start()
    left = num_shards
    while left and (found := take_answer()) is not None:
        slot, answer = found
        try:
            report = answer()
        except RayTaskError:
            raise
        except RayError as error:
            if isinstance(error, RayActorError) and error.actor_init_failed:
                raise
            if slot in at_work:
                waiting.appendleft(at_work.pop(slot))
            slot.start()
        else:
            idle.append(slot)
            if report is not None:
                del at_work[slot]
                left -= 1
                yield report
        while waiting and idle:
            slot = idle.pop()
            at_work[slot] = waiting.popleft()
            slot.give(at_work[slot])


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
