"""Run work in processes of this machine, without a cluster.

Starting Ray takes longer than many runs. A worker is this module run by `python -m`: it gets a
function and then items over a pipe, and answers with results. One that dies is replaced, and its
item is given out again, as Ray does with its actors and tasks.
"""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from reprlib import repr as shorten
from typing import Any, TypeVar

import pyarrow as pa

from cifake_ray.errors import CifakeError, ResourceError
from cifake_ray.stages.batch.child_process import READY, ChildProcess, connect_parent
from cifake_ray.stages.batch.shard_worker import ShardReport, ShardWorker, WorkerTask
from cifake_ray.stages.resources import Placement
from cifake_ray.storage.s3.throttle import share_requests
from cifake_ray.storage.sources.source import MIN_SHARD_ROWS

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_STARTS = 3  # of a process that never becomes ready
MAX_LOSSES = 8  # processes, one after the other, that an item may end


class _Worker:
    """A process, what it does, the item that it has now, and what to start another one like it."""

    def __init__(self, words: list[str], env: dict[str, str]) -> None:
        self.words, self.env = words, env
        self.starts = 0
        self.start()

    def start(self) -> None:
        self.starts += 1
        self.is_ready = False
        self.work: Callable[[Any], Any] | None = None
        self.given: tuple[Any, int] | None = None  # the item, and how many processes it has ended
        self.child = ChildProcess(__spec__.name, *self.words, env=self.env)

    def give(self, work: Callable[[Any], Any], given: tuple[Any, int]) -> None:
        """Send an item, as (item, None), and before the first one (None, what to do with it)."""
        self.given = given
        with suppress(OSError):  # a process that has died is noticed when its answer is read
            if self.work is not work:
                self.child.connection.send((None, work))
                self.work = work
            self.child.connection.send((given[0], None))

    def receive(self) -> tuple[Any] | None:
        """Return a result or an error of ours as a tuple of one; None when the process is ready.

        EOFError or OSError when the process has died.
        """
        answer = self.child.connection.recv()
        if answer == READY:
            self.starts, self.is_ready = 0, True
            return None
        if not isinstance(answer, tuple):
            raise RuntimeError(f"in a worker process: {answer}")
        self.given = None
        return answer

    def replace(self) -> None:
        """Start a process in the place of this one, which has died."""
        code = self.child.end()
        if self.starts >= MAX_STARTS:
            raise ResourceError(self.child.explain_start(code))
        self.start()


class LocalPool:
    """Processes that do work on items. `with` ends them."""

    def __init__(self, placement: Placement, module: str | None = None) -> None:
        """Start the first process, which imports `module` while the caller has other work."""
        self.placement, self.module, self.is_open = placement, module, True
        self.num_workers = placement.num_workers
        self.workers: list[_Worker] = []
        self._start_workers(1)

    def _start_workers(self, num_workers: int) -> None:
        """Start processes until there are so many."""
        use_gpu = self.placement.gpus_per_worker > 0
        words = [str(self.num_workers), *filter(None, [self.module])]
        for number in range(len(self.workers), num_workers):
            self.workers.append(_Worker(words, choose_environment(number, use_gpu)))

    def follow_listing(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Start as many of the others as a listing is already long enough for."""
        listed = 0
        for batch in batches:
            listed += batch.num_rows
            self._start_workers(min(self.placement.num_workers, listed // MIN_SHARD_ROWS))
            yield batch

    def __enter__(self) -> LocalPool:
        return self

    def __exit__(self, *error: object) -> None:
        self.is_open = False
        for worker in self.workers:  # what they had begun is redone, as after any kill
            worker.child.process.kill()
            worker.child.end()

    def report_shards(self, task: WorkerTask) -> Generator[ShardReport | CifakeError, None, None]:
        """Commit all shards; yield a report of each, in the order in which they are committed."""
        shards = deque(range(task.run.manifest.num_shards))
        return self.map_items(ShardWorker(task).report_shard, shards)

    def map_items(
        self, work: Callable[[Item], Result], items: deque[Item]
    ) -> Generator[Result, None, None]:
        """Yield what `work` returns for each item, in the order in which they are done.

        `work` is pickled; what it keeps stays in its process from one item to the next. Items may
        be appended while results are read. A CifakeError that `work` raises is raised here.
        ResourceError when no process can be started, or an item ends MAX_LOSSES of them.
        """
        lost = deque[tuple[Item, int]]()
        work = partial(work)  # unlike all before: what a map that broke off has begun is dropped
        while self.is_open:
            for worker in self.workers:
                if worker.is_ready and worker.given is None and (lost or items):
                    worker.give(work, lost.popleft() if lost else (items.popleft(), 0))
            num_busy = sum(
                worker.given is not None and worker.work is work for worker in self.workers
            )
            if not (num_busy or lost or items):
                return
            self._start_workers(min(self.num_workers, num_busy + len(lost) + len(items)))
            ready = wait([worker.child.connection for worker in self.workers])
            for worker in self.workers:
                if worker.child.connection not in ready:
                    continue
                is_ours = worker.work is work
                try:
                    answer = worker.receive()
                except (EOFError, OSError):
                    if not self.is_open:
                        return
                    if worker.given is not None and is_ours:
                        lost.append(self._count_loss(*worker.given))
                    worker.replace()
                    continue
                if answer is not None and is_ours:
                    if isinstance(answer[0], CifakeError):
                        raise answer[0]
                    yield answer[0]

    def _count_loss(self, item: Item, num_losses: int) -> tuple[Item, int]:
        if num_losses + 1 >= MAX_LOSSES:
            raise ResourceError(
                f"a process of this command ended {MAX_LOSSES} times at {shorten(item)}; free"
                " memory and run the same command again"
            )
        return item, num_losses + 1


def choose_environment(number: int, use_gpu: bool) -> dict[str, str]:
    """Return the variables of worker `number`: a thread, its GPU, one arena as with Ray."""
    env = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    env = {name: os.environ.get(name, value) for name, value in env.items()}
    if use_gpu:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        env["CUDA_VISIBLE_DEVICES"] = visible.split(",")[number] if visible else str(number)
    return env


def serve_items(parent: Connection[Any, Any], num_workers: int, modules: list[str]) -> None:
    """Do the work that comes over the pipe on the items that follow, until it is closed."""
    given: SimpleQueue[bytes] = SimpleQueue()

    def receive() -> None:
        try:
            while True:
                given.put(parent.recv_bytes())
        except (EOFError, OSError):  # whatever this process is doing, nobody waits for it
            os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent takes it and ends this process
    sys.excepthook = lambda *error: parent.send("".join(traceback.format_exception(*error)))
    threading.Thread(target=receive, daemon=True).start()
    share_requests(num_workers)
    for module in modules:
        importlib.import_module(module)
    parent.send(READY)
    work: Callable[[Any], Any]
    while True:
        item, new_work = pickle.loads(given.get())
        if new_work is not None:
            work = new_work
            continue
        try:
            parent.send((work(item),))
        except CifakeError as error:
            parent.send((error,))


if __name__ == "__main__":
    pipe, (count, *names) = connect_parent(sys.argv[1:])
    serve_items(pipe, int(count), names)
