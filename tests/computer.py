"""A simulated computer: a process can be killed at any change that it makes to its output.

Nothing that a killed process would still do reaches the disk or the bucket: every later change
raises `Killed` again, so that no `finally` cleans up. A loss of power also undoes what POSIX does
not promise to keep: a name until its folder is synchronised, bytes until their file is. (New
folders are kept, as journals do.)
"""

from __future__ import annotations

import errno
import io
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from cifake_ray.errors import BundleError, CifakeError, StorageError
from cifake_ray.stages.batch import driver
from cifake_ray.stages.batch.shard_worker import ShardReport, ShardWorker, WorkerTask
from cifake_ray.storage.io import files
from cifake_ray.storage.runs.list_parts import THIS_PROCESS
from cifake_ray.storage.runs.run import RESULTS

FOLDERS = {
    "_attempts": "attempts",
    "_manifest": "manifest",
    **dict.fromkeys(RESULTS.values(), "results"),
}
FIRST_PID = 2**30  # above the largest number that Linux gives a process
KILLS = ("kill_command", "lose_names", "lose_bytes")
EVENTS = (*KILLS, "fill_disk", "break_disk")


class Killed(BaseException):
    """SIGKILL: nothing in the package may catch it."""


@dataclass(eq=False)
class Process:
    pid: int
    parent: Process | None
    is_alive: bool = True


@dataclass
class Trigger:
    """An event at the `count`-th change below a folder of the output."""

    # attempts, manifest, results, "" for the files of the output itself, None for all of it
    folder: str | None
    count: int
    event: Callable[[], None]
    only_writes: bool = False
    may_fail: bool = False  # the command may end with an error of the disk

    def count_change(self, path: str, is_write: bool) -> bool:
        """Whether the event is due now."""
        below = path.partition("/out/")[2].split("/")
        is_here = self.folder in (None, FOLDERS.get(below[0], ""))
        self.count -= is_here and (is_write or not self.only_writes)
        return self.count == 0


