"""List a source by many workers: each lists some parts of it and writes their rows to files.

What was listed of some parts counts once its record is there, so a listing that is stopped goes on
where it was: the records say what is listed and what is left. The name of a record follows from its
parts, and the first one counts, so processes that list the same source at once do no harm.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, field
from operator import itemgetter
from typing import Any, Protocol, TypeVar

import numpy as np

from cifake_ray.core.labels import LabelReader
from cifake_ray.errors import SourceChanged, StorageError
from cifake_ray.storage.io.files import (
    create_bytes,
    hash_json,
    make_folder,
    parse_json,
    read_if_exists,
)
from cifake_ray.storage.io.paths import AnyPath
from cifake_ray.storage.io.records import parse_record
from cifake_ray.storage.runs.listed_rows import NUM_BUCKETS, ListedRows
from cifake_ray.storage.runs.listed_shards import ListedShards
from cifake_ray.storage.runs.row_files import RowFile
from cifake_ray.storage.sources.listing_counts import ListingCounts
from cifake_ray.storage.sources.source import MAX_NOTES, Listing, Part, Source
from cifake_ray.storage.sources.table_stamps import explain_change, stamp_again

Item = TypeVar("Item")
Result = TypeVar("Result")

PART_ROWS = 400_000  # after which a worker leaves the rest to others; below MAX_HELD_ROWS


class TaskPool(Protocol):
    """Where work on many items is done: here, in processes of this machine, or on a cluster."""

    @property
    def num_workers(self) -> int: ...

    def map_items(
        self, work: Callable[[Item], Result], items: deque[Item]
    ) -> Generator[Result, None, None]:
        """Yield what `work` returns for each item, in the order in which they are done.

        Both are pickled. Items may be appended while results are read. A CifakeError that `work`
        raises is raised here; ResourceError when an item ends its process again and again.
        """
        ...


class _ThisProcess:
    """Does all work here, one item after the other."""

    num_workers = 1

    def map_items(
        self, work: Callable[[Item], Result], items: deque[Item]
    ) -> Generator[Result, None, None]:
        while items:
            yield work(items.popleft())


THIS_PROCESS = _ThisProcess()


@dataclass(frozen=True)
class PartTask:
    """Parts that one worker lists, and into how many tasks what it leaves is divided."""

    parts: list[Part]
    num_tasks: int


@dataclass(frozen=True)
class PartRecord:
    """What was listed of some parts, in numbers, and what is left."""

    files: list[RowFile]
    rows: list[list[int]]  # by bucket and split
    size_bytes: int
    table_bytes: int
    left_out: dict[str, int]
    counts: dict[str, dict[str, int]]
    notes: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    key_column: str | None = None
    left: list[list[Any]] = field(default_factory=list)  # parts, by the task that lists them
    # Of a listing that keeps its order: its shards, and the first part that was listed.
    shards: list[RowFile] = field(default_factory=list)
    place: list[str] = field(default_factory=list)
    labels: list[list[Any]] = field(default_factory=list)  # of `LabelReader.to_record`
    columns: str = ""  # a hash of those of the listing
    stamps: dict[str, str] = field(default_factory=dict)  # of the tables that were read


@dataclass(frozen=True)
class PartLister:
    """Lists parts of a source into files in `folder`."""

    source: Source
    folder: AnyPath

    def list_parts(self, task: PartTask) -> PartRecord:
        listing = self.source.list_images(task.parts, PART_ROWS)
        # Of another process, or from before a kill.
        record = read_record(self.folder, task.parts, listing)
        if record is None:
            listing.count_rows(describe=False)
            rows = _hold_rows(self.folder, listing)
            for batch in listing.batches:
                rows.add(batch)
            record = write_record(task, listing, rows)
        return record


def list_rows(
    list_source: Callable[[], Listing],
    source: Source | None,
    folder: AnyPath,
    workers: TaskPool,
    log: Callable[[str], None],
    *,
    describe: bool,
) -> tuple[Listing, ListedRows]:
    """Return all rows of a source, and its listing, of which nothing is left.

    The workers list what `list_source` leaves, into files in `folder`. `describe` adds notes on
    what the images lack.
    """
    start = PartTask([], 2 * workers.num_workers)
    listing = list_source()
    record = read_record(folder, start.parts, listing)
    if record is None:
        rows = _hold_rows(folder, listing)
        for batch in listing.batches:
            rows.add(batch)
        if not listing.left:
            return listing, rows
        record = write_record(start, listing, rows)
    else:
        log(f"going on with a listing that was stopped; to start again, remove {folder}")
    assert source is not None  # else nothing would have been left
    if record.columns not in ("", hash_json(listing.columns)):
        raise SourceChanged(
            "the source has other columns than when its listing began; run the same command again"
            " to list anew"
        )
    rows = _hold_rows(folder, listing)
    listing = Listing(
        iter(()),
        keeps_order=listing.keeps_order,
        labels=listing.labels,
        conclude=listing.conclude,
    )
    if listing.labels:
        listing.labels.counts.clear()  # those of the record follow
    items, places = deque[PartTask](), [(record.place, record.shards)]
    _add_record(record, listing, rows, items, workers)
    for record in workers.map_items(PartLister(source, folder).list_parts, items):
        _add_record(record, listing, rows, items, workers)
        places.append((record.place, record.shards))
        log(f"listing, {rows.num_rows:,} keys ...")
    if rows.shards is not None:
        places.sort(key=itemgetter(0))
        rows.shards.files = [file for _, files in places for file in files]
    listing.conclude(listing)
    if describe:
        listing.describe_counts()
    log(f"listed {rows.num_rows:,} keys; dealing them to shards ...")
    return listing, rows


def _hold_rows(folder: AnyPath, listing: Listing) -> ListedRows:
    return ListedRows(folder, shards=ListedShards(folder) if listing.keeps_order else None)


def _add_record(
    record: PartRecord,
    listing: Listing,
    rows: ListedRows,
    items: deque[PartTask],
    workers: TaskPool,
) -> None:
    rows.files += record.files
    rows.counts += np.array(record.rows)
    rows.size_bytes += record.size_bytes
    rows.table_bytes += record.table_bytes
    listing.left_out.update(record.left_out)
    listing.counts.merge(record.counts)
    if listing.labels:
        listing.labels.merge(record.labels)
    new = [note for note in record.notes if note not in listing.notes]
    listing.notes += new[: 2 * MAX_NOTES - len(listing.notes)]
    listing.tables = [*listing.tables, *record.tables][:MAX_NOTES]
    listing.key_column = listing.key_column or record.key_column
    for parts in record.left:
        # While workers wait, what is left is divided; else files would be many and small.
        num_tasks = max(1, 2 * workers.num_workers - len(items))
        items.append(PartTask([p if isinstance(p, str) else tuple(p) for p in parts], num_tasks))


def write_record(task: PartTask, listing: Listing, rows: ListedRows) -> PartRecord:
    """Commit what was listed of some parts, unless another process has; return what counts."""
    make_folder(rows.folder, parents=False)
    rows.write()
    record = PartRecord(
        files=rows.files,
        rows=rows.counts.tolist(),
        size_bytes=rows.size_bytes,
        table_bytes=rows.table_bytes,
        left_out=dict(listing.left_out),
        counts=listing.counts.to_record(),
        notes=listing.notes,
        tables=listing.tables,
        key_column=listing.key_column,
        left=_divide(listing.left, task.num_tasks),
        shards=rows.shards.files if rows.shards else [],
        place=[*task.parts[0]] if rows.shards and task.parts else [],
        labels=listing.labels.to_record() if listing.labels else [],
        columns=hash_json(listing.columns),
        stamps=listing.stamps,
    )
    if create_bytes(_name_record(rows.folder, task.parts), json.dumps(asdict(record)).encode()):
        return record
    there = read_record(rows.folder, task.parts, listing)
    if there is None:
        raise StorageError(f"{rows.folder}: its files are gone; run the same command again")
    return there


def read_record(folder: AnyPath, parts: Sequence[Part], listing: Listing) -> PartRecord | None:
    """Return what was listed of some parts; None if it was not.

    StorageError when damaged; SourceChanged for a table that has changed or is gone. `listing` is
    one of the same source.
    """
    path = _name_record(folder, parts)
    if (data := read_if_exists(path)) is None:
        return None
    try:
        record = parse_record(PartRecord, parse_json(path, data))
        if np.shape(record.rows) != ListedRows(folder).counts.shape:
            raise ValueError(f"{np.shape(record.rows)} counts of rows")
        if any(len(file.ends) != NUM_BUCKETS for file in record.files):
            raise ValueError(f"rows that are not in {NUM_BUCKETS} buckets")
        ListingCounts().merge(record.counts)
        LabelReader("").merge(record.labels)
        names = [name for parts in record.left for part in parts for name in _list_names(part)]
        if not all(isinstance(name, str) for name in names):
            raise ValueError("parts that are no names")
    except ValueError as error:
        raise StorageError(
            f"{path}: not a record of a listing ({error}); remove the folder and run the same"
            " command again"
        ) from error
    for name, stamp in record.stamps.items():
        assert listing.find_table is not None
        if stamp_again(path := listing.find_table(name)) != stamp:
            raise explain_change(path)
    return record


def _list_names(part: object) -> list[object]:
    return part if isinstance(part, list) else [part]


def _name_record(folder: AnyPath, parts: Sequence[Part]) -> AnyPath:
    return folder / f"{hash_json(list(parts))[:32]}.json"


def _divide(parts: Sequence[Part], num_groups: int) -> list[list[Part]]:
    """Divide parts into so many groups, or fewer, of neighbours."""
    size = -(-len(parts) // num_groups) or 1
    return [list(parts[start : start + size]) for start in range(0, len(parts), size)]
