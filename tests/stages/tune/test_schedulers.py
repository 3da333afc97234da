"""Schedulers: trials that fall behind are stopped, and what is told again is not judged again."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler

from cifake_ray.config import TuneConfig
from cifake_ray.core.search.space import parse_space
from cifake_ray.stages.tune.schedulers import make_scheduler
from cifake_ray.stages.tune.trial_worker import OBJECTIVE, REPLAYED


class Search:
    """Tells a scheduler of trials as Ray Tune would."""

    def __init__(self, scheduler: str) -> None:
        config = TuneConfig(shards="", run="", scheduler=scheduler)  # type: ignore[arg-type]
        self.scheduler: Any = make_scheduler(config, 9, parse_space({"lr": [0.1, 0.2]}))
        self.controller = SimpleNamespace(get_live_trials=list)

    def start(self, name: str) -> Any:
        trial = Trial(name)
        self.scheduler.on_trial_add(self.controller, trial)
        return trial

    def tell(self, trial: Any, epoch: int, score: float, is_replayed: bool = False) -> str:
        result = {"epoch": epoch, OBJECTIVE: score, REPLAYED: is_replayed}
        decision: str = self.scheduler.on_trial_result(self.controller, trial, result)
        return decision


class Trial:
    """All that schedulers ask of one."""

    def __init__(self, name: str) -> None:
        self.trial_id = name


@pytest.mark.parametrize("scheduler", ["asha", "median"])
def test_what_is_told_again_is_noted_and_not_judged(scheduler: str) -> None:
    search = Search(scheduler)
    for number in range(4):
        good = search.start(f"good-{number}")
        for epoch in (1, 2, 3):
            told = search.tell(good, epoch, 0.9 + number / 100, is_replayed=True)
            assert told == TrialScheduler.CONTINUE
    bad = search.start("bad")
    for epoch in (1, 2):
        assert search.tell(bad, epoch, 0.5, is_replayed=True) == TrialScheduler.CONTINUE
    assert search.tell(bad, 3, 0.5) == TrialScheduler.STOP
