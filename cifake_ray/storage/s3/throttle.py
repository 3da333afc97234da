"""Limits the requests in flight to what the store accepts."""

from __future__ import annotations

import threading
import time

HALVE_EVERY_S = 1.0  # answers to requests sent before the halving carry no news


class Throttle:
    """Halve the requests in flight when the store asks to slow down, then add one for each
    round of successes."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.limit = float(most)
        self.in_flight = 0
        self.halved_at_s = 0.0
        self.changed = threading.Condition()

    def __enter__(self) -> None:
        with self.changed:
            while self.in_flight >= int(self.limit):
                self.changed.wait()
            self.in_flight += 1

    def __exit__(self, *_: object) -> None:
        with self.changed:
            self.in_flight -= 1
            self.changed.notify_all()

    def slow_down(self) -> None:
        with self.changed:
            now_s = time.monotonic()
            if now_s - self.halved_at_s >= HALVE_EVERY_S:
                self.limit = max(1.0, self.limit / 2)
                self.halved_at_s = now_s

    def speed_up(self) -> None:
        if self.limit < self.most:
            with self.changed:
                self.limit = min(float(self.most), self.limit + 1 / self.limit)
                self.changed.notify_all()
