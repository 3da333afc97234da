"""Extend a run: list its source again, and add the keys that are new as new shards.

The manifest is append-only. New files are written beside those that are there, and count once
`_run.json`, which is replaced in one step, names them. Rows that exist are never touched.
"""

from __future__ import annotations

import secrets
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cifake_ray.core.schema import MANIFEST_FIELDS
from cifake_ray.errors import StorageError, UsageError
from cifake_ray.storage.io.digest import list_sizes
from cifake_ray.storage.io.files import discard, write_bytes, write_json
from cifake_ray.storage.io.paths import AnyPath
from cifake_ray.storage.runs.listed_rows import (
    FOLDER_PREFIX,
    ListedRows,
    check_unique,
    divide_buckets,
    remove_rows,
)
from cifake_ray.storage.runs.manifest import (
    Manifest,
    deal_manifest,
    read_manifest_shard,
    write_manifest,
)
from cifake_ray.storage.runs.row_files import HASH
from cifake_ray.storage.runs.run import (
    Run,
    is_finished,
    lock_run,
    read_again,
    read_record,
    reopen_run,
)
from cifake_ray.storage.runs.run_plan import RunPlan, describe_listing
from cifake_ray.storage.sources.source import Listing
from cifake_ray.version import __version__

CHANGES_NAME = "_changes.parquet"
STAMP_COLUMNS = ["size_bytes", "mtime_ns", "etag"]
PLACE = " "  # the column of places in a listing: a list may use any other name for its own
MAX_EXAMPLES = 3


@dataclass
class Changes:
    """How a source differs from the listing of a run."""

    out: AnyPath
    counts: dict[str, int] = field(default_factory=lambda: {"new": 0, "changed": 0, "gone": 0})
    examples: list[str] = field(default_factory=list)

    def describe(self) -> str:
        text = f"{self.counts['new']:,} new images"
        changed, gone = self.counts["changed"], self.counts["gone"]
        if changed or gone:
            text += (
                f"; {changed:,} changed and {gone:,} gone since they were listed"
                f" ({', '.join(map(repr, self.examples))}"
                + ", ..." * (changed + gone > len(self.examples))
                + f"): their rows stay as they are; {self.out / CHANGES_NAME} names them"
            )
        return text


def extend_run(plan: RunPlan, run: Run) -> tuple[Run, Changes]:
    """Add the new keys of the source to a run; it has then not finished.

    One command at a time: another one waits, then lists what has come since. Where nothing can be
    locked, the slower one uses the listing of the other. UsageError when the source has other
    columns than before, or lists a key twice.
    """

    def wait() -> None:
        plan.log(f"{plan.command}: waiting for another command that extends this output ...")

    with lock_run(run.out, wait):
        while True:
            run, run_id = read_again(run.out), secrets.token_hex(4)
            plan.check_run(run)  # again: the command that was waited for may have changed it
            run = plan.change_verdicts(run)
            try:
                return _extend(plan, run, run_id)
            except StorageError:
                remove_rows(run.manifest_folder / f"{FOLDER_PREFIX}{run_id}")
                if read_again(run.out).manifest == run.manifest:
                    raise  # else another command was first, and has removed what was listed here


def _extend(plan: RunPlan, run: Run, run_id: str) -> tuple[Run, Changes]:
    changes, folder, first = Changes(run.out), run.manifest_folder, run.manifest.num_shards
    with plan.list_rows(folder, run_id) as (listing, listed), tempfile.TemporaryFile() as spool:
        added = Listing(
            iter(()),
            left_out=listing.left_out,
            keeps_order=listing.keeps_order,
            key_column=listing.key_column,
        )
        new = ListedRows(listed.folder)
        if listing.keeps_order:
            if listed.shards is not None:
                listing.batches = (table.to_batches()[0] for table in listed.shards.read())
                listed = ListedRows(listed.folder)
            _spool(listing, listed, spool)
            is_new = np.zeros(listed.num_rows, bool)
        for table in _find_new(listed, listing.key_column, run, changes):
            if listing.keeps_order:
                is_new[table.column(PLACE).to_numpy()] = True
                continue
            for batch in table.to_batches():
                added.counts.add(batch)
                new.add(batch)
        plan.log_notes(listing)
        if not changes.counts["new"]:
            return run, changes
        size = plan.shard_rows
        if listing.keeps_order:
            added.batches = _read_new(spool, is_new)
            added.count_rows(describe=False)
            manifest = write_manifest(folder, run_id, added, size, first)
        else:
            manifest = deal_manifest(folder, run_id, added, new, size, first, plan.workers)
    whole = Manifest(
        (*run.manifest.files, *manifest.files),
        run.manifest.num_rows + manifest.num_rows,
        run.manifest.size_bytes + manifest.size_bytes,
    )
    counts = {
        name: dict(Counter(run.counts.get(name, {})) + Counter(values))
        for name, values in added.counts.to_dict().items()
    }
    record = read_record(run.out) | describe_listing(whole, added, counts)
    if is_finished(run):  # no shard has the verdicts of before
        record["earlier_identities"] = []
    if (there := read_again(run.out)).manifest != run.manifest:  # another process was first
        for file in manifest.files:
            discard(folder / file.name)
        return there, changes
    if lost := {file.name for file in manifest.files} - list_sizes(folder).keys():
        raise StorageError(
            f"{folder / min(lost)}: another command on this output has removed it; run the same"
            " command again, by one process at a time"
        )
    write_json(run.out / "_run.json", record | {"tool_version": __version__})
    extended = read_again(run.out)
    if not is_finished(extended):
        reopen_run(extended)
    return extended, changes


