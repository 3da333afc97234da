"""Limits the requests in flight and their rate to what the store accepts.

No worker knows of the others, but all meet the same store: each halves its own rate when the store
asks to slow down, and raises it slowly while it does not, so together they get close to what the
store gives. A run starts with what S3 promises for one prefix, and doubles that each second until
it is asked for the first time. A store that answers nothing else for a while says nothing of the
rate that it can bear: after that, rates double each second up to half of what they were.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

START_PER_S = 5_500.0  # requests of a whole run at first
FAST_GROWTH = 0.7  # requests per second more for each success: a rate that is used doubles in 1 s
GROWTH = 0.02  # the same from half of the rate on that was too much: it doubles in 35 s
HALVE_EVERY_S = 1.0  # answers to requests sent before the halving carry no news
MIN_PER_S = 10.0  # requests of a whole run, but 0.1 of a process
MEASURED = 64  # starts of which the real rate is measured
CATCH_UP_S = 0.05  # a thread that woke up late makes up for it
LOOK_S = 0.25  # after which a thread that waits looks whether it still should

_num_processes = 1


def share_requests(num_processes: int) -> None:
    """Say with how many processes of its run this one shares the rates of its throttles."""
    global _num_processes
    _num_processes = num_processes


def count_sharers() -> int:
    """Return with how many processes, itself included, this one shares rates."""
    return _num_processes


class Throttle:
    """Gives the requests of one process their turns."""

    def __init__(
        self,
        max_in_flight: int,
        max_per_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Share `max_per_s` with the other processes; None: without a limit of the user's."""
        self.max_in_flight = max_in_flight
        self.max_per_s = (max_per_s or math.inf) / _num_processes
        self.per_s = min(START_PER_S / _num_processes, self.max_per_s)
        self.clock = clock
        self.in_flight = 0
        self.min_per_s = max(0.1, MIN_PER_S / _num_processes)
        self.next_s = self.slowed_at_s = -math.inf
        self.too_much_per_s = math.inf  # the rate at which the store last asked to slow down
        self.has_succeeded = True  # since then
        self.starts: deque[float] = deque(maxlen=MEASURED)
        self.lock = threading.Lock()
        self.waiting: deque[threading.Condition] = deque()  # threads in the order of their turns

    @contextmanager
    def take_turn(self, stop: threading.Event) -> Iterator[float | None]:
        """Wait for the turn of a request, and yield for how many seconds.

        None once `stop` is set: then the request must not be sent.
        """
        since_s = self.clock()
        if not self._wait(stop):
            yield None
            return
        try:
            yield self.clock() - since_s
        finally:
            with self.lock:
                self.end()
                self._wake_first()

    def _wait(self, stop: threading.Event) -> bool:
        """Start a request in its turn, or return False once `stop` is set."""
        with self.lock:
            own = threading.Condition(self.lock)
            self.waiting.append(own)
            try:
                while not stop.is_set():
                    pause_s = self.try_start() if self.waiting[0] is own else math.inf
                    if not pause_s:
                        return True
                    own.wait(min(pause_s, LOOK_S))
                return False
            finally:
                self.waiting.remove(own)
                self._wake_first()

    def _wake_first(self) -> None:
        if self.waiting:
            self.waiting[0].notify()

    def try_start(self) -> float:
        """Start a request and return 0, or return after how many seconds to try again.

        Infinity: when another one has ended.
        """
        if self.in_flight >= self.max_in_flight:
            return math.inf
        now_s = self.clock()
        if now_s < self.next_s:
            return self.next_s - now_s
        self.next_s = max(self.next_s, now_s - CATCH_UP_S) + 1 / self.per_s
        self.in_flight += 1
        self.starts.append(now_s)
        return 0.0

    def end(self) -> None:
        self.in_flight -= 1

    def slow_down(self) -> None:
        """Halve the rate, or the one that there really was if that is lower."""
        with self.lock:
            now_s = self.clock()
            if now_s - self.slowed_at_s >= HALVE_EVERY_S:
                span_s = now_s - self.starts[0] if self.starts else 0.0
                real_per_s = len(self.starts) / span_s if span_s else math.inf
                real_per_s = min(self.per_s, real_per_s)
                if self.has_succeeded:
                    self.too_much_per_s, self.has_succeeded = real_per_s, False
                self.per_s = min(self.max_per_s, max(self.min_per_s, real_per_s / 2))
                self.slowed_at_s = now_s

    def speed_up(self) -> None:
        """Raise the rate a little: for each success, so that it never runs ahead of its use."""
        self.has_succeeded = True
        if self.per_s < self.max_per_s:
            with self.lock:
                growth = FAST_GROWTH if self.per_s < self.too_much_per_s / 2 else GROWTH
                self.per_s = min(self.max_per_s, self.per_s + growth)
