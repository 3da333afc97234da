"""What every kind of source promises: how images are listed and read."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache
from itertools import islice
from typing import Any, Protocol

import pyarrow as pa

from cifake_ray.core.labels import PathLabels, read_path
from cifake_ray.errors import ImageError

LISTING_BATCH_ROWS = 16_384
MIN_SHARD_ROWS, MAX_SHARD_ROWS = 1_024, 16_384  # images in a shard, unless --shard-size says
MAX_SHARD_BYTES = 256 * 2**20


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
    notes: list[str] = field(default_factory=list)  # for a person to read; complete likewise
    key_column: str | None = None  # where the keys are from, if from a column


class Source(Protocol):
    """Where images come from. `tests/storage/sources/test_conformance.py` tests these promises.

    A source pickles at any time, without credentials, open files or connections: a worker gets it
    with rows of the manifest and reads there. Memory does not grow with the number of images, but
    fsspec lists one folder at once, and Parquet reads one row group at once.
    """

    def list_images(self) -> Listing:
        """List every image once: columns of `MANIFEST_FIELDS`, then the source's own.

        Nothing that is listed is read. `size_bytes` and `mtime_ns` or `etag` are what the store
        says, null where it does not. A key that is not valid UTF-8 is a row with the error
        `bad_key` and no location. StorageError, here or while iterating, when a folder or page
        cannot be listed: nothing is left out in silence. UsageError for a list that is wrong.
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


def batch_rows(rows: Iterable[Sequence[Any]], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Yield rows of Python values as record batches of LISTING_BATCH_ROWS; none when empty."""
    rows = iter(rows)
    while chunk := list(islice(rows, LISTING_BATCH_ROWS)):
        columns = zip(*chunk, strict=True)
        arrays = [pa.array(column, f.type) for column, f in zip(columns, schema, strict=True)]
        yield pa.RecordBatch.from_arrays(arrays, schema=schema)


def make_label_reader(class_names: dict[str, int]) -> Callable[[str], PathLabels]:
    """Return a function that reads label, split and source from a path like `train/FAKE/sdxl`."""

    @lru_cache(maxsize=1024)  # neighbours lie in the same folder
    def read(folder: str) -> PathLabels:
        return read_path([name for name in folder.split("/") if name], class_names)

    return read


@dataclass(frozen=True)
class KeyFilter:
    """Keep the keys that match a glob of `include` (if any) and none of `exclude`."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def keeps(self, key: str) -> bool:
        if self.include and not any(fnmatchcase(key, glob) for glob in self.include):
            return False
        return not any(fnmatchcase(key, glob) for glob in self.exclude)


KEEP_ALL = KeyFilter()


def escape_key(name: str) -> str | None:
    """Return a name with its undecodable bytes as `\\xNN`; None when it is valid UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return os.fsencode(name).decode("utf-8", "backslashreplace")
    return None