def _spool(listing: Listing, keys: ListedRows, spool: IO[bytes]) -> None:
    """Copy a listing to a file, in its order; add its keys, and where each of them stands."""
    writer, place = None, 0
    for batch in listing.batches:
        writer = writer or pa.ipc.new_stream(spool, batch.schema)
        writer.write_batch(batch)
        places = pa.array(np.arange(place, place + batch.num_rows))
        place += batch.num_rows
        schema = batch.schema.append(pa.field(PLACE, places.type))
        keys.add(pa.RecordBatch.from_arrays([*batch.columns, places], schema=schema))
    if writer is not None:
        writer.close()


def _find_new(
    listed: ListedRows, key_column: str | None, run: Run, changes: Changes
) -> Iterator[pa.Table]:
    """Yield the rows whose keys the run does not have; write what has changed or gone.

    Keys are compared a few buckets of their hash at a time.
    """
    known = ListedRows(listed.folder)
    for shard in range(run.manifest.num_shards):
        table = read_manifest_shard(run.manifest_folder, run.find_file(shard), shard)
        stamps = table.select(["key", "split", *STAMP_COLUMNS]).combine_chunks()
        known.add(stamps.to_batches()[0])
    sink = pa.BufferOutputStream()
    schema = pa.schema([pa.field("key", pa.string()), pa.field("change", pa.string())])
    counts, max_rows = listed.counts + known.counts, min(listed.max_rows, known.max_rows)
    with pq.ParquetWriter(sink, schema, compression="zstd") as differences:
        for some in divide_buckets(counts, max_rows):
            now, old = listed.read(some), known.read(some)
            now = table.schema.empty_table() if now is None else now
            old = stamps.schema.empty_table() if old is None else old
            if now.num_rows:
                check_unique(now, key_column)
                _check_columns(run, table.schema, now.schema)
            before = pc.index_in(now.column("key"), old.column("key"))
            found = {
                "changed": _find_changed(old, now, before),
                "gone": old.column("key").filter(
                    pc.invert(pc.is_in(old.column("key"), now.column("key")))
                ),
            }
            for change, keys in found.items():
                changes.counts[change] += len(keys)
                room = MAX_EXAMPLES - len(changes.examples)
                changes.examples += keys.slice(0, room).to_pylist()
                rows = [keys, pa.repeat(change, len(keys))]
                differences.write_table(pa.table(rows, schema=schema))
            new = now.filter(pc.is_null(before))
            changes.counts["new"] += new.num_rows
            if new.num_rows:
                yield new.remove_column(0)
    write_bytes(run.out / CHANGES_NAME, sink.getvalue().to_pybytes())


def _find_changed(old: pa.Table, new: pa.Table, before: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the keys whose size, time or etag is another, where both listings know it."""
    was_there = pc.is_valid(before)
    now = new.filter(was_there)
    then = old.take(before.filter(was_there))
    differs = pa.array(np.zeros(len(now), bool))
    for name in STAMP_COLUMNS:
        other = pc.fill_null(pc.not_equal(now.column(name), then.column(name)), False)
        differs = pc.or_(differs, other)
    return now.column("key").filter(differs)


def _check_columns(run: Run, before: pa.Schema, now: pa.Schema) -> None:
    """Raise UsageError when the source has other columns of its own than when it was listed."""
    known = {column.name for column in MANIFEST_FIELDS} | {HASH, PLACE}
    old, new = ({(f.name, str(f.type)) for f in s if f.name not in known} for s in (before, now))
    if old != new:
        names = ", ".join(f"{name} ({kind})" for name, kind in sorted(old ^ new))
        raise UsageError(
            f"{run.out}: the source has other columns than when it was first listed ({names});"
            " give it the same ones, or choose a new output folder"
        )


def _read_new(spool: IO[bytes], is_new: np.ndarray) -> Iterator[pa.RecordBatch]:
    spool.seek(0)
    start = 0
    for batch in pa.ipc.open_stream(spool):
        chosen = batch.filter(pa.array(is_new[start : start + batch.num_rows]))
        start += batch.num_rows
        if chosen.num_rows:
            yield chosen
