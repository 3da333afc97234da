"""What every kind of source promises: how images are listed and read."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase, translate
from functools import lru_cache
from itertools import islice
from typing import Any, Protocol, TypeAlias

import pyarrow as pa

from cifake_ray.core.labels import LabelReader, PathLabels, read_path
from cifake_ray.errors import ImageError, StorageError
from cifake_ray.storage.io.paths import AnyPath
from cifake_ray.storage.sources.clutter import METADATA_NAMES, find_clutter, is_system_folder
from cifake_ray.storage.sources.listing_counts import UNLABELLED, ListingCounts

LISTING_BATCH_ROWS = 16_384
MIN_SHARD_ROWS, MAX_SHARD_ROWS = 1_024, 16_384  # images in a shard, unless --shard-size says
MAX_SHARD_BYTES = 256 * 2**20
MAX_NOTES = 5
NOT_AUDITED = "not in the audit"  # why `convert --audit` leaves a file out
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")
# A part of what a source lists, which may be written as JSON: what it means is the source's own.
Part: TypeAlias = str | tuple[str, ...]
_WILDCARD = re.compile(r"[*?[]")


@dataclass
class Listing:
    """What a source lists.

    `batches` is read once. `left_out` counts, by reason, the entries that are no rows; it is
    complete when `batches` is exhausted. Rows of a source that `keeps_order` stay in the order and
    the batches that it gives (a batch is a shard); all others may be dealt to shards.
    """

    batches: Iterator[pa.RecordBatch]
    left_out: Counter[str] = field(default_factory=Counter)
    keeps_order: bool = False
    columns: str = ""  # that all parts must have, where they follow from the whole source
    notes: list[str] = field(default_factory=list)  # for a person to read; complete likewise
    key_column: str | None = None  # where the keys are from, if from a column
    counts: ListingCounts = field(default_factory=ListingCounts)  # of `count_rows`
    tables: list[str] = field(default_factory=list)  # left out, the first few: may hold labels
    left: list[Part] = field(default_factory=list)  # not listed, see `Source`; complete likewise
    labels: LabelReader | None = None  # of a column of labels; complete likewise
    stamps: dict[str, str] = field(default_factory=dict)  # of the tables that were read, by name
    find_table: Callable[[str], AnyPath] | None = None  # by its name in `stamps`
    # Check and describe what the whole column of labels was taken for. A source that leaves nothing
    # calls it itself, else whoever lists what is left.
    conclude: Callable[[Listing], None] = lambda listing: None

    def add_note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    def leave_out(self, key: str, reason: str) -> None:
        """Count a file of a store that is no row, and say if it describes the others."""
        name = key.rpartition("/")[2]
        if name in METADATA_NAMES and len(self.notes) < MAX_NOTES:
            self.notes.append(f"{key} is not read beside images in a store: give it as the source")
        self.leave_out_file(key, reason)

    def leave_out_file(self, key: str, reason: str) -> None:
        """Count a file that is no row, and keep in mind if it may describe the others."""
        self.left_out[reason] += 1
        name = key.rpartition("/")[2].lower()
        is_table = name.removesuffix(".gz").endswith(TABLE_SUFFIXES) and name not in METADATA_NAMES
        if reason == "sidecar" and is_table and len(self.tables) < MAX_NOTES:
            self.tables.append(key)

    def leave_out_folder(self, folder: str, error: OSError) -> None:
        """Count a folder that cannot be listed, and name the first few."""
        self.left_out["unreadable folder"] += 1
        if self.left_out["unreadable folder"] <= MAX_NOTES:
            name = escape_key(folder) or folder
            name = name if len(name) <= 100 else f"{name[:60]}...{name[-37:]}"
            reason = error.strerror or type(error).__name__
            self.notes.append(f"left out the folder {name}: {reason}")

    def explain_empty(self) -> str:
        """Return why nothing is listed, once `batches` is exhausted."""
        reasons = ", ".join(f"{n} {reason}" for reason, n in self.left_out.items() if n)
        left_out = f" (left out: {reasons})" if reasons else ""
        if self.left_out[NOT_AUDITED]:
            return f"no file of the source is in the audit{left_out}; give --audit its own"
        return f"the source holds no file{left_out}; check the path, --include and --exclude"

    def change_batches(
        self, change: Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]
    ) -> None:
        """Put a generator between the source and whoever reads the batches."""
        self.batches = change(self.batches)

    def count_rows(self, *, describe: bool) -> None:
        """Fill `counts` while the batches are read; `describe` adds notes on what they lack."""

        def count(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            for batch in batches:
                self.counts.add(batch)
                yield batch
            if describe and not self.left:
                self.describe_counts()

        self.change_batches(count)

    def describe_counts(self) -> None:
        """Add notes on what the images lack, once all are counted."""
        self.notes.extend(self.counts.describe_unused())
        if self.tables and self.counts.labels[UNLABELLED]:
            self.notes.append(
                f"{', '.join(self.tables)}: beside the images, and not read; give it as the source"
                " if it has their paths and labels"
            )


class Source(Protocol):
    """Where images come from. `tests/storage/sources/test_conformance.py` tests these promises.

    A source pickles at any time, without credentials, open files or connections: a worker gets it
    with rows of the manifest and reads there. Memory does not grow with the number of images, but
    fsspec lists one folder at once, and Parquet reads one row group at once.
    """

    def list_images(
        self, parts: Sequence[Part] | None = None, max_rows: int | None = None
    ) -> Listing:
        """List every image once: columns of `MANIFEST_FIELDS`, then the source's own.

        No image is read. `size_bytes` and `mtime_ns` or `etag` are what the store says, null where
        it does not. A key that is not valid UTF-8 is a row with the error `bad_key` and no
        location. StorageError, here or while iterating, when the root, a folder of a store or a
        page cannot be listed. Nothing is left out in silence: what is no row is in `left_out`.
        UsageError for a list that is wrong.

        A source that can be divided lists only `parts`, if any are given, each of them from the
        `left` of a listing (or as JSON gives that back), and goes no further once about `max_rows`
        rows were listed: the parts that are then not listed are in `left`. Listing what is left,
        and what that leaves, lists every image exactly once, in whatever processes and whatever
        order. Each listing counts what itself left out. Sorted parts of a source that keeps its
        order are in that order. Other sources list all and leave nothing.
        """
        ...

    def read_images(self, rows: pa.Table) -> Iterator[bytes | ImageError]:
        """Yield one result for each row of the manifest, in the order of the rows.

        A result is the bytes of the image if it still has the listed size and stamp, else an
        ImageError (`not_found`, `changed`, `denied`, `too_large`, ...) for that row alone; above
        MAX_IMAGE_BYTES nothing is fetched where the size is known. StorageError only for what
        fails for all rows, such as missing credentials or a damaged Parquet file. Rows may be read
        ahead on threads, a bounded number of bytes; closing the iterator stops them. One thread
        iterates; several iterators of one source are independent.
        """
        ...


def batch_rows(
    rows: Iterable[Sequence[Any]], schema: pa.Schema, max_rows: int | None = None
) -> Iterator[pa.RecordBatch]:
    """Yield rows of Python values as record batches of LISTING_BATCH_ROWS; none when empty."""
    rows = iter(rows)
    while chunk := list(islice(rows, max_rows or LISTING_BATCH_ROWS)):
        columns = zip(*chunk, strict=True)
        arrays = [pa.array(column, f.type) for column, f in zip(columns, schema, strict=True)]
        yield pa.RecordBatch.from_arrays(arrays, schema=schema)


def make_label_reader(class_names: dict[str, int]) -> Callable[[str], PathLabels]:
    """Return a function that reads label, split and source from a path like `train/FAKE/sdxl`."""

    @lru_cache(maxsize=1024)  # neighbours lie in the same folder
    def read(folder: str) -> PathLabels:
        return read_path([name for name in folder.split("/") if name not in ("", ".")], class_names)

    return read


@dataclass(frozen=True)
class KeyFilter:
    """Keep the keys that match a glob of `include` (if any) and none of `exclude`.

    A glob that matches a folder matches all that is below it.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def keeps(self, key: str) -> bool:
        if self.include and not _compile(self.include).match(key):
            return False
        return not (self.exclude and _compile(self.exclude).match(key))

    def find_reason(self, key: str) -> str | None:
        """Return why a file of a folder or bucket is no row, or None: a filter, or clutter.

        Clutter is kept if a glob of `include` asks for it, which is when the glob itself would be
        clutter: `*.txt` and `*/.git/*` are, `*` and `*.jpg` are not.
        """
        if not self.keeps(key):
            return "excluded"
        if (reason := find_clutter(key)) is None:
            return None
        if any(
            find_clutter(glob) == reason and fnmatchcase(key, glob)
            for glob in _add_folders(self.include)
        ):
            return None
        return reason

    def find_folder_reason(self, folder: str) -> str | None:
        """Return why nothing below `folder`, which ends with `/`, can be a row; None if it can."""
        globs = _add_folders(self.exclude)
        if any(glob.endswith("*") and fnmatchcase(folder, glob) for glob in globs):
            return "excluded folder"
        asked = [glob for glob in _add_folders(self.include) if _may_match_below(glob, folder)]
        if self.include and not asked:
            return "excluded folder"
        if is_system_folder(folder) and not any(is_system_folder(glob) for glob in asked):
            return "system folder"
        return None


