"""End a run: check that all is there, remove what is left over, write what marks it finished."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cifake_ray.core.schema import SCHEMA_VERSION, shard_name
from cifake_ray.errors import CifakeError
from cifake_ray.storage.io.files import (
    create_bytes,
    discard,
    list_folder,
    read_bytes,
    remove_leftovers,
    write_bytes,
    write_json,
)
from cifake_ray.storage.runs.datasets_card import CARD_NAME, encode_card
from cifake_ray.storage.runs.listed_rows import FOLDER_NAME, remove_rows
from cifake_ray.storage.runs.manifest import FILE_NAME
from cifake_ray.storage.runs.run import Run, ShardStats, force_names, lock_run, read_again

ASIDE_PREFIX = ".aside-"  # of damaged files while `repair` redoes them
ASIDE_NAME = re.compile(re.escape(ASIDE_PREFIX) + r"(_SUCCESS|part-\d{5,}\.parquet)")
FILES_FIELDS = [
    pa.field("name", pa.string()),
    pa.field("size_bytes", pa.int64()),
    pa.field("sha256", pa.string()),
    pa.field("rows", pa.int64()),
    pa.field("errors", pa.int64()),
]


def _write_card(run: Run) -> None:
    """Write the card of the run, unless a person has changed that of an earlier extent."""
    cards = (
        encode_card(run.results, run.manifest_folder, files)
        for files in reversed(run.manifest.list_extents())
    )
    path, card = run.out / CARD_NAME, next(cards)
    if not create_bytes(path, card) and (there := read_bytes(path)) != card and there in cards:
        write_bytes(path, card)


def _remove_listings(run: Run) -> None:
    """Remove what killed listings and lost races have left."""
    named = {file.name for file in run.manifest.files}
    for path in list_folder(run.manifest_folder):
        if FOLDER_NAME.fullmatch(path.name):
            remove_rows(path)
        elif path.name not in named and FILE_NAME.fullmatch(path.name):
            discard(path)


def finish_run(run: Run, parts: list[ShardStats], summary: dict[str, Any]) -> None:
    """Check that the counts add up, then write `_files.parquet` and `_SUCCESS`."""
    read_again(run.out, run)
    there = {path.name for path in list_folder(run.results_folder)}
    committed = {part.shard for part in parts if shard_name(part.shard) in there}
    missing = set(range(run.manifest.num_shards)) - committed
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
    remove_leftovers(run.out)
    for folder in (run.out, run.results_folder, run.manifest_folder):
        for path in list_folder(folder):
            if ASIDE_NAME.fullmatch(path.name):
                discard(path)
    with lock_run(run.out) as is_alone:
        if is_alone:  # else a command extends the run, and will end here too
            read_again(run.out, run)
            _remove_listings(run)
    _write_card(run)
    force_names(run)  # of another command that was killed meanwhile
    write_bytes(run.out / "_files.parquet", sink.getvalue().to_pybytes())
    finished_at = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    record = {"schema_version": SCHEMA_VERSION, "finished_at": finished_at, "run": run.identity}
    record |= summary
    write_json(run.out / "_SUCCESS", record)
    read_again(run.out, run)  # it may have been moved since
