"""Run work on many items wherever a command runs: in processes of this machine or on a cluster.

For work that is not the shards of a batch: these have actors of their own (`ray_pool`), with
heartbeats and quarantine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from reprlib import repr as shorten
from threading import Event
from typing import Any, TypeVar

from cifake_ray.config import ClusterConfig
from cifake_ray.errors import CifakeError, ResourceError
from cifake_ray.stages.batch.local_pool import MAX_LOSSES, LocalPool
from cifake_ray.stages.batch.plan import choose_placement
from cifake_ray.stages.resources import (
    Placement,
    find_cause,
    read_local_resources,
    runs_here,
)
from cifake_ray.storage.runs.list_parts import TaskPool
from cifake_ray.storage.s3.throttle import share_requests

Item = TypeVar("Item")
Result = TypeVar("Result")


class RayPool:
    """Tasks on the connected cluster, one for each item."""

    def __init__(self, placement: Placement) -> None:
        self.num_workers = placement.num_workers

    def map_items(
        self, work: Callable[[Item], Result], items: deque[Item]
    ) -> Generator[Result, None, None]:
        """Yield results as `TaskPool` says; as many tasks as workers are submitted at a time."""
        import ray

        task: Any = ray.remote(num_cpus=1, max_retries=MAX_LOSSES - 1)(_work_on)
        shared = ray.put(work)
        at_work: dict[ray.ObjectRef[Any], Item] = {}
        while items or at_work:
            while items and len(at_work) < self.num_workers:
                item = items.popleft()
                at_work[task.remote(shared, item, self.num_workers)] = item
            done, _ = ray.wait(list(at_work))
            item = at_work.pop(done[0])
            try:
                result: Result | CifakeError = ray.get(done[0])
            except ray.exceptions.RayTaskError:  # a bug: show its traceback
                raise
            except ray.exceptions.RayError as error:
                raise ResourceError(
                    f"the cluster has lost the work on {shorten(item)} ({find_cause(error)});"
                    " run the same command again"
                ) from error
            if isinstance(result, CifakeError):
                raise result
            yield result


class AwaitedPool:
    """A pool that another thread opens once it is wanted: that may start nodes of a cluster."""

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers  # as far as is known
        self.wanted, self.is_given_up = Event(), False
        self._pool = Future[TaskPool]()

    def use(self, pool: TaskPool) -> None:
        self.num_workers = pool.num_workers
        self._pool.set_result(pool)

    def give_up(self) -> None:
        """End the wait for a pool that does not come, or for results that nobody wants any more."""
        self.is_given_up = True
        self._pool.cancel()

    def map_items(
        self, work: Callable[[Item], Result], items: deque[Item]
    ) -> Generator[Result, None, None]:
        self.wanted.set()
        for result in self._pool.result().map_items(work, items):
            yield result
            if self.is_given_up:
                raise CancelledError


def _work_on(work: Callable[[Item], Result], item: Item, num_workers: int) -> Result | CifakeError:
    """Return an error of ours, because Ray would wrap a raised one."""
    share_requests(num_workers)
    try:
        return work(item)
    except CifakeError as error:
        return error


@contextmanager
def open_pool(
    config: ClusterConfig, num_workers: int | None, log: Callable[[str], None]
) -> Iterator[TaskPool]:
    """Yield processes of this machine, or of the cluster where one is named: a worker per CPU.

    ResourceError when it is too small, or does not answer.
    """
    if runs_here(config, num_workers, "cpu"):
        placement = choose_placement(read_local_resources("cpu"), num_workers, "cpu")
        with LocalPool(placement) as pool:
            yield pool
        return
    from cifake_ray.stages.cluster import connect_cluster

    least = Placement(num_workers or 1, 1, 0)
    with connect_cluster(config, least, log) as resources:
        yield RayPool(choose_placement(resources, num_workers, "cpu"))
