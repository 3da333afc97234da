"""Extend a run: list its source again, and add the keys that are new as new shards.

The manifest is append-only. New files are written beside those that are there, and count once
`_run.json`, which is replaced in one step, names them. Rows that exist are never touched.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field

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
from cifake_ray.storage.runs.listed_shards import ListedShards
from cifake_ray.storage.runs.manifest import Manifest, deal_manifest, read_manifest_shard
from cifake_ray.storage.runs.row_files import HASH
from cifake_ray.storage.runs.run import (
    Run,
    is_finished,
    read_again,
    read_record,
    reopen_run,
)
from cifake_ray.storage.runs.run_plan import RunPlan, describe_listing
from cifake_ray.storage.sources.listing_counts import add_counts
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


def extend_run(plan: RunPlan) -> tuple[Run, Changes]:
    """Add the new keys of the source to the run, and change its verdicts; it has then not finished.

    One command at a time: another one waits, then lists what has come since. Where nothing can be
    locked, the slower one lists again. UsageError when the source has other
    columns than before, or lists a key twice; RunMismatch when the other command has changed the
    verdicts and not finished.
    """
    with plan.lock():
        while True:
            run, run_id = plan.find_again(), secrets.token_hex(4)
            try:
                if (extended := _extend(plan, run, run_id)) is not None:
                    return extended
            except StorageError:
                remove_rows(run.manifest_folder / f"{FOLDER_PREFIX}{run_id}")
                if read_again(run.out).manifest == run.manifest:
                    raise  # else another command was first, and has removed what was listed here


def _extend(plan: RunPlan, run: Run, run_id: str) -> tuple[Run, Changes] | None:
    """List and add what is new; None, with nothing added, if another process was first."""
    changes, folder, first = Changes(run.out), run.manifest_folder, run.manifest.num_shards
    with plan.list_rows(folder, run_id) as (listing, listed):
        added = Listing(iter(()), left_out=listing.left_out, key_column=listing.key_column)
        new = ListedRows(listed.folder)
        find = _find_new
        if listed.shards is not None:
            new.shards, find = ListedShards(listed.folder), _find_new_in_order
        for table in find(listed, listing.key_column, run, changes):
            for batch in table.to_batches():
                added.counts.add(batch)
                new.add(batch)
        plan.log_notes(listing)
        if not changes.counts["new"]:
            return plan.change_verdicts(plan.find_again()), changes
        size = plan.shard_rows
        manifest = deal_manifest(folder, run_id, added, new, size, first, plan.workers)
    whole = Manifest(
        (*run.manifest.files, *manifest.files),
        run.manifest.num_rows + manifest.num_rows,
        run.manifest.size_bytes + manifest.size_bytes,
    )
    counts = add_counts(
        (run.counts, run.manifest.num_rows), (added.counts.to_dict(), manifest.num_rows)
    )
    described = describe_listing(whole, added, counts)
    if (there := read_again(run.out)).manifest != run.manifest:
        for file in manifest.files:
            discard(folder / file.name)
        return None
    if lost := {file.name for file in manifest.files} - list_sizes(folder).keys():
        raise StorageError(
            f"{folder / min(lost)}: another command on this output has removed it; run the same"
            " command again, by one process at a time"
        )
    plan.check_run(there)  # the listing took its time
    run = plan.change_verdicts(there)
    record = read_record(run.out) | described
    if is_finished(run):  # no shard has the verdicts of before
        record["earlier_identities"] = []
    write_json(run.out / "_run.json", record | {"tool_version": __version__})
    extended = read_again(run.out)
    if not is_finished(extended):
        reopen_run(extended)
    return extended, changes


def _find_new_in_order(
    listed: ListedRows, key_column: str | None, run: Run, changes: Changes
) -> Iterator[pa.Table]:
    """Yield what is new of each shard of a listing that keeps its order."""
    assert listed.shards is not None
    keys, place = ListedRows(listed.folder), 0
    for table in listed.shards.read():
        places = pa.array(np.arange(place, place + table.num_rows))
        place += table.num_rows
        keys.add(table.append_column(PLACE, places).to_batches()[0])
    is_new = np.zeros(place, bool)
    for table in _find_new(keys, key_column, run, changes):
        is_new[table.column(PLACE).to_numpy()] = True
    place = 0
    for table in listed.shards.read():
        chosen = table.filter(pa.array(is_new[place : place + table.num_rows]))
        place += table.num_rows
        if chosen.num_rows:
            yield chosen.combine_chunks()


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
