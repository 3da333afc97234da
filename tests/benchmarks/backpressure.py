"""Simulate 1,000 workers that read images from one prefix of S3, which splits after a while.

    python tests/benchmarks/backpressure.py [--workers 1000] [--seconds 240]

Nothing is sent: time is simulated, event by event, around the real `Throttle` of each worker, with
the retries of `S3Limits`. The store answers 5,500 requests a second and 503 to all others; it gives
twice as much after 120 s and again each minute. The same is done with what was there before: the
requests in flight were halved, down to one, and not their rate.
"""

from __future__ import annotations

import argparse
import heapq
import random
import sys
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Protocol

sys.path.insert(0, str(Path(__file__).parents[1]))

from cifake_ray.storage.s3.limits import DEFAULT_LIMITS
from cifake_ray.storage.s3.throttle import HALVE_EVERY_S, Throttle, share_requests

PREFIX_PER_S = 5_500.0  # GETs, by S3's documentation
SPLIT_AFTER_S, SPLIT_EVERY_S = 120.0, 60.0  # assumed
ANSWER_S, REFUSAL_S = 0.1, 0.02  # assumed: until an object is there, and a 503
IMAGE_S = 0.0017  # CPU time of a small image: deploy/SCALE.md
TICK_S = 0.1  # in which the store counts


class AnyThrottle(Protocol):
    def try_start(self) -> float: ...
    def end(self) -> None: ...
    def slow_down(self) -> None: ...
    def speed_up(self) -> None: ...


class InFlightThrottle:
    """What was there before: it halves the requests in flight."""

    def __init__(self, most: int, clock: Callable[[], float]) -> None:
        self.most, self.clock = most, clock
        self.limit, self.in_flight, self.halved_at_s = float(most), 0, 0.0

    def try_start(self) -> float:
        if self.in_flight >= int(self.limit):
            return float("inf")
        self.in_flight += 1
        return 0.0

    def end(self) -> None:
        self.in_flight -= 1

    def slow_down(self) -> None:
        if self.clock() - self.halved_at_s >= HALVE_EVERY_S:
            self.limit, self.halved_at_s = max(1.0, self.limit / 2), self.clock()

    def speed_up(self) -> None:
        self.limit = min(float(self.most), self.limit + 1 / self.limit)


@dataclass
class Image:
    """An image that is being read."""

    deadline_s: float
    waits_since_s: float
    attempts: int = 0
    longest_s: float = DEFAULT_LIMITS.first_pause_s


@dataclass
class Worker:
    """A process: as many threads as requests may be in flight, and one that computes."""

    throttle: AnyThrottle
    waiting: deque[Image] = field(default_factory=deque)
    free_s: float = 0.0  # when the images that are there have been computed
    wakes_s: float = float("inf")


@dataclass
class Store:
    """Answers what its prefix gives, and refuses all others."""

    tick: int = -1
    left: float = 0.0

    def accepts(self, now_s: float) -> bool:
        if int(now_s / TICK_S) != self.tick:
            self.tick, self.left = int(now_s / TICK_S), find_capacity(now_s) * TICK_S
        self.left -= 1
        return self.left >= 0


