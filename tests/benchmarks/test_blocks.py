"""Dealing shards to workers: what is given out when one of them dies, and the last wave."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable
from typing import Any

import blocks
import pytest
from ray import cloudpickle
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError, RayTaskError

from cifake_ray.stages.batch.ray_pool import deal_shards

cloudpickle.register_pickle_by_value(sys.modules["blocks"])  # workers do not know the benchmarks


class Slot:
    """A worker that does as it is told, and notes what it was given."""

    def __init__(self, answers: deque[Any], fails: Callable[[int], RayError | None]) -> None:
        self.answers, self.fails = answers, fails
        self.given: list[int] = []
        self.starts = 0

    def start(self) -> None:
        self.starts += 1
        self.answers.append((self, lambda: None))

    def give(self, shard: int) -> None:
        self.given.append(shard)
        error = self.fails(shard)

        def answer() -> int:
            if error:
                raise error
            return shard

        self.answers.append((self, answer))


def deal(num_shards: int, *fails: Callable[[int], RayError | None]) -> tuple[list[Any], list[Slot]]:
    answers: deque[Any] = deque()
    slots = [Slot(answers, fail) for fail in fails]
    take: Any = answers.popleft
    return list(deal_shards(num_shards, slots, take)), slots


def test_each_worker_has_one_shard_at_a_time_and_each_shard_is_reported_by_itself() -> None:
    reports, slots = deal(7, lambda shard: None, lambda shard: None)
    assert reports == list(range(7))
    assert [slot.given for slot in slots] == [[0, 2, 4, 6], [1, 3, 5]]


@pytest.mark.parametrize("error", [ActorDiedError(), ActorUnavailableError("away", None)])
def test_a_worker_that_is_lost_is_replaced_and_its_shard_is_given_out_next(error: RayError) -> None:
    errors = {3: error}
    reports, slots = deal(8, lambda shard: errors.pop(shard, None), lambda s: errors.pop(s, None))
    assert sorted(reports) == list(range(8))
    given = slots[0].given + slots[1].given
    assert sorted(given) == sorted([*range(8), 3])
    assert sorted(slot.starts for slot in slots) == [1, 2]
    assert reports.index(3) < reports.index(6)


def test_a_shard_that_is_lost_last_goes_to_a_worker_that_has_nothing_to_do() -> None:
    lost = [ActorDiedError()]
    reports, slots = deal(2, lambda s: lost.pop() if s == 0 and lost else None, lambda s: None)
    assert sorted(reports) == [0, 1]
    assert sum(slot.given.count(0) for slot in slots) == 2


def test_a_bug_is_not_tried_again() -> None:
    bug = RayTaskError("report_shard", "a traceback", KeyError("x"))
    with pytest.raises(RayTaskError):
        deal(3, lambda shard: bug if shard == 1 else None)
    with pytest.raises(ActorDiedError):  # in the making of a worker
        deal(3, lambda shard: ActorDiedError(bug) if shard == 1 else None)


def test_nothing_is_waited_for_once_ray_is_gone() -> None:
    assert list(deal_shards(3, [Slot(deque(), lambda shard: None)], lambda: None)) == []


def test_the_last_wave_is_small_with_a_shard_at_a_time() -> None:
    """6,000 shards on 100 workers; the benchmark has 60,000 on 1,000."""
    seconds = [blocks.draw_seconds(shard, 27.0) for shard in range(6_000)]
    wave, first_s, pause_s = blocks.simulate(seconds, 100, lost_nodes=1)
    assert 1.0 < wave < 1.05
    assert first_s < 27
    assert pause_s < 10


@pytest.mark.cluster
@pytest.mark.timeout(200)
def test_a_node_that_is_lost_costs_its_shards_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    found = blocks.run_on_ray(num_shards=60, mean_s=0.5, node_cpus=2, num_nodes=2)
    assert sorted(report["shard"] for report in found.reports) == list(range(60))
    assert 1 <= found.num_retried <= 2, "what each of its two workers was at"
    lost = [r for r in found.reports if r["node"] == found.lost_node]
    assert 0 < len(lost) < 40
