"""Read and write run metadata: `_run.json` at first, `_files.parquet` and `_SUCCESS` at the end.

`_run.json` is created once the manifest is complete, unless another process has created it: a
process that loses this race uses the winner's manifest.
"""

from __future__ import annotations

import fcntl
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from cifake_ray.core.schema import SCHEMA_VERSION, shard_name
from cifake_ray.errors import RunMismatch, StorageError
from cifake_ray.storage.io.files import (
    create_bytes,
    encode_json,
    hash_json,
    parse_json,
    read_if_exists,
    read_json,
    remove,
    sync_folder,
    write_json,
)
from cifake_ray.storage.io.paths import AnyPath, explain_errors
from cifake_ray.storage.io.records import parse_record
from cifake_ray.storage.runs.links import check_links
from cifake_ray.storage.runs.manifest import Manifest, ManifestFile
from cifake_ray.storage.runs.settings import check_settings
from cifake_ray.version import __version__

RESULTS = {
    "audit": "audit",
    "convert": "shards",
    "score": "scores",
    "evaluate": "predictions",
}
PRIVATE_PREFIX = "_"  # readers of Parquet folders skip names that start so
ANY_VERB = "convert, score, evaluate or audit"  # that has shards


@dataclass(frozen=True)
class Run:
    """A run whose settings and manifest are frozen in its output folder."""

    out: AnyPath
    command: str
    settings: dict[str, Any]
    config: dict[str, Any]
    manifest: Manifest
    left_out: dict[str, int]
    earlier_identities: tuple[str, ...] = ()  # of the same scores with other VERDICT_SETTINGS
    prefix: str = PRIVATE_PREFIX  # "" in outputs of earlier versions, which stay as they are
    counts: dict[str, dict[str, int]] = field(default_factory=dict)  # labels, splits, sources

    @property
    def fingerprint(self) -> str:
        return hash_json(self.settings)

    @property
    def identity(self) -> str:
        """The sha256 of the settings and the listing."""
        return self.identities[-1]

    @cached_property
    def identities(self) -> list[str]:
        """Return the identity at first and after each extension; shards have that of their own."""
        return [
            hash_json([self.settings, [file.sha256 for file in files]])
            for files in self.manifest.list_extents()
        ]

    def identify_shard(self, shard: int) -> str:
        """Return the identity that the run had when a shard was added to it."""
        extents = self.manifest.list_extents()
        ends = [files[-1].first_shard + files[-1].num_shards for files in extents]
        return self.identities[bisect_right(ends, shard)]

    @property
    def results(self) -> str:
        """The name of the folder of results: shards, scores or predictions."""
        return RESULTS[self.command]

    @property
    def results_folder(self) -> AnyPath:
        return self.out / self.results

    @property
    def manifest_folder(self) -> AnyPath:
        return self.out / f"{self.prefix}manifest"

    @property
    def attempts_folder(self) -> AnyPath:
        return self.out / f"{self.prefix}attempts"

    def shard_path(self, shard: int) -> AnyPath:
        return self.results_folder / shard_name(shard)

    def find_file(self, shard: int) -> ManifestFile:
        """Return the manifest file that holds a shard."""
        for file in self.manifest.files:
            if file.first_shard <= shard < file.first_shard + file.num_shards:
                return file
        raise AssertionError(f"shard {shard} is beyond the manifest")


class OtherVerb(RunMismatch):
    """The folder belongs to a run of train or tune, which has no manifest."""

    def __init__(self, out: AnyPath, command: str) -> None:
        super().__init__(f"{out} belongs to a {command} run; choose a new output folder")
        self.command = command


