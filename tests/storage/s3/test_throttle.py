"""The rate of requests: what a store that asks to slow down leaves of it, and how it comes back."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from cifake_ray.config import StoreConfig
from cifake_ray.storage.s3.client import connect
from cifake_ray.storage.s3.throttle import Throttle, share_requests


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def send(throttle: Throttle, clock: Clock, seconds: float, answer: str) -> int:
    """Send as many requests as there may be; all get the same answer. Return how many."""
    end_s, num_sent = clock.now_s + seconds, 0
    while clock.now_s < end_s:
        pause_s = throttle.try_start()
        if pause_s:
            clock.now_s = min(clock.now_s + pause_s, end_s)
            continue
        num_sent += 1
        throttle.end()
        throttle.speed_up() if answer == "ok" else throttle.slow_down()
        clock.now_s += 1e-4
    return num_sent


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_store_that_answers_nothing_for_a_while_costs_seconds(clock: Clock) -> None:
    throttle = Throttle(64, clock=clock)
    before = send(throttle, clock, 1.0, "ok")
    send(throttle, clock, 20.0, "503")
    assert throttle.per_s < before / 100
    send(throttle, clock, 10.0, "ok")
    assert before / 4 < throttle.per_s < before


def test_a_rate_that_was_too_much_is_approached_slowly(clock: Clock) -> None:
    throttle = Throttle(64, clock=clock)
    send(throttle, clock, 1.0, "ok")
    throttle.slow_down()
    halved = throttle.per_s
    send(throttle, clock, 10.0, "ok")
    assert halved < throttle.per_s < 1.5 * halved


def test_the_limit_of_the_user_is_never_passed(clock: Clock) -> None:
    throttle = Throttle(64, 2.0, clock)
    assert send(throttle, clock, 10.0, "ok") <= 21
    throttle.slow_down()
    assert throttle.per_s <= 2.0


def test_whoever_is_stopped_waits_no_longer() -> None:
    """Whether it waits for the clock, for a request to end, or for another thread's turn."""
    slow, full = Throttle(64, 0.01), Throttle(1)
    for throttle in (slow, full):
        stop, other = threading.Event(), threading.Event()

        def wait(event: threading.Event, throttle: Throttle = throttle) -> float | None:
            with throttle.take_turn(event) as waited_s:
                return waited_s

        with ThreadPoolExecutor(9) as threads, ExitStack() as held:
            first = held.enter_context(throttle.take_turn(stop))
            assert first is not None
            if throttle is slow:
                held.close()
            waiting = threads.submit(wait, other)
            time.sleep(0.1)
            stopped = [threads.submit(wait, stop) for _ in range(8)]
            time.sleep(0.1)
            assert not any(each.done() for each in (waiting, *stopped))
            stop.set()
            assert [each.result(timeout=10) for each in stopped] == [None] * 8
            assert not waiting.done()
            other.set()
            assert waiting.result(timeout=10) is None
        assert throttle.in_flight == 0


def test_threads_take_turns_in_the_order_in_which_they_came() -> None:
    throttle, stop = Throttle(64, 100.0), threading.Event()

    def count_turns() -> int:
        num_turns = 0
        while True:
            with throttle.take_turn(stop) as waited_s:
                if waited_s is None:
                    return num_turns
                num_turns += 1

    with ThreadPoolExecutor(32) as threads:
        counts = [threads.submit(count_turns) for _ in range(32)]
        time.sleep(2.5)
        stop.set()
        turns = [each.result(timeout=10) for each in counts]
    assert sum(turns) > 64
    assert min(turns) >= sum(turns) / len(turns) / 2


def test_a_client_has_the_share_that_its_process_has_now() -> None:
    """A process that has listed for a run of two workers may then fetch for one of fourteen."""
    store = StoreConfig(s3_endpoint_url="http://127.0.0.1:9", s3_max_requests_per_s=1400)
    try:
        share_requests(2)
        assert connect(store).throttle.max_per_s == 700
        share_requests(14)
        assert connect(store).throttle.max_per_s == 100
        assert connect(store) is connect(store)
    finally:
        share_requests(1)