@lru_cache(maxsize=16)
def _add_folders(globs: tuple[str, ...]) -> tuple[str, ...]:
    return (*globs, *(f"{glob.rstrip('/')}/*" for glob in globs if not glob.endswith("*")))


@lru_cache(maxsize=16)
def _compile(globs: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(translate, _add_folders(globs))))


@lru_cache(maxsize=1024)
def _may_match_below(glob: str, folder: str) -> bool:
    """Return False if no path below a folder can match: the two differ before any wildcard."""
    literal = _WILDCARD.split(glob, maxsplit=1)[0]
    return literal.startswith(folder) or folder.startswith(literal)


KEEP_ALL = KeyFilter()


def check_locations(rows: pa.Table, lies_within: Callable[[str], bool]) -> None:
    """Raise StorageError when a row of the manifest names what no listing of the source gives.

    The manifest is a file of the output, and whoever made that may have named any file or object.
    """
    for location in rows.column("location").drop_null().to_pylist():
        if not lies_within(location):
            raise StorageError(
                f"the manifest names {location!r}, which is not in the source; it was edited: start"
                " again in a new folder"
            )


def climbs(path: str) -> bool:
    """Return whether a path may lead out of the folder that it is relative to."""
    return path.startswith("/") or ".." in path.split("/")


def escape_key(name: str) -> str | None:
    """Return a name with its undecodable bytes as `\\xNN`; None when it is valid UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return os.fsencode(name).decode("utf-8", "backslashreplace")
    return None