class Computer:
    """Runs one process at a time; `trigger` interrupts it once."""

    def __init__(self) -> None:
        self.process: Process | None = None
        self.trigger: Trigger | None = None
        self.alive_pids: set[int] = set()
        self.pids = itertools.count(FIRST_PID)
        self.unsynced_names: list[tuple[Path, bytes | None]] = []  # each with what it was before
        self.unsynced_inodes: set[int] = set()

    @contextmanager
    def start_process(self, parent: Process | None = None) -> Iterator[Process]:
        before, process = self.process, Process(next(self.pids), parent)
        self.process = process
        self.alive_pids.add(process.pid)
        try:
            yield process
        finally:
            self.alive_pids.discard(process.pid)
            self.process = before

    def kill_process(self) -> None:
        """Kill the process that runs now."""
        assert self.process is not None
        self.process.is_alive = False
        raise Killed

    def kill_command(self) -> None:
        """Kill the process that runs now and those that started it."""
        assert self.process is not None
        if self.process.parent is not None:
            self.process.parent.is_alive = False
        self.kill_process()

    def fill_disk(self) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def break_disk(self) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def lose_names(self) -> None:
        """Lose power: names that were not synchronised are as before."""
        process, self.process = self.process, None
        for path, data in reversed(self.unsynced_names):
            if data is None:
                path.unlink(missing_ok=True)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
        self.process = process
        self.lose_power()

    def lose_bytes(self) -> None:
        """Lose power: files that were not synchronised have their names, but are empty."""
        for path in {path for path, _ in self.unsynced_names if os.path.exists(path)}:
            if os.stat(path).st_ino in self.unsynced_inodes:
                os.truncate(path, 0)
        self.lose_power()

    def lose_power(self) -> None:
        self.unsynced_names.clear()
        self.unsynced_inodes.clear()
        self.kill_command()

    def change_name(self, path: Path) -> None:
        """Called before a file gets or loses a name."""
        before = Path(path).read_bytes() if os.path.exists(path) else None
        self.unsynced_names.append((Path(path), before))

    def sync(self, descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.is_dir():
            self.unsynced_names = [x for x in self.unsynced_names if x[0].parent.resolve() != path]
        else:
            self.unsynced_inodes.discard(os.fstat(descriptor).st_ino)

    def change(self, path: object, *, is_write: bool = False) -> None:
        """Called before each change of a file or folder."""
        if self.process is None:
            return
        if not self.process.is_alive:
            raise Killed
        if self.trigger is not None and self.trigger.count_change(str(path), is_write):
            event, self.trigger = self.trigger.event, None
            event()

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Put the computer below `cifake_ray.storage.io.files`, and an empty memory://."""
        patch.setattr(files, "os", SimulatedOs(self))
        patch.setattr(files, "open", self._open, raising=False)
        unlink = Path.unlink

        def note_and_unlink(path: Path, missing_ok: bool = False) -> None:
            if self.process is not None and not path.name.startswith(files.TEMPORARY_PREFIX):
                self.change_name(path)
            unlink(path, missing_ok)

        patch.setattr(Path, "unlink", self._watch(note_and_unlink, is_write=False))
        for name in ("mkdir", "rmdir"):
            patch.setattr(Path, name, self._watch(getattr(Path, name), is_write=name == "mkdir"))
        patch.setattr(MemoryFileSystem, "store", {})
        patch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
        for name in ("pipe_file", "rm_file", "cp_file"):
            watched = self._watch(getattr(MemoryFileSystem, name), is_write=name != "rm_file")
            patch.setattr(MemoryFileSystem, name, watched)
        patch.setattr(driver, "runs_here", lambda *arguments: True)
        patch.setattr(driver, "LocalPool", lambda *arguments: SimulatedPool(self))

    def _watch(self, function: Callable[..., Any], *, is_write: bool) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            path = next(a for a in arguments if isinstance(a, (str, Path)))
            self.change(path, is_write=is_write)
            return function(*arguments, **options)

        return call

    def _open(self, path: Path, mode: str) -> Any:
        return open(path, mode) if mode == "rb" else HalfFile(self, path, mode)


def disturb_every_change(
    run: Callable[[], object],
    *,
    prepare: Callable[[], object],
    check_half: Callable[[], object] = lambda: None,
    check_whole: Callable[[bool], object],
    others: Mapping[str, Callable[[], None]] | None = None,
) -> int:
    """Let an event happen at the first change that `run` makes, at the second and so on.

    Each time `prepare`, run, check what is there, run again and check that, told whether files may
    be left over. First of all nothing happens. Each change meets one of EVENTS, or of `others`,
    with CIFAKE_TEST_EXAMPLES every one of them. Return the number of changes.
    """
    computer, patch = Computer(), pytest.MonkeyPatch()
    computer.install(patch)
    events = others or {name: getattr(computer, name) for name in EVENTS}
    every_event = "CIFAKE_TEST_EXAMPLES" in os.environ
    try:
        prepare()
        with computer.start_process():
            run()
        check_whole(False)
        for count in itertools.count(1):
            for number, (event, act) in enumerate(events.items()):
                if not every_event and number != count % len(events):
                    continue
                prepare()
                may_fail = event not in KILLS
                computer.trigger = Trigger(None, count, act, event == "fill_disk", may_fail)
                try:
                    with computer.start_process():
                        run()
                except Killed:
                    assert not may_fail
                except (StorageError, BundleError):  # exit 4
                    assert may_fail
                # A full disk strikes writes only, of which there are fewer.
                is_over = computer.trigger is not None and event != "fill_disk"
                computer.trigger = None
                try:
                    check_half()
                    with computer.start_process():
                        run()
                    check_whole(may_fail)
                except BaseException as error:
                    error.add_note(f"{event} at change {count}")
                    raise
            if is_over:
                return count - 1
    finally:
        patch.undo()
    raise AssertionError


class SimulatedOs:
    """`os` with the processes of a computer. Nothing is forced to disk, which takes time."""

    def __init__(self, computer: Computer) -> None:
        self.computer = computer

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def getpid(self) -> int:
        process = self.computer.process
        return process.pid if process else os.getpid()

    def kill(self, pid: int, signal: int) -> None:
        if pid not in self.computer.alive_pids:
            raise ProcessLookupError

    def fsync(self, descriptor: int) -> None:
        self.computer.sync(descriptor)

    def replace(self, old: Path, new: Path) -> None:
        self.computer.change(new)
        self.computer.change_name(new)
        os.replace(old, new)

    def rename(self, old: Path, new: Path) -> None:
        self.computer.change(new)
        self.computer.change_name(new)
        self.computer.change_name(old)
        os.rename(old, new)

    def link(self, old: Path, new: Path) -> None:
        self.computer.change(new, is_write=True)
        self.computer.change_name(new)
        os.link(old, new)


class ShortFile(io.FileIO):
    """A file that takes a half of what it is given, as the system call may."""

    def write(self, data: Any) -> int:
        return super().write(memoryview(data)[: len(data) // 2 or 1])


class HalfFile:
    """A file that is written in two halves."""

    def __init__(self, computer: Computer, path: Path, mode: str) -> None:
        computer.change(path, is_write=True)
        self.computer, self.path = computer, path
        self.file = io.BufferedWriter(ShortFile(path, mode))
        computer.unsynced_inodes.add(os.fstat(self.file.fileno()).st_ino)

    def __enter__(self) -> HalfFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def writelines(self, chunks: Iterable[bytes]) -> None:
        self.write(b"".join(chunks))

    def write(self, data: bytes) -> None:
        self.file.write(data[: len(data) // 2])
        self.computer.change(self.path, is_write=True)
        self.file.write(data[len(data) // 2 :])


class SimulatedPool:
    """What the driver uses of LocalPool: a worker that is started anew when it was killed."""

    num_workers = 1
    map_items = staticmethod(THIS_PROCESS.map_items)

    def __init__(self, computer: Computer) -> None:
        self.computer = computer

    def __enter__(self) -> SimulatedPool:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def follow_listing(self, batches: Iterator[Any]) -> Iterator[Any]:
        return batches

    def report_shards(self, task: WorkerTask) -> Iterator[ShardReport | CifakeError]:
        worker = ShardWorker(task)
        for shard in range(task.run.manifest.num_shards):
            while True:
                command = self.computer.process
                try:
                    with self.computer.start_process(command):
                        report = worker.report_shard(shard)
                    break
                except Killed:
                    if command is not None and not command.is_alive:
                        raise
                    worker = ShardWorker(task)
            yield report
