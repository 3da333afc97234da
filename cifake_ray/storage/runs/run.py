"""Read and write run metadata: `_run.json` at first, `_files.parquet` and `_SUCCESS` at the end.

`_run.json` is created once the manifest is complete, unless another process has created it: a
process that loses this race uses the winner's manifest.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cifake_ray.core.schema import SCHEMA_VERSION, shard_name
from cifake_ray.errors import CifakeError, RunMismatch, StorageError, UsageError
from cifake_ray.storage.io.files import (
    TEMPORARY_PREFIX,
    check_writable,
    create_bytes,
    discard,
    encode_json,
    exists,
    hash_json,
    list_folder,
    read_json,
    remove,
    remove_leftovers,
    write_bytes,
    write_json,
)
from cifake_ray.storage.io.paths import AnyPath
from cifake_ray.storage.runs.manifest import Manifest, ManifestFile, write_manifest
from cifake_ray.storage.sources.source import Listing
from cifake_ray.version import __version__

RESULTS = {"convert": "shards", "score": "scores", "evaluate": "predictions"}
MANIFEST_NAME = re.compile(r"[0-9a-f]{8}-\d{5}\.parquet")
ASIDE_PREFIX = ".aside-"  # of damaged files while `repair` redoes them
ASIDE_NAME = re.compile(re.escape(ASIDE_PREFIX) + r"(_SUCCESS|part-\d{5,}\.parquet)")
FILES_FIELDS = [
    pa.field("name", pa.string()),
    pa.field("size_bytes", pa.int64()),
    pa.field("sha256", pa.string()),
    pa.field("rows", pa.int64()),
    pa.field("errors", pa.int64()),
]


@dataclass(frozen=True)
class Run:
    """A run whose settings and manifest are frozen in its output folder."""

    out: AnyPath
    command: str
    settings: dict[str, Any]
    config: dict[str, Any]
    manifest: Manifest
    left_out: dict[str, int]
    counts: dict[str, dict[str, int]] = field(default_factory=dict)  # labels, splits, sources

    @property
    def fingerprint(self) -> str:
        return hash_json(self.settings)

    @property
    def identity(self) -> str:
        """The sha256 of the settings and the listing, which marks the shards of this run."""
        return hash_json([self.settings, [file.sha256 for file in self.manifest.files]])

    @property
    def results(self) -> str:
        """The name of the folder of results: shards, scores or predictions."""
        return RESULTS[self.command]

    @property
    def results_folder(self) -> AnyPath:
        return self.out / self.results

    @property
    def manifest_folder(self) -> AnyPath:
        return self.out / "manifest"

    def shard_path(self, shard: int) -> AnyPath:
        return self.results_folder / shard_name(shard)

    def find_file(self, shard: int) -> ManifestFile:
        """Return the manifest file that holds a shard."""
        for file in self.manifest.files:
            if file.first_shard <= shard < file.first_shard + file.num_shards:
                return file
        raise AssertionError(f"shard {shard} is beyond the manifest")


def read_run(out: AnyPath) -> Run | None:
    """Return the run of an output folder, or None when none has been frozen there."""
    path = out / "_run.json"
    if not exists(path):
        return None
    record = read_json(path)
    if record.get("schema_version") != SCHEMA_VERSION:
        raise RunMismatch(
            f"{path}: schema_version {record.get('schema_version')}, this program writes"
            f" {SCHEMA_VERSION}; choose a new output folder"
        )
    if "manifest" not in record:
        raise RunMismatch(
            f"{out} belongs to a {record.get('command')} run; choose a new output folder"
        )
    try:
        manifest = record["manifest"]
        command = str(record["command"])
        if command not in RESULTS:
            raise ValueError(f"no command {command!r}")
        return Run(
            out=out,
            command=command,
            settings=dict(record["settings"]),
            config=dict(record["config"]),
            manifest=Manifest(
                files=tuple(ManifestFile(**file) for file in manifest["files"]),
                num_rows=manifest["num_rows"],
                size_bytes=manifest["size_bytes"],
            ),
            left_out=record["left_out"],
            counts=record.get("counts", {}),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise StorageError(
            f"{path}: not the metadata of a run ({type(error).__name__}: {error}); it may have"
            " been edited"
        ) from error


def require_run(out: AnyPath) -> Run:
    """Return the run of an output folder. StorageError when there is none."""
    run = read_run(out)
    if run is None:
        raise StorageError(f"{out}: no _run.json; give the output of convert, score or evaluate")
    return run


def describe_difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Return `epochs: 5 there, 6 here` for every setting that differs."""
    names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    return "; ".join(f"{name}: {old.get(name)!r} there, {new.get(name)!r} here" for name in names)


