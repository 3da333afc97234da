"""The images of Parquet files: our shards, or any data set with a column of images.

Files keep their order and rows stay in their file, so that reads are sequential:
one output shard covers neighbouring row groups of one file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby, pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cifake_ray.core.labels import LabelReader
from cifake_ray.errors import ImageError, StorageError, UsageError
from cifake_ray.storage.io.files import exists, find_files, is_file
from cifake_ray.storage.io.paths import AnyPath
from cifake_ray.storage.sources.columns import (
    ColumnChoice,
    describe_type,
)
from cifake_ray.storage.sources.held_images import HeldImages
from cifake_ray.storage.sources.image_table import (
    ImageColumn,
    ImageTable,
    find_image_column,
    open_parquet,
)
from cifake_ray.storage.sources.parquet_schema import REPLACED_COLUMNS, choose_schema
from cifake_ray.storage.sources.source import (
    KEEP_ALL,
    MAX_SHARD_BYTES,
    MIN_SHARD_ROWS,
    KeyFilter,
    Listing,
    Part,
    check_locations,
    climbs,
)
from cifake_ray.storage.sources.table_stamps import explain_change, stamp_again

PART_SHARDS = 16  # of a file, which a worker lists at once
HINT_CONVERT = "`cifake-ray convert` has these options"


def is_table_name(path: str) -> bool:
    """Return whether a relative path is that of a Parquet file, neither hidden nor set aside."""
    hidden = any(name.startswith((".", "_")) for name in path.split("/"))
    return path.lower().endswith(".parquet") and not hidden


def find_tables(root: AnyPath, left_out: Counter[str] | None = None) -> list[AnyPath]:
    """Return the Parquet files of convert's output, its `shards/`, any folder, or one file.

    Count other files that are not hidden in `left_out`.
    """
    if is_file(root):
        return [root]
    folder = root / "shards" if exists(root / "_run.json") else root
    names = find_files(folder)
    tables = sorted(folder / name for name in names if is_table_name(name))
    if not tables:
        raise StorageError(f"{folder}: no Parquet files; give the output of convert")
    if left_out is not None and folder is root:
        visible = [n for n in names if not any(p.startswith((".", "_")) for p in n.split("/"))]
        left_out += Counter({"not Parquet": len(visible) - len(tables)})
    return tables


def name_table(path: AnyPath, root: AnyPath) -> str:
    """Return the path of a file below the root; its name when it is the root itself."""
    if path == root:
        return path.name
    if isinstance(path, Path):
        return path.relative_to(str(root)).as_posix()
    return str(path).removeprefix(str(root).rstrip("/") + "/")


def locate_table(root: AnyPath, name: str) -> AnyPath:
    """Return the path of the file that `name_table` has named."""
    return root if name == root.name and is_file(root) else root / name


def choose_image_column(root: AnyPath, choice: ColumnChoice) -> ImageColumn:
    """Return the column of images of a data set: that of its first file which has one.

    StorageError when no file has one; UsageError when it is not the one that is named.
    """
    paths = find_tables(root)
    for path in paths:
        if (found := find_image_column(path, choice)) is not None:
            return found
    with open_parquet(paths[0]) as table:
        fields = (f"{f.name} ({describe_type(f.type)})" for f in table.schema_arrow)
        names = ", ".join(fields) or "none"
    if choice.image is not None:
        raise UsageError(f"{root}: --image-column {choice.image}: no such column, only {names}")
    raise StorageError(
        f"{paths[0]}: no column with images, only {names}; --image-column names one of images,"
        " --path-column one of their paths"
    )


def choose_columns(root: AnyPath) -> ColumnChoice:
    """Return the columns of a data set that `train` reads without options.

    UsageError when its images are not in its files.
    """
    column = choose_image_column(root, ColumnChoice())
    if column.content == "paths":
        raise UsageError(
            f"{root}: the column {column.name!r} holds paths, no images; `cifake-ray convert` reads"
            " them"
        )
    return ColumnChoice(image=column.name)


def open_tables(
    root: AnyPath, choice: ColumnChoice, left_out: Counter[str] | None = None
) -> Iterator[ImageTable]:
    """Yield the files with images, each open until the next; count the others in `left_out`."""
    for path in find_tables(root, left_out):
        with ImageTable(path, name_table(path, root), choice) as table:
            if table.has_images:
                yield table
            elif left_out is not None:
                left_out["Parquet without images"] += 1


def find_splits(root: AnyPath, choice: ColumnChoice | None = None) -> set[str]:
    """Return the splits that occur in Parquet files with images."""
    choice = replace(choice or choose_columns(root), drop=("label", "source"))
    splits: set[str | None] = set()
    for table in open_tables(root, choice):
        splits |= set(table.read_facts(list(range(table.file.num_row_groups))).splits)
    return {split for split in splits if split is not None}


@dataclass
class ParquetSource:
    """Parquet files with images inside."""

    root: AnyPath
    choice: ColumnChoice = field(default_factory=ColumnChoice)
    split: str | None = None  # only rows of this split
    labelled: bool = False  # only rows with a label
    needs_labels: bool = False  # a label column of which nothing is understood is an error
    key_filter: KeyFilter = KEEP_ALL
    min_shard_rows: int | None = None
    _held: HeldImages | None = field(default=None, init=False, repr=False)
    # Of the manifest. It needs all footers; workers that list parts get it with the source.
    _schema: pa.Schema | None = field(default=None, init=False, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the row group in memory: the process that unpickles this reads its own."""
        return {**self.__dict__, "_held": None}

    def list_images(
        self, parts: Sequence[Part] | None = None, max_rows: int | None = None
    ) -> Listing:
        """List the images, or those of `parts`: files, or PART_SHARDS shards of one.

        Sorted parts are in the order of the listing.
        """
        labels = LabelReader(self.choice.label, self.choice.class_names)
        listing = Listing(iter(()), keeps_order=True, labels=labels)
        listing.conclude = self._conclude
        listing.find_table = partial(locate_table, self.root)
        if parts is None or self._schema is None:
            paths = {name_table(path, self.root): path for path in find_tables(self.root)}
            schema, notes = choose_schema(self.root, paths, self.choice, self.needs_labels)
            self._schema = schema
            listing.notes += notes if parts is None else []
        listing.columns = str(self._schema)
        listing.batches = self._list_batches(listing, labels, self._schema, parts, max_rows)
        return listing

    def _conclude(self, listing: Listing) -> None:
        assert listing.labels is not None
        if self.needs_labels or self.labelled:
            remedy = f"--drop-columns {self.choice.label} converts without labels"
            listing.labels.check(self.root, remedy if self.needs_labels else HINT_CONVERT)
        if listing.labels.counts:
            listing.notes.append(listing.labels.describe())

    def _list_batches(
        self,
        listing: Listing,
        labels: LabelReader,
        schema: pa.Schema,
        parts: Sequence[Part] | None,
        max_rows: int | None,
    ) -> Iterator[pa.RecordBatch]:
        num_listed = 0

        def is_full() -> bool:
            return max_rows is not None and num_listed >= max_rows

        given = self._name_files(listing) if parts is None else map(tuple, parts)
        for place, some in groupby(given, itemgetter(0, 1)):
            of_file = list(some)
            if is_full():
                listing.left += of_file
                continue
            number, name = place
            path = locate_table(self.root, name)
            stamp = listing.stamps[name] = stamp_again(path)
            if any(rest and rest[2] != stamp for _, _, *rest in of_file):
                raise explain_change(path)
            with ImageTable(path, name, self.choice) as table:
                if not table.has_images:
                    listing.left_out["Parquet without images"] += 1
                    continue
                if "key" in table.columns:
                    listing.key_column = "key"
                shards = [*self._group_rows(table)]
                ends = [*range(0, len(shards), PART_SHARDS), len(shards)]
                ranges = [(int(rest[0]), int(rest[1])) for _, _, *rest in of_file if rest]
                for start, stop in ranges or pairwise(ends):
                    if is_full():
                        listing.left.append((number, name, f"{start:09d}", str(stop), stamp))
                        continue
                    for first_row, groups in shards[start:stop]:
                        batch, num_rows = self._read_rows(table, groups, first_row, schema, labels)
                        listing.left_out += Counter({"excluded": num_rows - batch.num_rows})
                        num_listed += batch.num_rows
                        if batch.num_rows:
                            yield batch
        if parts is None and not listing.left:
            self._conclude(listing)

    def _name_files(self, listing: Listing) -> list[tuple[str, str]]:
        paths = find_tables(self.root, listing.left_out)
        return [(f"{n:09d}", name_table(path, self.root)) for n, path in enumerate(paths)]

    def _group_rows(self, table: ImageTable) -> Iterator[tuple[int, list[int]]]:
        """Yield neighbouring row groups, together at least a shard by their rows or their bytes.

        Before them comes the number of their first row in the file.
        """
        groups: list[int] = []
        first_row = num_rows = size_bytes = 0
        for group in range(table.file.num_row_groups):
            groups.append(group)
            num_rows += table.file.metadata.row_group(group).num_rows
            size_bytes += table.file.metadata.row_group(group).total_byte_size
            if num_rows >= (self.min_shard_rows or MIN_SHARD_ROWS) or size_bytes >= MAX_SHARD_BYTES:
                yield first_row, groups
                first_row += num_rows
                groups, num_rows, size_bytes = [], 0, 0
        if groups:
            yield first_row, groups

    def _read_rows(
        self,
        table: ImageTable,
        groups: list[int],
        start: int,
        schema: pa.Schema,
        labels: LabelReader,
    ) -> tuple[pa.RecordBatch, int]:
        """Return the rows of some row groups that are chosen, and the number of all of them."""
        if table.is_ours:  # what its labels mean is known
            labels = LabelReader(self.choice.label, self.choice.class_names)
        extra = [f.name for f in schema if f.name not in REPLACED_COLUMNS]
        names = [name for name in ("key", *extra) if name in table.columns]
        stop = start + sum(table.file.metadata.row_group(g).num_rows for g in groups)
        rows = table.read(groups, names) if names else None
        keys = self._read_keys(table, rows, range(start, stop))
        facts = table.read_facts(groups)
        chosen = [
            self.key_filter.keeps(key) and self.split in (None, split)
            for key, split in zip(keys, facts.splits, strict=True)
        ]
        values = [value for value, is_chosen in zip(facts.labels, chosen, strict=True) if is_chosen]
        understood = iter(table.understand_labels(values, labels))
        read_labels = [next(understood) if is_chosen else None for is_chosen in chosen]
        columns: dict[str, Any] = {
            "key": keys,
            "location": [table.name] * len(keys),
            "row": range(start, stop),
            "etag": [table.stamp] * len(keys),
            "label": read_labels,
            "split": facts.splits,
            "source": facts.sources,
        }
        arrays = []
        for column in schema:
            if column.name in columns:
                arrays.append(pa.array(columns[column.name], column.type))
            elif rows is not None and column.name in names:
                arrays.append(_take_column(table.path, rows, column))
            else:
                arrays.append(pa.nulls(len(keys), column.type))
        batch = pa.RecordBatch.from_arrays(arrays, schema=schema)
        batch = batch.filter(pa.array(chosen, pa.bool_()))
        if self.labelled:
            batch = batch.filter(pc.is_valid(batch.column("label")))
        return batch, len(keys)

    def _read_keys(self, table: ImageTable, rows: pa.Table | None, numbers: range) -> list[str]:
        """Return the keys of some rows; UsageError for a row without one."""
        if rows is None or "key" not in rows.column_names:
            return [f"{table.name}#{number}" for number in numbers]
        keys = []
        for number, key in zip(numbers, table.read_text(rows, "key"), strict=True):
            if not key:
                raise UsageError(
                    f"{table.path}, row {number}: the column 'key' is empty; --drop-columns key"
                    " numbers the rows instead"
                )
            keys.append(key)
        return keys

    def read_images(self, rows: pa.Table) -> Iterator[bytes | ImageError]:
        check_locations(rows, lambda path: not climbs(path))
        opened = None
        places = (rows.column(name).to_pylist() for name in ("location", "row", "etag"))
        with ExitStack() as stack:  # one file is open, and only while this is read
            for location, row, listed in zip(*places, strict=True):
                if self._held is None or not self._held.covers(location, row, listed):
                    if location != opened:
                        stack.close()
                        path = locate_table(self.root, location)
                        table = stack.enter_context(ImageTable(path, location, self.choice))
                        opened = location
                    # Runs of earlier versions have listed no stamp.
                    if listed not in (None, table.stamp) or row >= table.file.metadata.num_rows:
                        yield ImageError("changed", f"{location} changed after it was listed")
                        continue
                    self._held = table.hold_images(row)
                yield self._held.get_image(row)


def _take_column(path: AnyPath, rows: pa.Table, column: pa.Field) -> pa.Array:
    """Return a column in its type in the manifest. StorageError, with its name, if it is not."""
    try:
        values = rows.column(column.name).cast(column.type).combine_chunks()
    except pa.ArrowException as error:
        raise StorageError(
            f"{path}: the column {column.name!r} cannot be carried along ({error}); leave it out"
            f" with --drop-columns {column.name}"
        ) from error
    if not isinstance(values, pa.Array):
        raise StorageError(
            f"{path}: the column {column.name!r} has over 2 GiB in a shard; leave it out with"
            f" --drop-columns {column.name}, or give a smaller --shard-size"
        )
    return values
