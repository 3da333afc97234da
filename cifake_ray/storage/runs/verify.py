"""Compare the files of a finished run with what it committed, and rename damaged ones for repair.

Names in `_files.parquet` are checked before use: a file that is no result shard is never touched.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cifake_ray.core.schema import shard_name
from cifake_ray.errors import StorageError
from cifake_ray.storage.io.digest import hash_file, list_sizes
from cifake_ray.storage.io.files import exists, move, read_bytes
from cifake_ray.storage.io.paths import AnyPath
from cifake_ray.storage.io.records import PARQUET_ERRORS, check_columns
from cifake_ray.storage.runs.file_progress import FileCounter, FileProgress
from cifake_ray.storage.runs.finish import ASIDE_PREFIX, FILES_FIELDS
from cifake_ray.storage.runs.run import (
    ANY_VERB,
    Run,
    force_names,
    is_finished,
    read_again,
    require_run,
)
from cifake_ray.storage.runs.shards import breaks_seal, hash_shard

SHARD_NAME = re.compile(r"part-\d{5,}\.parquet")
THREADS = 8  # of one process: sha256 leaves Python's lock, and a store is mostly waited for
# Files that a worker is given at once: more are fewer messages, fewer are more even.
MAX_GROUP_FILES, GROUP_BYTES, MIN_GROUPS, MAX_GROUPS = 64, 64 * 2**20, 64, 20_000
# What says of a local file that its content is gone: a broken disk, or no regular file.
GONE = (errno.EIO, errno.EISDIR, errno.EINVAL, errno.ELOOP, errno.EOVERFLOW)


@dataclass(frozen=True)
class DamagedFile:
    """A file that is not what was committed."""

    name: str
    reason: str


def open_finished(out: AnyPath, wanted: str = ANY_VERB) -> Run:
    """Return the finished run of a folder. StorageError when there is none."""
    run = require_run(out, wanted)
    if not is_finished(run):
        raise StorageError(f"{out}: the run has not finished; run its command again first")
    return run


def read_files(run: Run) -> list[dict[str, Any]]:
    """Return name, size_bytes, sha256, rows and errors of each shard of a finished run."""
    path = run.out / "_files.parquet"
    try:
        table = pq.ParquetFile(pa.BufferReader(read_bytes(path)))
        check_columns(table.schema_arrow, FILES_FIELDS)
        is_whole = table.metadata.num_rows == run.manifest.num_shards
        rows: list[dict[str, Any]] = table.read().to_pylist() if is_whole else []
    except PARQUET_ERRORS as error:
        raise StorageError(f"{path}: damaged ({error}); `cifake-ray repair` restores it") from error
    expected = [f"{run.results}/{shard_name(n)}" for n in range(run.manifest.num_shards)]
    if [row["name"] for row in rows] != expected:
        raise StorageError(
            f"{path}: does not name the shards of the run; `cifake-ray repair` restores it"
        )
    return rows


@dataclass(frozen=True)
class CommittedFile:
    """A file as a run has committed it, and the size that it has now."""

    name: str
    sha256: str | None  # None before the run has finished: that which its footer says
    size_bytes: int


@dataclass(frozen=True)
class CheckedGroup:
    """How a group of files was found."""

    num_files: int
    num_bytes: int
    damage: list[DamagedFile]


@dataclass(frozen=True)
class OutputCheck:
    """What is to be read of a run, and what the listing of its folders says already."""

    out: AnyPath
    names: list[str]  # of all files that are compared, in order
    groups: list[tuple[CommittedFile, ...]]  # to read, each by one worker
    listed: list[DamagedFile]  # as names and sizes show
    num_bytes: int  # to read
    foreign: list[str]  # no shards, but readers of Parquet folders see them

    def judge(
        self,
        results: Iterable[CheckedGroup],
        on_progress: Callable[[FileProgress], None] = lambda progress: None,
    ) -> list[DamagedFile]:
        """Return the damage, in the order of the files, whatever the order of the results."""
        damage = list(self.listed)
        counter = FileCounter(len(self.names), self.num_bytes)
        counter.add(len(self.names) - sum(map(len, self.groups)), 0)
        for result in results:
            damage += result.damage
            counter.add(result.num_files, result.num_bytes)
            on_progress(counter.describe(damaged=len(damage)))
        places = {name: place for place, name in enumerate(self.names)}
        return sorted(damage, key=lambda file: (places.get(file.name, len(places)), file.name))


def plan_check(out: AnyPath) -> OutputCheck:
    """List what is to be compared. StorageError when the run has not finished.

    Each folder is listed once: nothing is asked about a file alone.
    """
    run = open_finished(out)
    folder = run.manifest_folder.name
    rows: list[dict[str, Any]] = [
        *({"name": f"{folder}/{f.name}", "sha256": f.sha256} for f in run.manifest.files),
        *read_files(run),
    ]
    there = _list_folders(run.manifest_folder, run.results_folder)
    names = [row["name"] for row in rows]
    to_read, listed = [], []
    for row in rows:
        name, size = row["name"], there.get(row["name"])
        if size is None:
            listed.append(DamagedFile(name, "missing"))
        elif size != row.get("size_bytes", size):
            listed.append(DamagedFile(name, f"{size} bytes, not {row['size_bytes']}"))
        else:
            to_read.append(CommittedFile(name, row["sha256"], size))
    return _make_check(run, names, to_read, listed, there)


def plan_seal_check(out: AnyPath) -> OutputCheck:
    """List the shards that are there, of a run that may not have finished, with no sha256.

    StorageError when there is no run.
    """
    there = _list_folders(require_run(out).results_folder)
    run = read_again(out)  # it may have been extended before the folder was listed
    names = [f"{run.results}/{shard_name(n)}" for n in range(run.manifest.num_shards)]
    names = [name for name in names if name in there]
    return _make_check(run, names, [CommittedFile(n, None, there[n]) for n in names], [], there)


def _list_folders(*folders: AnyPath) -> dict[str, int]:
    """Return the size of each file, by folder/name."""
    return {f"{f.name}/{name}": size for f in folders for name, size in list_sizes(f).items()}


def _make_check(
    run: Run,
    names: list[str],
    to_read: list[CommittedFile],
    listed: list[DamagedFile],
    there: dict[str, int],
) -> OutputCheck:
    """Name also what else is in the folder of results: shards are damage, others a person's."""
    foreign = []
    for name in sorted(there.keys() - set(names)):
        folder, _, own = name.partition("/")
        if folder == run.results and SHARD_NAME.fullmatch(own):
            listed.append(DamagedFile(name, "not committed by this run"))
        elif folder == run.results and own[0] not in "._":  # which such readers skip
            foreign.append(name)
    num_bytes = sum(file.size_bytes for file in to_read)
    return OutputCheck(run.out, names, list(_group_files(to_read)), listed, num_bytes, foreign)


