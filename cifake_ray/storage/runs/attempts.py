"""Heartbeat files of workers: one for each shard in progress, in `_attempts/`.

A heartbeat is written before a shard is started and removed once it is committed, so one that is
found means a crash, a hang or a kill. A lost one costs caution, never a result.
"""

from __future__ import annotations

import json
import os
import re
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from cifake_ray.errors import StorageError
from cifake_ray.storage.io.files import (
    discard,
    list_folder,
    make_folder,
    read_if_exists,
    remove_leftovers,
    write_volatile,
)
from cifake_ray.storage.io.paths import AnyPath
from cifake_ray.storage.io.records import parse_record
from cifake_ray.storage.runs.run import Run

HEARTBEAT_NAME = re.compile(r"(\d{5,})\.json")


@dataclass(frozen=True)
class Attempt:
    """One try at a shard. `steps` grows with all that is done: only its change matters."""

    shard: int
    session: str  # the command that started it; a rerun is another one
    number: int  # 1 for the first of its session
    host: str
    pid: int
    started: str  # UTC, by the clock of `host`: for messages, never compared
    rows_done: int = 0
    steps: int = 0

    def describe(self) -> str:
        """Describe the attempt for an error message."""
        return (
            f"shard {self.shard} (attempt {self.number}, begun {self.started} on {self.host},"
            f" process {self.pid}, {self.rows_done} images done)"
        )


def find_heartbeat(run: Run, shard: int) -> AnyPath:
    return run.attempts_folder / f"{shard:05d}.json"


def read_attempt(run: Run, shard: int) -> Attempt | None:
    """Return the attempt of a heartbeat, None without one; a damaged one is of no session."""
    data = read_if_exists(find_heartbeat(run, shard))
    if data is None:
        return None
    try:
        return parse_record(Attempt, json.loads(data))
    except (ValueError, RecursionError):
        return Attempt(shard, session="", number=0, host="?", pid=0, started="?")


def follow_attempt(earlier: Attempt | None, shard: int, session: str) -> Attempt:
    """Return the attempt of this process after an earlier one; each session counts from 1."""
    number = earlier.number if earlier and earlier.session == session else 0
    started = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return Attempt(shard, session, number + 1, socket.gethostname(), os.getpid(), started)


def write_attempt(run: Run, attempt: Attempt) -> None:
    """Write the heartbeat of an attempt. StorageError when that fails."""
    path, data = find_heartbeat(run, attempt.shard), json.dumps(asdict(attempt)).encode()
    make_folder(path.parent, parents=False)
    try:
        write_volatile(path, data)
    except StorageError:  # another run on the same output has just ended and removed the folder
        make_folder(path.parent, parents=False)
        write_volatile(path, data)


def remove_attempt(run: Run, shard: int) -> None:
    """Remove the heartbeat of a shard that is committed."""
    discard(find_heartbeat(run, shard))


def list_attempts(run: Run, session: str) -> list[Attempt]:
    """Return the attempts of a session that are in progress or failed."""
    names = (HEARTBEAT_NAME.fullmatch(path.name) for path in list_folder(run.attempts_folder))
    attempts = (read_attempt(run, int(name[1])) for name in names if name)
    return [a for a in attempts if a is not None and a.session == session]


def clear_attempts(run: Run) -> None:
    """Remove all heartbeats of a complete run."""
    folder = run.attempts_folder
    for path in list_folder(folder):
        if HEARTBEAT_NAME.fullmatch(path.name):
            discard(path)
    remove_leftovers(folder)  # of workers that were killed while they wrote a heartbeat
    if isinstance(folder, Path):
        with suppress(OSError):
            folder.rmdir()
