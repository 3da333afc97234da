"""End a run that makes no progress, with an error that names what it was waiting for.

A thread waits for the workers, inside Ray for ever. The main thread waits for that thread with a
timeout, so Ctrl-C works at once, and reads the heartbeat files when there is no report.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from typing import TypeVar

from cifake_ray.errors import ResourceError, StorageError
from cifake_ray.storage.runs.attempts import Attempt, list_attempts
from cifake_ray.storage.runs.run import Run

Report = TypeVar("Report")

MAX_LOOK_S = 30.0  # between two reads of the heartbeat files
CLOSE_S = 2.0  # for the workers to be stopped
MAX_SHOWN = 8


def watch_progress(
    reports: Generator[Report, None, None],
    run: Run,
    session: str,
    timeout_s: float,
    describe_workers: Callable[[], str],
) -> Generator[Report, None, None]:
    """Yield the reports, which are read in a thread; raise what is raised there.

    ResourceError, which names what was waited for, when for `timeout_s` there is no report and no
    heartbeat file of the session changes. Contents are compared, never clocks.
    """
    thread, attempts = ThreadPoolExecutor(1), list[Attempt]()
    waiting, look_s = thread.submit(next, reports, None), min(MAX_LOOK_S, timeout_s / 10)
    try:
        while True:
            silence_s = 0.0  # counted in looks: a process that was stopped (Ctrl-Z) missed none
            while not wait([waiting], look_s).done:
                before = attempts
                with suppress(StorageError):  # a failed listing is not progress
                    attempts = list_attempts(run, session)
                silence_s = 0.0 if attempts != before else silence_s + look_s
                if silence_s >= timeout_s:
                    raise ResourceError(explain_stall(attempts, timeout_s, describe_workers()))
            report = waiting.result()
            if report is None:
                return
            yield report
            waiting = thread.submit(next, reports, None)
    finally:
        closing = thread.submit(reports.close)
        if waiting.done():
            wait([closing], CLOSE_S)
        thread.shutdown(wait=False)


def explain_stall(attempts: list[Attempt], timeout_s: float, workers: str) -> str:
    """Return the error message of a run without progress."""
    if attempts:
        shown = ", ".join(attempt.describe() for attempt in attempts[:MAX_SHOWN])
        more = f" and {len(attempts) - MAX_SHOWN} more" if len(attempts) > MAX_SHOWN else ""
        waiting = f"waiting for {shown}{more}"
    else:
        waiting = "no worker is at work on a shard"
    return (
        f"no progress for {timeout_s:g} s: {waiting}; {workers}. Run the same command"
        " again to resume; if one batch may take that long, raise --stall-timeout-s"
    )