def check_settings(out: AnyPath, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raise RunMismatch with the difference when the folder belongs to other settings."""
    if old != new:
        if old.get("command") != new["command"]:  # nothing else is comparable
            old, new = ({"command": settings.get("command")} for settings in (old, new))
        raise RunMismatch(
            f"{out} belongs to another run ({describe_difference(old, new)}); choose a new output"
            " folder, or give the same settings"
        )


def identify_run(command: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that a fingerprint covers: two runs are the same if these are."""
    return {"command": command, "schema_version": SCHEMA_VERSION, **settings}


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
    record = read_json(path / "_run.json")
    if "settings" not in record:
        raise RunMismatch(f"{path / '_run.json'}: not a run of cifake-ray; choose a new folder")
    return record


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """The settings of a run before it is frozen."""

    out: AnyPath
    command: str
    settings: dict[str, Any]
    config: dict[str, Any]
    list_source: Callable[[], Listing]
    shard_rows: int | None
    log: Callable[[str], None] = lambda message: None

    def find(self) -> Run | None:
        """Return the run of `out`, if any. RunMismatch when it has other settings."""
        run = read_run(self.out)
        if run is not None:
            check_settings(self.out, run.settings, self._settings)
        return run

    def check_new(self) -> None:
        """Raise UsageError, RunMismatch or StorageError before a long listing, not after it."""
        if str(self.out).startswith("memory://"):
            raise UsageError(f"{self.out}: memory is that of one process, the workers are others")
        folders = [self.out / name for name in ("manifest", "attempts", RESULTS[self.command])]
        foreign = [
            path
            for folder in folders
            for path in list_folder(folder)
            if not path.name.startswith(TEMPORARY_PREFIX)
            and not (folder == folders[0] and MANIFEST_NAME.fullmatch(path.name))
        ]
        if foreign and self.find() is None:  # else another process has just frozen it
            raise RunMismatch(
                f"{foreign[0]} is where a run would write, but the folder holds no run; choose a"
                " new output folder"
            )
        check_writable(self.out)

    def freeze(self) -> Run:
        """List the source and freeze the run, or return one that was frozen meanwhile."""
        listing = self.list_source()
        folder = self.out / "manifest"
        manifest = write_manifest(folder, secrets.token_hex(4), listing, self.shard_rows)
        for note in listing.notes:
            self.log(f"{self.command}: {note}")
        plan = {
            "manifest": {
                "num_rows": manifest.num_rows,
                "size_bytes": manifest.size_bytes,
                "files": [asdict(file) for file in manifest.files],
            },
            "left_out": {reason: n for reason, n in listing.left_out.items() if n},
            "counts": listing.counts.to_dict(),
        }
        claim_folder(self.out, self._settings, self.config, plan)
        run = read_run(self.out)
        assert run is not None
        if run.manifest != manifest:  # another process was first
            for file in manifest.files:
                discard(folder / file.name)
        return run

    def open(self) -> Run:
        """Resume the run of `out`, or list the source and freeze a new one."""
        run = self.find()
        if run is None:
            self.check_new()
            run = self.freeze()
        return run

    @property
    def _settings(self) -> dict[str, Any]:
        return identify_run(self.command, self.settings)


@dataclass(frozen=True)
class ShardStats:
    """The counts and the digest of a committed shard."""

    shard: int
    rows: int
    errors: dict[str, int]
    unlike_training: dict[str, int]
    size_bytes: int
    sha256: str


def reopen_run(run: Run) -> None:
    """Remove what marks a run as complete, before one of its shards is made again."""
    remove(run.out / "_SUCCESS")  # first: without it the other is not used
    remove(run.out / "_files.parquet")


def finish_run(run: Run, parts: list[ShardStats], summary: dict[str, Any]) -> None:
    """Check that the counts add up, then write `_files.parquet` and `_SUCCESS`."""
    missing = set(range(run.manifest.num_shards)) - {part.shard for part in parts}
    rows = sum(part.rows for part in parts)
    if missing or rows != run.manifest.num_rows:
        raise CifakeError(
            f"{run.out}: the counts do not add up: {run.manifest.num_rows} images listed,"
            f" {rows} rows written, {len(missing)} shards missing; run the same command again"
        )
    parts = sorted(parts, key=lambda part: part.shard)
    columns = {
        "name": [f"{run.results}/{shard_name(part.shard)}" for part in parts],
        "size_bytes": [part.size_bytes for part in parts],
        "sha256": [part.sha256 for part in parts],
        "rows": [part.rows for part in parts],
        "errors": [sum(part.errors.values()) for part in parts],
    }
    schema = pa.schema(FILES_FIELDS, metadata={b"schema_version": str(SCHEMA_VERSION).encode()})
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns, schema=schema), sink)
    for folder in (run.out, run.results_folder, run.manifest_folder):
        remove_leftovers(folder)
        for path in list_folder(folder):
            if ASIDE_NAME.fullmatch(path.name):
                discard(path)
    named = {file.name for file in run.manifest.files}
    for path in list_folder(run.manifest_folder):  # of killed listings and lost races
        if path.name not in named and MANIFEST_NAME.fullmatch(path.name):
            discard(path)
    write_bytes(run.out / "_files.parquet", sink.getvalue().to_pybytes())
    write_json(run.out / "_SUCCESS", {"schema_version": SCHEMA_VERSION, **summary})