@dataclass(frozen=True)
class _Record:
    """What `_run.json` holds of a batch run."""

    command: str
    settings: dict[str, Any]
    config: dict[str, Any]
    manifest: Manifest
    left_out: dict[str, int]
    earlier_identities: tuple[str, ...] = ()
    has_private_folders: bool = False
    counts: dict[str, dict[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.command not in RESULTS:
            raise ValueError(f"no command {self.command!r}")
        self.manifest.check()
        if unknown := self.counts.keys() - {"labels", "splits", "sources"}:
            raise ValueError(f"counts of {sorted(unknown)}")


def read_run(out: AnyPath) -> Run | None:
    """Return the run of an output folder, or None when none has been frozen there."""
    check_links(out)
    path = out / "_run.json"
    if (data := read_if_exists(path)) is None:
        return None
    record = parse_json(path, data)
    if record.get("schema_version") != SCHEMA_VERSION:
        raise RunMismatch(
            f"{path}: schema_version {record.get('schema_version')}, this program writes"
            f" {SCHEMA_VERSION}; choose a new output folder"
        )
    if "manifest" not in record:
        raise OtherVerb(out, str(record.get("command")))
    try:
        found = parse_record(_Record, record)
    except ValueError as error:
        raise StorageError(
            f"{path}: not the metadata of a run ({error}); it may have been edited"
        ) from error
    return Run(
        out=out,
        command=found.command,
        settings=found.settings,
        config=found.config,
        manifest=found.manifest,
        left_out=found.left_out,
        earlier_identities=found.earlier_identities,
        prefix=PRIVATE_PREFIX if found.has_private_folders else "",
        counts=found.counts,
    )


class RunExtended(StorageError):
    """Another command has added shards to the run (`score --extend`): there is more to do."""


def read_again(out: AnyPath, earlier: Run | None = None) -> Run:
    """Return the run that was just there. StorageError when another has taken its place."""
    run = read_run(out)
    if run is not None and earlier is not None and earlier.identity in run.identities[:-1]:
        raise RunExtended(f"{out}: another command has extended the run; run the same one again")
    if run is None or (
        earlier is not None and (run.identity, run.manifest) != (earlier.identity, earlier.manifest)
    ):
        raise StorageError(
            f"{out}: it was moved, or another process has replaced it, while the command ran; put"
            " it back and run the same command again, by one process at a time"
        )
    return run


def require_run(out: AnyPath, wanted: str = ANY_VERB) -> Run:
    """Return the run of an output folder. StorageError when there is none, or of another verb.

    `wanted` says of which verbs it may be.
    """
    try:
        run = read_run(out)
    except OtherVerb as error:
        again = ", or decide again, which mends its files" if error.command == "decide" else ""
        raise StorageError(
            f"{out} is the output of {error.command}; give that of {wanted}{again}"
        ) from error
    if run is None:
        raise StorageError(f"{out}: no _run.json; give the output of {wanted}")
    return run


def claim_folder(
    path: AnyPath,
    settings: dict[str, Any],
    config: dict[str, Any],
    plan: dict[str, Any] | None = None,
    has_begun: Callable[[], bool] = lambda: True,
) -> None:
    """Write `_run.json` with the settings of `identify_run`, or check that it has the same ones.

    `plan` is stored too but not compared. RunMismatch, with the difference, for other settings;
    those of a run of the same command that has not started its work are replaced.
    """
    record = {
        "schema_version": SCHEMA_VERSION,
        "tool_version": __version__,
        "command": settings["command"],
        "fingerprint": hash_json(settings),
        "settings": settings,
        "config": config,
        **(plan or {}),
    }
    if not create_bytes(path / "_run.json", encode_json(record)):
        found = read_record(path)
        if found.get("command") != settings["command"] or has_begun():
            check_settings(path, found["settings"], settings)
        else:  # it failed or was killed before its first result: nothing is lost
            write_json(path / "_run.json", record)


def read_record(path: AnyPath) -> dict[str, Any]:
    """Return the content of `_run.json`. RunMismatch when it is not of cifake-ray."""
    check_links(path)
    record = read_json(path / "_run.json")
    if not isinstance(record.get("settings"), dict):
        raise RunMismatch(f"{path / '_run.json'}: not a run of cifake-ray; choose a new folder")
    return record


@dataclass(frozen=True)
class ShardStats:
    """The counts and the digest of a committed shard."""

    shard: int
    rows: int
    errors: dict[str, int]
    unlike_training: dict[str, int]
    size_bytes: int
    sha256: str
    # By name of the threshold; empty where there are none, and from earlier versions.
    called_fake: dict[str, int] = field(default_factory=dict)
    provenance: dict[str, int] = field(default_factory=dict)  # see `count_provenance`


def is_finished(run: Run) -> bool:
    """Return whether `_SUCCESS` is that of this run. StorageError when it is damaged."""
    path = run.out / "_SUCCESS"
    if (data := read_if_exists(path)) is None:
        return False
    # Earlier versions did not write it down.
    first = (run.earlier_identities or run.identities)[0]
    return bool(parse_json(path, data).get("run", first) == run.identity)


@contextmanager
def lock_run(out: AnyPath, wait: Callable[[], None] | None = None) -> Iterator[bool]:
    """Keep other commands from changing the record of a local run, or removing its unnamed files.

    Yield whether no other command does that: with `wait`, which is called first, it is waited for.
    Stores have no locks, nor have all file systems: there it is not known.
    """
    if not isinstance(out, Path):
        yield True
        return
    with explain_errors(out):
        folder, is_alone = os.open(out, os.O_RDONLY), True
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            is_alone = wait is not None
            if wait is not None:
                wait()
                fcntl.flock(folder, fcntl.LOCK_EX)
        except OSError:  # no locks here
            pass
        yield is_alone
    finally:
        os.close(folder)


def force_names(run: Run) -> None:
    """Force to disk the names that killed processes have left, before a command builds on them.

    Else a loss of power could take away a shard that the command has found, or `_run.json`.
    """
    sync_folder(run.out)
    sync_folder(run.results_folder)


def reopen_run(run: Run) -> None:
    """Remove what marks a run as complete, before one of its shards is made again."""
    remove(run.out / "_SUCCESS")  # first: without it the other is not used
    remove(run.out / "_files.parquet")
