"""The papers of a run: `_run.json` when it starts, `_files.parquet` and `_SUCCESS` when it ends.

Floor: storage. `_run.json` is created only once the manifest is complete, and only if nobody else
created it first: whoever loses the race works on the winner's manifest.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cifake_ray import __version__
from cifake_ray.core.schema import SCHEMA_VERSION, shard_name
from cifake_ray.errors import CifakeError, RunMismatch, StorageError
from cifake_ray.storage.files import (
    check_writable,
    create_bytes,
    discard,
    encode_json,
    exists,
    hash_file,
    hash_json,
    list_folder,
    move,
    read_bytes,
    read_json,
    remove,
    remove_leftovers,
    stamp_file,
    write_bytes,
    write_json,
)
from cifake_ray.storage.listing import Listing
from cifake_ray.storage.manifest import Manifest, ManifestFile, write_manifest
from cifake_ray.storage.places import Place

FILES_FIELDS = [
    pa.field("name", pa.string()),
    pa.field("size_bytes", pa.int64()),
    pa.field("sha256", pa.string()),
    pa.field("rows", pa.int64()),
    pa.field("errors", pa.int64()),
]


@dataclass(frozen=True)
class Run:
    """An output folder whose plan is frozen. `results` is shards, scores or predictions."""

    out: Place
    command: str
    results: str
    settings: dict[str, Any]
    config: dict[str, Any]
    manifest: Manifest
    left_out: dict[str, int]

    @property
    def fingerprint(self) -> str:
        return hash_json(self.settings)

    @property
    def identity(self) -> str:
        """sha256 of the settings and the listing: only its own shards are taken for a run's."""
        return hash_json([self.settings, [file.sha256 for file in self.manifest.files]])

    @property
    def results_folder(self) -> Place:
        return self.out / self.results

    @property
    def manifest_folder(self) -> Place:
        return self.out / "manifest"

    def part_path(self, shard: int) -> Place:
        return self.results_folder / shard_name(shard)

    def find_file(self, shard: int) -> ManifestFile:
        """The manifest file that holds a shard."""
        for file in self.manifest.files:
            if file.first_shard <= shard < file.first_shard + file.num_shards:
                return file
        raise AssertionError(f"shard {shard} is beyond the manifest")


def read_run(out: Place) -> Run | None:
    """The run of an output folder, or None when none has been frozen there."""
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
    manifest = record["manifest"]
    return Run(
        out=out,
        command=record["command"],
        results=record["results"],
        settings=record["settings"],
        config=record["config"],
        manifest=Manifest(
            files=tuple(ManifestFile(**file) for file in manifest["files"]),
            num_rows=manifest["num_rows"],
            size_bytes=manifest["size_bytes"],
        ),
        left_out=record["left_out"],
    )


def describe_difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """`epochs: 5 there, 6 here` for every setting that differs."""
    names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    return "; ".join(f"{name}: {old.get(name)!r} there, {new.get(name)!r} here" for name in names)


def refuse_other_settings(out: Place, old: dict[str, Any], new: dict[str, Any]) -> None:
    """RunMismatch, with the difference, when the folder belongs to a run with other settings."""
    if old != new:
        raise RunMismatch(
            f"{out} belongs to another run ({describe_difference(old, new)}); choose a new output"
            " folder, or give the same settings"
        )


def open_run(
    out: Place,
    *,
    command: str,
    results: str,
    settings: dict[str, Any],
    config: dict[str, Any],
    list_source: Callable[[], Listing],
    shard_rows: int | None,
) -> Run:
    """Resume the run of `out`, or list the source and freeze a new one.

    RunMismatch when `out` belongs to other settings; StorageError when it cannot be written.
    """
    settings = {"command": command, "schema_version": SCHEMA_VERSION, **settings}
    run = read_run(out)
    if run is None:
        check_writable(out)
        listing = list_source()
        manifest = write_manifest(out / "manifest", secrets.token_hex(4), listing, shard_rows)
        record = {
            "schema_version": SCHEMA_VERSION,
            "tool_version": __version__,
            "command": command,
            "results": results,
            "fingerprint": hash_json(settings),
            "settings": settings,
            "config": config,
            "manifest": {
                "num_rows": manifest.num_rows,
                "size_bytes": manifest.size_bytes,
                "files": [asdict(file) for file in manifest.files],
            },
            "left_out": {reason: n for reason, n in listing.left_out.items() if n},
        }
        create_bytes(out / "_run.json", encode_json(record))
        run = read_run(out)
        assert run is not None
    refuse_other_settings(out, run.settings, settings)
    return run


