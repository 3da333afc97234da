"""Compare the files of a finished run with what it committed, and rename damaged ones for repair.

Names in `_files.parquet` are checked before use: a file that is no result shard is never touched.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
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
from cifake_ray.storage.runs.run import (
    ANY_VERB,
    ASIDE_PREFIX,
    FILES_FIELDS,
    Run,
    force_names,
    is_finished,
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
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class CheckedGroup:
    """How a group of files was found."""

    num_files: int
    num_bytes: int
    damage: list[DamagedFile]


@dataclass(frozen=True)
class OutputCheck:
    """What `verify` has to read of a finished run, and what its listing says already."""

    out: AnyPath
    names: list[str]  # of all committed files, in order
    groups: list[tuple[CommittedFile, ...]]  # to read, each by one worker
    listed: list[DamagedFile]  # as names and sizes show
    num_bytes: int  # to read

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
    there = {
        f"{place.name}/{name}": size
        for place in (run.manifest_folder, run.results_folder)
        for name, size in list_sizes(place).items()
    }
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
    for name in there.keys() - set(names):
        if name.startswith(f"{run.results}/") and SHARD_NAME.fullmatch(name.partition("/")[2]):
            listed.append(DamagedFile(name, "not committed by this run"))
    num_bytes = sum(file.size_bytes for file in to_read)
    return OutputCheck(out, names, list(_group_files(to_read)), listed, num_bytes)


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
        hash_content = hash_shard if SHARD_NAME.fullmatch(path.name) else hash_file
        return "" if hash_content(path, file.size_bytes) == file.sha256 else "sha256 differs"
    except StorageError as error:
        cause = error.__cause__
        if isinstance(cause, FileNotFoundError):  # it was there when the folder was listed
            return "missing"
        if isinstance(cause, OSError) and cause.errno in GONE:
            return f"cannot be read: {cause.strerror}"
        raise  # missing rights, or a store that fails, say nothing of the file


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

    def restore(self) -> None:
        """Rename the files back that have not been made again."""
        for path, aside in self.files.items():
            if exists(aside) and not exists(path):
                move(aside, path)


def find_damage(
    out: AnyPath, verify: Callable[[AnyPath], list[DamagedFile]] = verify_files
) -> list[DamagedFile] | None:
    """Return what `repair` has to make again; None if each shard is to be checked by the run."""
    try:
        return verify(out)
    except StorageError:  # unfinished, or damaged metadata
        return None


def find_broken_seals(run: Run) -> list[DamagedFile]:
    """Return the shards of a run that are not what their footers say, whatever else there is."""
    return [
        DamagedFile(f"{run.results}/{path.name}", "sha256 differs")
        for path in (run.results_folder / name for name in list_sizes(run.results_folder))
        if SHARD_NAME.fullmatch(path.name) and breaks_seal(path)
    ]


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
    files = {path: path.parent / f"{ASIDE_PREFIX}{path.name}" for path in paths if exists(path)}
    for path, aside in files.items():
        move(path, aside)
    return SetAside(files)
