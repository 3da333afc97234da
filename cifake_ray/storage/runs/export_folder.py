"""Export scores to a folder of files, each of some shards, so that many workers can write them.

`_run.json` says what is exported, `_parts/` which files are there, until `_files.parquet` does and
`_SUCCESS` ends it. The same command again keeps what is there.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cifake_ray.config import ExportConfig
from cifake_ray.core.schema import SCHEMA_VERSION
from cifake_ray.errors import RunMismatch, StorageError, UsageError
from cifake_ray.storage.io.digest import hash_file, list_sizes
from cifake_ray.storage.io.files import (
    TEMPORARY_PREFIX,
    discard,
    exists,
    hash_json,
    make_folder,
    parse_json,
    read_bytes,
    read_if_exists,
    read_json,
    remove,
    remove_leftovers,
    write_bytes,
    write_chunks,
    write_json,
)
from cifake_ray.storage.io.paths import AnyPath, is_inside
from cifake_ray.storage.io.records import PARQUET_ERRORS, check_columns, parse_record
from cifake_ray.storage.runs.export import encode_shards, read_schema
from cifake_ray.storage.runs.finish import FILES_FIELDS
from cifake_ray.storage.runs.read_scores import Scores
from cifake_ray.storage.runs.run import Run, claim_folder, read_record
from cifake_ray.storage.runs.settings import identify_run
from cifake_ray.storage.runs.verify import open_finished, read_files

PART_NAME = re.compile(r"part-\d{5,}\.(csv|parquet|jsonl|txt)")
RECORDS = "_parts"
OWN_STARTS = (TEMPORARY_PREFIX, RECORDS)  # of what a loss of power may leave in an empty folder
EXPORTED_FIELDS = [field for field in FILES_FIELDS if field.name != "errors"]


@dataclass(frozen=True)
class ExportPart:
    """A file of an export: neighbouring shards."""

    name: str
    first_shard: int
    num_shards: int
    rows: int  # of the shards: `--where` may choose fewer
    was_written: bool  # by a command before, as its record says


@dataclass(frozen=True)
class WrittenPart:
    """What is recorded of a file that is there."""

    name: str
    size_bytes: int
    sha256: str
    rows: int


@dataclass(frozen=True)
class PartWriter:
    """Writes the files of an export; this is what workers are sent."""

    run: Run
    target: AnyPath
    config: ExportConfig
    schema: pa.Schema  # of all files

    def open_shards(self, first: int, count: int) -> Scores:
        """Return some shards of the run."""
        paths = tuple(self.run.shard_path(n) for n in range(first, first + count))
        return Scores(self.run.out, self.run, paths, first)

    def write_part(self, part: ExportPart) -> tuple[ExportPart, WrittenPart]:
        """Write a file whole, then its record; keep one that is as its record says."""
        record = self.target / RECORDS / f"{part.name}.json"
        if part.was_written and (kept := _inspect(self.target, part.name, record)) is not None:
            return part, kept
        counts: Counter[str] = Counter()
        digest, size_bytes = hashlib.sha256(), 0

        def encode() -> Iterator[bytes]:
            nonlocal size_bytes
            scores = self.open_shards(part.first_shard, part.num_shards)
            for chunk in encode_shards(scores, self.config, counts, schema=self.schema):
                digest.update(chunk)
                size_bytes += len(chunk)
                yield chunk

        write_chunks(self.target / part.name, encode())
        written = WrittenPart(part.name, size_bytes, digest.hexdigest(), counts["rows"])
        make_folder(record.parent, parents=False)
        write_json(record, asdict(written))
        return part, written


def _inspect(target: AnyPath, name: str, record: AnyPath) -> WrittenPart | None:
    """Return what is recorded of a file; None if it must be written."""
    try:
        written = parse_record(WrittenPart, read_json(record))
        is_whole = written.name == name and hash_file(target / name) == written.sha256
    except (StorageError, ValueError):
        return None
    return written if is_whole else None


@dataclass(frozen=True)
class FolderExport:
    """An export to a folder that has been claimed for it."""

    writer: PartWriter
    parts: list[ExportPart]
    settings: dict[str, Any]

    @property
    def target(self) -> AnyPath:
        return self.writer.target

    def find_result(self) -> dict[str, Any] | None:
        """Return the summary of an export that has finished, if its files are there."""
        path = self.target / "_SUCCESS"
        if (data := read_if_exists(path)) is None:
            return None
        summary = parse_json(path, data)
        if summary.get("export") == hash_json(self.settings) and self._has_files():
            _discard_records(self.target)  # left by a command that was killed at its end
            return summary
        remove(path)
        return None

    def _has_files(self) -> bool:
        try:
            table = pq.read_table(pa.BufferReader(read_bytes(self.target / "_files.parquet")))
            check_columns(table.schema, EXPORTED_FIELDS)
        except (StorageError, *PARQUET_ERRORS):
            return False
        there = list_sizes(self.target)
        sizes = zip(
            *(table.column(name).to_pylist() for name in ("name", "size_bytes")), strict=True
        )
        return all(there.get(name) == size for name, size in sizes)

    def finish(self, written: Iterable[WrittenPart]) -> dict[str, Any]:
        """Check that every file is there and nothing else, and write what ends the export.

        StorageError when the scores or the folder were changed meanwhile.
        """
        run, target = self.writer.run, self.target
        by_name = {file.name: file for file in written}
        files = [by_name[part.name] for part in self.parts]
        _check_names(target, self.parts)
        there = list_sizes(target)
        if changed := [f.name for f in files if there.get(f.name) != f.size_bytes]:
            raise StorageError(
                f"{target / changed[0]}: changed or removed while export wrote the others; run the"
                " same command again"
            )
        now = describe_export(open_finished(run.out), read_files(run), self.writer.config)
        if now != self.settings or read_record(target)["settings"] != self.settings:
            raise StorageError(
                f"{target}: {run.out} or this folder was changed while export ran; run the same"
                " command again"
            )
        remove_leftovers(target)
        columns = {field.name: [getattr(f, field.name) for f in files] for field in EXPORTED_FIELDS}
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(columns, schema=pa.schema(EXPORTED_FIELDS)), sink)
        write_bytes(target / "_files.parquet", sink.getvalue().to_pybytes())
        summary = {
            "command": "export",
            "out": self.writer.config.file,
            "rows": sum(file.rows for file in files),
            "left_out": {},
            "files": len(files),
        }
        finished_at = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        paper = {"schema_version": SCHEMA_VERSION, "finished_at": finished_at}
        write_json(target / "_SUCCESS", paper | {"export": hash_json(self.settings)} | summary)
        _discard_records(target)
        return summary


def open_export(scores: AnyPath, target: AnyPath, config: ExportConfig) -> FolderExport:
    """Claim a folder for an export, or find there what was begun.

    RunMismatch or UsageError when the folder holds something else, StorageError when there is no
    finished run.
    """
    if is_inside(target, scores):
        raise UsageError(f"{target} is inside {scores}; choose a folder outside it")
    run = open_finished(scores, "score or evaluate")
    files = read_files(run)
    writer = PartWriter(run, target, config, pa.schema([]))
    schema = read_schema(writer.open_shards(0, 1), config)
    writer = PartWriter(run, target, config, schema)
    settings = describe_export(run, files, config)
    _claim(target, settings, {"src": str(scores)}, overwrite=config.overwrite)
    records = list_sizes(target / RECORDS)
    parts = list(_deal_shards(files, config, records))
    _check_names(target, parts)
    return FolderExport(writer, parts, settings)


def describe_export(run: Run, files: list[dict[str, Any]], config: ExportConfig) -> dict[str, Any]:
    """Return what two exports to one folder must have in common."""
    settings = {
        "format": config.chosen_format,
        "columns": config.column_names,
        "where": list(config.where),
        "rows_per_file": config.rows_per_file,
        "scores": hash_json([run.identity, [file["sha256"] for file in files]]),
    }
    return identify_run("export", settings)


def _claim(
    target: AnyPath, settings: dict[str, Any], config: dict[str, Any], *, overwrite: bool
) -> None:
    make_folder(target)
    foreign = [name for name in list_sizes(target) if not name.startswith(OWN_STARTS)]
    if not exists(target / "_run.json"):
        if foreign:
            raise RunMismatch(
                f"{target} holds {foreign[0]}, and no export; choose a new folder, or remove it"
            )
    elif overwrite:
        found = read_record(target)["settings"]
        is_other = found != settings or exists(target / "_SUCCESS")
        if found.get("command") == "export" and is_other:
            _clear(target)
    has_begun = any(map(PART_NAME.fullmatch, list_sizes(target)))
    try:
        claim_folder(target, settings, config, has_begun=lambda: has_begun)
    except RunMismatch as error:
        raise RunMismatch(
            f"{error}; --overwrite replaces what was exported with other options, or before the"
            " scores changed"
        ) from error


def _clear(target: AnyPath) -> None:
    """Remove the files of an export; first what says that they are there."""
    for name in ("_SUCCESS", "_files.parquet"):
        remove(target / name)
    _discard_records(target)
    for name in filter(PART_NAME.fullmatch, list_sizes(target)):
        remove(target / name)


def _discard_records(target: AnyPath) -> None:
    folder = target / RECORDS
    for name in list_sizes(folder):
        discard(folder / name)
    if isinstance(folder, Path):
        with suppress(OSError):
            folder.rmdir()


def _check_names(target: AnyPath, parts: list[ExportPart]) -> None:
    """Raise RunMismatch when a file would be taken for one of the export."""
    others = set(filter(PART_NAME.fullmatch, list_sizes(target))) - {part.name for part in parts}
    if others:
        raise RunMismatch(f"{target / min(others)} is not of this export; move it elsewhere")


def _deal_shards(
    files: list[dict[str, Any]], config: ExportConfig, records: dict[str, int]
) -> Iterator[ExportPart]:
    """Yield parts of neighbouring shards with about as many rows as are wanted."""
    first = rows = number = 0
    for shard, file in enumerate(files, 1):
        rows += file["rows"]
        if rows >= config.rows_per_file or shard == len(files):
            name = f"part-{number:05}.{config.chosen_format}"
            yield ExportPart(name, first, shard - first, rows, f"{name}.json" in records)
            first, rows, number = shard, 0, number + 1