def _group_files(files: list[CommittedFile]) -> Iterator[tuple[CommittedFile, ...]]:
    """Yield neighbours, enough of them to be worth a message to a worker."""
    most = min(max(len(files) // MIN_GROUPS, 1), MAX_GROUP_FILES)
    most_bytes = max(sum(file.size_bytes for file in files) // MAX_GROUPS, GROUP_BYTES)
    group: list[CommittedFile] = []
    for file in files:
        group.append(file)
        if len(group) == most or sum(each.size_bytes for each in group) >= most_bytes:
            yield tuple(group)
            group = []
    if group:
        yield tuple(group)


def check_files(out: AnyPath, files: tuple[CommittedFile, ...]) -> CheckedGroup:
    """Compare the content of files with what was committed; memory is that of some parts.

    StorageError when a store cannot be read.
    """
    reasons = [(file.name, _find_damage(out / file.name, file)) for file in files]
    damage = [DamagedFile(name, reason) for name, reason in reasons if reason]
    return CheckedGroup(len(files), sum(file.size_bytes for file in files), damage)


def _find_damage(path: AnyPath, file: CommittedFile) -> str:
    """Return what is wrong with a file, "" if nothing is."""
    try:
        if file.sha256 is None:
            return "sha256 differs" if breaks_seal(path) else ""
        hash_content = hash_shard if SHARD_NAME.fullmatch(path.name) else hash_file
        return "" if hash_content(path, file.size_bytes) == file.sha256 else "sha256 differs"
    except StorageError as error:
        cause = error.__cause__
        if isinstance(cause, FileNotFoundError):  # it was there when the folder was listed
            return "missing"
        # Missing rights, or a store that fails, say nothing of the file. But a run that has not
        # finished cannot go on while there is a local shard that it must not read.
        is_closed = isinstance(path, Path) and file.sha256 is None
        gone = (*GONE, errno.EACCES, errno.EPERM) if is_closed else GONE
        if isinstance(cause, OSError) and cause.errno in gone:
            return f"cannot be read: {cause.strerror}"
        raise


def check_here(
    check: OutputCheck, on_progress: Callable[[FileProgress], None] = lambda progress: None
) -> list[DamagedFile]:
    """Return the damage, by threads of this process. StorageError when a store cannot be read."""
    pool = ThreadPoolExecutor(THREADS)
    try:
        return check.judge(pool.map(partial(check_files, check.out), check.groups), on_progress)
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C waits only for what has begun


def verify_files(out: AnyPath) -> list[DamagedFile]:
    """Return the damage of a finished run. StorageError when the run has not finished."""
    return check_here(plan_check(out))


@dataclass(frozen=True)
class SetAside:
    """Files of a run that were renamed out of the way: path -> path while aside."""

    files: dict[AnyPath, AnyPath]

    def restore(self) -> list[AnyPath]:
        """Rename the files back that have not been made again; return what stays aside."""
        left = {path: aside for path, aside in self.files.items() if exists(aside)}
        for path, aside in left.items():
            if not exists(path):
                move(aside, path)
        return [aside for aside in left.values() if exists(aside)]


def find_damage(
    out: AnyPath, verify: Callable[[AnyPath], list[DamagedFile]] = verify_files
) -> list[DamagedFile] | None:
    """Return what `repair` has to make again; None if `plan_seal_check` is to be read instead."""
    try:
        return verify(out)
    except StorageError:  # unfinished, or damaged metadata
        return None


def set_damaged_aside(out: AnyPath, damage: list[DamagedFile]) -> SetAside:
    """Rename damaged result files and `_SUCCESS`, so that the run's command makes them again.

    StorageError when the manifest is damaged: the images of the run are no longer known.
    """
    run = require_run(out)
    folder = run.manifest_folder.name
    if lost := [item.name for item in damage if item.name.startswith(f"{folder}/")]:
        raise StorageError(
            f"{out}/{lost[0]}: the manifest is damaged or missing; start again in a new folder"
        )
    force_names(run)
    paths: list[AnyPath] = [*(out / item.name for item in damage), out / "_SUCCESS"]
    aside = SetAside(
        {path: path.parent / f"{ASIDE_PREFIX}{path.name}" for path in paths if exists(path)}
    )
    with ExitStack() as undo:
        undo.callback(aside.restore)
        for path, place in aside.files.items():
            move(path, place)
        undo.pop_all()
    return aside
