"""Ends a run that stands still, and says what it was waiting for.

Floor: stages. The main thread waits inside Ray, which never gives up; a thread watches the reports
and, when none arrives, the notes of the attempts. Their contents are compared, never clocks.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import ray

from cifake_ray.errors import ResourceError, StorageError
from cifake_ray.stages.cluster import read_resources
from cifake_ray.storage.runs.attempts import Attempt, list_attempts
from cifake_ray.storage.runs.run import Run

MAX_LOOK_S = 30.0  # between two looks at the notes
CLUSTER_ANSWER_S = 10.0
REPEAT_S = 30.0  # Ray's own shutdown is not to be disturbed
MAX_SHOWN = 8
ALARM = signal.SIGUSR2


class Stalled(KeyboardInterrupt):
    """Raised in the main thread, as Ctrl-C is: Ray lets nothing else through."""


class Watchdog:
    """Watches one run from a thread; `beat` tells it of each report."""

    def __init__(self, run: Run, session: str, timeout_s: float) -> None:
        self.run, self.session, self.timeout_s = run, session, timeout_s
        self.reports = 0
        self.ended = threading.Event()
        self.verdict: str | None = None
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self) -> None:
        self.reports += 1

    def _watch(self) -> None:
        seen: tuple[int, list[Attempt]] = (0, [])
        since_s = time.monotonic()
        while not self.ended.wait(min(MAX_LOOK_S, self.timeout_s / 10)):
            attempts = seen[1]
            if self.reports == seen[0]:
                with suppress(StorageError):  # not to be seen is no sign of life
                    attempts = list_attempts(self.run, self.session)
            if (self.reports, attempts) != seen:
                seen, since_s = (self.reports, attempts), time.monotonic()
            elif time.monotonic() - since_s >= self.timeout_s:
                self.verdict = explain_stall(attempts, self.timeout_s)
                break
        main_thread = threading.main_thread().ident
        while self.verdict and main_thread and not self.ended.is_set():
            signal.pthread_kill(main_thread, ALARM)
            self.ended.wait(REPEAT_S)


def explain_stall(attempts: list[Attempt], timeout_s: float) -> str:
    """What a run that stands still was waiting for."""
    if attempts:
        shown = ", ".join(attempt.describe() for attempt in attempts[:MAX_SHOWN])
        more = f" and {len(attempts) - MAX_SHOWN} more" if len(attempts) > MAX_SHOWN else ""
        waiting = f"waiting for {shown}{more}"
    else:
        waiting = "no worker is at work on a shard"
    return (
        f"no progress for {timeout_s:g} s: {waiting}; {describe_cluster()}. Run the same command"
        " again to go on from there; if one batch may take so long, raise --stall-timeout-s"
    )


def describe_cluster() -> str:
    """Nodes and CPUs for an error message, even if the cluster does not answer."""
    answer: list[str] = []

    def ask() -> None:
        resources = read_resources()
        free = ray.available_resources().get("CPU", 0)  # type: ignore[no-untyped-call]
        answer.append(
            f"the cluster has {len(resources.nodes)} nodes alive with {resources.num_cpus} CPUs,"
            f" {free:g} of them free"
        )

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(CLUSTER_ANSWER_S)
    return answer[0] if answer else "the cluster does not answer"


@contextmanager
def watch_progress(run: Run, session: str, timeout_s: float) -> Iterator[Watchdog]:
    """ResourceError, with what was waited for, if `beat` is not called and no note changes.

    Only in the main thread, since no other can be interrupted; elsewhere nothing is watched.
    """
    watchdog = Watchdog(run, session, timeout_s)

    def on_alarm(number: int, frame: FrameType | None) -> None:
        if not watchdog.ended.is_set():
            raise Stalled

    if threading.current_thread() is not threading.main_thread():
        yield watchdog
        return
    before = signal.signal(ALARM, on_alarm)
    watchdog.thread.start()
    try:
        yield watchdog
    except KeyboardInterrupt:
        if watchdog.verdict is None:
            raise
        raise ResourceError(watchdog.verdict) from None
    finally:
        watchdog.ended.set()
        watchdog.thread.join(1.0)
        if not watchdog.thread.is_alive():  # else it may still send one, which must find us
            signal.signal(ALARM, before)
