"""Compare the files of a finished run with what it committed, and rename damaged ones for repair.

Names in `_files.parquet` are checked before use: a file that is no result shard is never touched.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cifake_ray.core.schema import shard_name
from cifake_ray.errors import StorageError
from cifake_ray.storage.io.digest import hash_file, stamp_file
from cifake_ray.storage.io.files import (
    exists,
    list_folder,
    move,
    read_bytes,
)
from cifake_ray.storage.io.paths import AnyPath
from cifake_ray.storage.io.records import PARQUET_ERRORS, check_columns
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


def verify_files(out: AnyPath) -> list[DamagedFile]:
    """Return the damage of a finished run. StorageError when the run has not finished."""
    run = open_finished(out)
    committed = read_files(run)
    damage = []
    folder = run.manifest_folder.name
    rows = [{"name": f"{folder}/{f.name}", "sha256": f.sha256} for f in run.manifest.files]
    for row in [*rows, *committed]:
        path, size_bytes = out / row["name"], row.get("size_bytes")
        if not exists(path):
            damage.append(DamagedFile(row["name"], "missing"))
        elif size_bytes is not None and (found := stamp_file(path)[0]) != size_bytes:
            damage.append(DamagedFile(row["name"], f"{found} bytes, not {size_bytes}"))
        elif (hash_file if size_bytes is None else hash_shard)(path) != row["sha256"]:
            damage.append(DamagedFile(row["name"], "sha256 differs"))
    names = {row["name"] for row in committed}
    for path in list_folder(run.results_folder):
        name = f"{run.results}/{path.name}"
        if SHARD_NAME.fullmatch(path.name) and name not in names:
            damage.append(DamagedFile(name, "not committed by this run"))
    return damage


@dataclass(frozen=True)
class SetAside:
    """Files of a run that were renamed out of the way: path -> path while aside."""

    files: dict[AnyPath, AnyPath]

    def restore(self) -> None:
        """Rename the files back that have not been made again."""
        for path, aside in self.files.items():
            if exists(aside) and not exists(path):
                move(aside, path)


def find_damage(out: AnyPath) -> list[DamagedFile] | None:
    """Return what `repair` has to make again; None if the run has to be ended first."""
    try:
        return verify_files(out)
    except StorageError:  # unfinished, or damaged metadata
        return None


def find_broken_seals(run: Run) -> list[DamagedFile]:
    """Return the shards of a run that are not what their footers say, whatever else there is."""
    return [
        DamagedFile(f"{run.results}/{path.name}", "sha256 differs")
        for path in list_folder(run.results_folder)
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
