"""Work on items in processes of this machine and in tasks of Ray: the same promises."""

from __future__ import annotations

import os
import signal
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import CancelledError
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import ray

from cifake_ray.config import ClusterConfig
from cifake_ray.errors import ResourceError, StorageError
from cifake_ray.stages.batch.local_pool import MAX_LOSSES, LocalPool
from cifake_ray.stages.batch.task_pool import AwaitedPool, RayPool, open_pool
from cifake_ray.stages.resources import Placement
from cifake_ray.storage.runs.list_parts import THIS_PROCESS, TaskPool

TWO_WORKERS = Placement(2, 1, 0)


@pytest.fixture(params=["local", pytest.param("ray", marks=pytest.mark.cluster)])
def pool(request: pytest.FixtureRequest) -> Iterator[TaskPool]:
    if request.param == "local":
        with LocalPool(TWO_WORKERS) as local:
            yield local
    else:
        request.getfixturevalue("ray_cluster")
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        yield RayPool(TWO_WORKERS)


def halve(number: int) -> tuple[int, ...]:
    """Return what is left to be done."""
    return (number // 2, number - number // 2) if number > 1 else ()


def refuse(number: int) -> int:
    if number == 3:
        raise StorageError("three: no such file")
    return number


def die_first(folder: Path, number: int) -> int:
    """End the process at an odd number, unless another one has done so."""
    if number % 2:
        try:
            (folder / str(number)).touch(exist_ok=False)
        except FileExistsError:
            return number
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_pool_that_was_given_up_hands_out_no_more_items() -> None:
    awaited, done = AwaitedPool(1), list[int]()
    awaited.use(THIS_PROCESS)
    results = awaited.map_items(done.append, deque(range(9)))
    next(results)
    awaited.give_up()
    with pytest.raises(CancelledError):
        next(results)
    assert done == [0]


def die(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_items_may_be_appended_while_results_are_read(pool: TaskPool) -> None:
    items, num_results = deque([100]), 0
    for left in pool.map_items(halve, items):
        num_results += 1
        items.extend(left)
    assert num_results == 199  # nodes of a binary tree with 100 leaves


def test_a_pool_does_one_work_after_the_other(pool: TaskPool) -> None:
    assert sorted(pool.map_items(abs, deque([-1, 2, -3]))) == [1, 2, 3]
    assert list(pool.map_items(abs, deque())) == []
    assert sorted(pool.map_items(str, deque(range(10)))) == list("0123456789")


def test_an_error_of_ours_is_raised_as_it_is(pool: TaskPool) -> None:
    with pytest.raises(StorageError, match="three: no such file"):
        list(pool.map_items(refuse, deque(range(9))))


def test_the_items_of_processes_that_die_are_given_out_again(
    pool: TaskPool, tmp_path: Path
) -> None:
    found = pool.map_items(partial(die_first, tmp_path), deque(range(6)))
    assert sorted(found) == list(range(6))
    assert len(list(tmp_path.iterdir())) == 3


def test_an_item_that_ends_every_process_ends_the_work(pool: TaskPool) -> None:
    with pytest.raises(ResourceError, match=f"{MAX_LOSSES} times at 7|lost the work on 7"):
        list(pool.map_items(die, deque([7])))


class Unknown:
    """Pickled as what no module has."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return import_module, ("no_such_module",)


def test_work_that_a_process_cannot_read_shows_its_traceback() -> None:
    with (
        LocalPool(TWO_WORKERS) as pool,
        pytest.raises(RuntimeError, match=r"(?s)Traceback.*no_such_module"),
    ):
        list(pool.map_items(str, deque([Unknown()])))


def test_no_cluster_named_is_processes_here() -> None:
    with open_pool(ClusterConfig(), 0, print) as pool:
        assert isinstance(pool, LocalPool)
        assert list(pool.map_items(abs, deque([-1]))) == [1]