@dataclass(frozen=True)
class PartFacts:
    """What a committed shard says of itself."""

    shard: int
    rows: int
    errors: dict[str, int]
    size_bytes: int
    sha256: str


def reopen_run(run: Run) -> None:
    """Withdraw what says that a run is complete, before any of its shards is made anew."""
    remove(run.out / "_SUCCESS")  # first: without it nobody relies on the other
    remove(run.out / "_files.parquet")


def finish_run(run: Run, parts: list[PartFacts], summary: dict[str, Any]) -> None:
    """Write `_files.parquet`, check that the account adds up, then write `_SUCCESS`."""
    missing = set(range(run.manifest.num_shards)) - {part.shard for part in parts}
    rows = sum(part.rows for part in parts)
    if missing or rows != run.manifest.num_rows:
        raise CifakeError(
            f"{run.out}: the account does not add up: {run.manifest.num_rows} images listed,"
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
    remove_leftovers(run.results_folder)
    named = {file.name for file in run.manifest.files}
    for path in list_folder(run.manifest_folder):  # listings that were killed, or lost the race
        if path.name not in named:
            discard(path)
    write_bytes(run.out / "_files.parquet", sink.getvalue().to_pybytes())
    write_json(run.out / "_SUCCESS", {"schema_version": SCHEMA_VERSION, **summary})


@dataclass(frozen=True)
class Damage:
    """A result file that is not what was committed."""

    name: str
    reason: str


def find_damage(out: Place) -> list[Damage]:
    """Compare every result file with `_files.parquet`. StorageError when that is missing."""
    path = out / "_files.parquet"
    if not exists(path):
        raise StorageError(f"{out}: no _files.parquet; the run has not finished, run it again")
    try:
        listed = pq.read_table(pa.BufferReader(read_bytes(path))).to_pylist()
    except (OSError, pa.ArrowInvalid) as error:
        raise StorageError(
            f"{path}: damaged ({error}); `cifake-ray repair` makes it anew"
        ) from error
    damage = []
    for row in listed:
        file = out / row["name"]
        if not exists(file):
            damage.append(Damage(row["name"], "missing"))
        elif (size_bytes := stamp_file(file)[0]) != row["size_bytes"]:
            damage.append(Damage(row["name"], f"{size_bytes} bytes, not {row['size_bytes']}"))
        elif hash_file(file) != row["sha256"]:
            damage.append(Damage(row["name"], "sha256 differs"))
    return damage


@dataclass(frozen=True)
class Aside:
    """Files of a run that were renamed out of the way: name -> name while aside."""

    files: dict[Place, Place]

    def restore(self) -> None:
        """Put back what has not been made again."""
        for path, aside in self.files.items():
            if exists(aside) and not exists(path):
                move(aside, path)

    def discard(self) -> None:
        for aside in self.files.values():
            discard(aside)


def set_damage_aside(out: Place) -> Aside:
    """Rename damaged result files and `_SUCCESS`: the run's command then makes them again."""
    try:
        damage = find_damage(out)
    except StorageError:  # no readable _files.parquet: every shard proves itself when it is resumed
        damage = []
    paths: list[Place] = [*(out / item.name for item in damage), out / "_SUCCESS"]
    files = {path: path.parent / f".aside-{path.name}" for path in paths if exists(path)}
    for path, aside in files.items():
        move(path, aside)
    return Aside(files)