def find_capacity(now_s: float) -> float:
    splits = max(0, 1 + int((now_s - SPLIT_AFTER_S) // SPLIT_EVERY_S))
    return PREFIX_PER_S * 2**splits


@dataclass
class Simulation:
    """The clock, the events to come, and what is counted."""

    num_workers: int
    end_s: float
    now_s: float = 0.0
    events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = field(
        default_factory=list
    )
    numbers: Any = field(default_factory=count)
    store: Store = field(default_factory=Store)
    sent: Counter[int] = field(default_factory=Counter)
    refused: Counter[int] = field(default_factory=Counter)
    done: int = 0
    throttled: int = 0

    def clock(self) -> float:
        return self.now_s

    def at(self, time_s: float, act: Callable[..., None], *values: Any) -> None:
        heapq.heappush(self.events, (time_s, next(self.numbers), act, values))

    def run(self, make_throttle: Callable[[], AnyThrottle]) -> None:
        for _ in range(self.num_workers):
            worker = Worker(make_throttle())
            for _ in range(DEFAULT_LIMITS.max_in_flight):
                self.at(0.0, self.begin, worker)
        while self.events[0][0] < self.end_s:
            self.now_s, _, act, values = heapq.heappop(self.events)
            act(*values)

    def begin(self, worker: Worker) -> None:
        """A thread takes the next image."""
        self.queue(worker, Image(self.now_s + DEFAULT_LIMITS.deadline_s, self.now_s))

    def queue(self, worker: Worker, image: Image) -> None:
        image.waits_since_s = self.now_s
        worker.waiting.append(image)
        self.pump(worker)

    def wake(self, worker: Worker) -> None:
        worker.wakes_s = float("inf")
        self.pump(worker)

    def pump(self, worker: Worker) -> None:
        """Send what the throttle lets through."""
        while worker.waiting:
            pause_s = worker.throttle.try_start()
            if pause_s:
                time_s = self.now_s + pause_s
                if time_s < worker.wakes_s and pause_s != float("inf"):
                    worker.wakes_s = time_s
                    self.at(time_s, self.wake, worker)
                return
            image = worker.waiting.popleft()
            image.deadline_s += self.now_s - image.waits_since_s
            image.attempts += 1
            second = int(self.now_s)
            self.sent[second] += 1
            if self.store.accepts(self.now_s):
                self.at(self.now_s + ANSWER_S * random.uniform(0.5, 1.5), self.take, worker)
            else:
                self.refused[second] += 1
                self.at(self.now_s + REFUSAL_S, self.refuse, worker, image)

    def take(self, worker: Worker) -> None:
        """An image has come: its thread goes on once it is computed."""
        worker.throttle.end()
        worker.throttle.speed_up()
        self.done += 1
        worker.free_s = max(worker.free_s, self.now_s) + IMAGE_S
        ahead_s = DEFAULT_LIMITS.max_in_flight * IMAGE_S  # so many images wait at most
        self.at(max(self.now_s, worker.free_s - ahead_s), self.begin, worker)
        self.pump(worker)

    def refuse(self, worker: Worker, image: Image) -> None:
        """The store has asked to slow down: what `S3Client` does then."""
        worker.throttle.end()
        worker.throttle.slow_down()
        pause_s = random.uniform(0, image.longest_s)
        image.longest_s = min(2 * image.longest_s, DEFAULT_LIMITS.max_pause_s)
        is_over = image.attempts >= DEFAULT_LIMITS.max_attempts
        if is_over or self.now_s + pause_s > image.deadline_s:
            self.throttled += 1
            self.begin(worker)
        else:
            self.at(self.now_s + pause_s, self.queue, worker, image)
            self.pump(worker)


def simulate(
    num_workers: int, end_s: float, make: Callable[[Callable[[], float]], AnyThrottle]
) -> Simulation:
    random.seed(0)
    simulation = Simulation(num_workers, end_s)
    simulation.run(lambda: make(simulation.clock))
    return simulation


def report(title: str, simulation: Simulation) -> None:
    images = simulation.done + simulation.throttled
    print(
        f"{title}: {simulation.done:,} images read,"
        f" {simulation.throttled:,} io_throttled ({simulation.throttled / images:.3%})"
    )
    print("  seconds     store gives  requests/s     503  of what it gives is used")
    for start in (0, 1, 2, 3, 5, 10, 20, 30, 60, 90, 120, 150, 180, 210, 240, 270):
        seconds = range(start, min(start + (1 if start < 5 else 10), int(simulation.end_s)))
        if not seconds:
            continue
        sent = sum(simulation.sent[second] for second in seconds) / len(seconds)
        refused = sum(simulation.refused[second] for second in seconds) / len(seconds)
        gives = sum(map(find_capacity, seconds)) / len(seconds)
        print(
            f"  {start:3} to {seconds[-1] + 1:3} {gives:14,.0f} {sent:11,.0f}"
            f" {refused / max(sent, 1):7.1%} {(sent - refused) / gives:10.0%}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, default=1_000)
    parser.add_argument("--seconds", type=float, default=240.0)
    options = parser.parse_args()
    most = DEFAULT_LIMITS.max_in_flight
    makers: dict[str, Callable[[Callable[[], float]], AnyThrottle]] = {
        "before, requests in flight are halved": lambda clock: InFlightThrottle(most, clock),
        "the rate is halved": lambda clock: Throttle(most, clock=clock),
    }
    share_requests(options.workers)
    for title, make in makers.items():
        report(title, simulate(options.workers, options.seconds, make))


if __name__ == "__main__":
    main()
