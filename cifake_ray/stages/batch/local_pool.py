"""Run the workers of a batch as processes of this machine, without a cluster.

Starting Ray takes longer than many runs. A worker is this module run by `python -m`: it gets its
task and then shard numbers over a pipe, and answers with reports. One that dies is replaced, and
its shard is given out again, as Ray does with its actors.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Generator, Iterator
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from typing import Any

import pyarrow as pa

from cifake_ray.errors import CifakeError, ResourceError
from cifake_ray.stages.batch.child_process import READY, ChildProcess, connect_parent
from cifake_ray.stages.batch.shard_worker import ShardReport, ShardWorker, WorkerTask
from cifake_ray.stages.resources import Placement
from cifake_ray.storage.sources.source import MIN_SHARD_ROWS

MAX_STARTS = 3  # of a process that never becomes ready


class _Worker:
    """A process, the shard that it has now, and what to start another one like it."""

    def __init__(self, module: str, env: dict[str, str]) -> None:
        self.module, self.env = module, env
        self.starts = 0
        self.start()

    def start(self) -> None:
        self.starts += 1
        self.child = ChildProcess(__spec__.name, self.module, env=self.env)


class LocalPool:
    """Processes that commit shards. `with` ends them."""

    def __init__(self, placement: Placement, module: str) -> None:
        """Start the first process, which imports the verb's module while the source is listed."""
        self.placement, self.module, self.is_open = placement, module, True
        self.workers: list[_Worker] = []
        self._start_workers(1)

    def _start_workers(self, num_workers: int) -> None:
        """Start processes until there are so many."""
        use_gpu = self.placement.gpus_per_worker > 0
        for number in range(len(self.workers), num_workers):
            self.workers.append(_Worker(self.module, choose_environment(number, use_gpu)))

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
        """Commit all shards; yield a report of each, in the order in which they are committed.

        ResourceError when no process can be started.
        """
        waiting = deque(range(task.run.manifest.num_shards))
        self._start_workers(min(self.placement.num_workers, len(waiting)))
        at_work: dict[int, int] = {}  # worker -> shard
        left = len(waiting)
        while left and self.is_open:
            ready = wait([worker.child.connection for worker in self.workers])
            for number, worker in enumerate(self.workers):
                if worker.child.connection not in ready:
                    continue
                try:
                    answer = worker.child.connection.recv()
                except (EOFError, OSError):
                    if not self.is_open:
                        return
                    if number in at_work:
                        waiting.appendleft(at_work.pop(number))
                    _replace(worker)
                    continue
                if isinstance(answer, (ShardReport, CifakeError)):
                    del at_work[number]
                    left -= 1
                    yield answer
                elif answer == READY:
                    worker.starts = 0
                    worker.child.connection.send(task)
                else:
                    raise RuntimeError(f"in a worker process: {answer}")
                if waiting:
                    at_work[number] = waiting.popleft()
                    worker.child.connection.send(at_work[number])


def _replace(worker: _Worker) -> None:
    """Start a process in the place of one that has died."""
    code = worker.child.end()
    if worker.starts >= MAX_STARTS:
        raise ResourceError(worker.child.explain_start(code))
    worker.start()


def choose_environment(number: int, use_gpu: bool) -> dict[str, str]:
    """Return the variables of worker `number`: a thread, its GPU, one arena as with Ray."""
    env = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    env = {name: os.environ.get(name, value) for name, value in env.items()}
    if use_gpu:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        env["CUDA_VISIBLE_DEVICES"] = visible.split(",")[number] if visible else str(number)
    return env


def serve_shards(parent: Connection[Any, Any], module: str) -> None:
    """Commit the shards that come over the pipe, until it is closed."""
    given: SimpleQueue[Any] = SimpleQueue()

    def receive() -> None:
        try:
            while True:
                given.put(parent.recv())
        except (EOFError, OSError):  # whatever this process is doing, nobody waits for it
            os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent takes it and ends this process
    sys.excepthook = lambda *error: parent.send("".join(traceback.format_exception(*error)))
    threading.Thread(target=receive, daemon=True).start()
    importlib.import_module(module)
    parent.send(READY)
    worker = ShardWorker(given.get())
    while True:
        parent.send(worker.report_shard(given.get()))


if __name__ == "__main__":
    serve_shards(connect_parent(sys.argv[1:])[0], sys.argv[2])
