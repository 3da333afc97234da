"""What every kind of source gives: record batches of `MANIFEST_FIELDS`, and bytes or an error.

Listing gives record batches (plus the extra columns of a list); reading gives the
bytes, or the ImageError that becomes the row of that key.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Protocol

import pyarrow as pa

from cifake_ray.errors import ImageError

LISTING_BATCH_ROWS = 16_384
MIN_SHARD_ROWS, MAX_SHARD_ROWS = 1_024, 16_384  # images in a shard, unless --shard-size says
MAX_SHARD_BYTES = 256 * 2**20


@dataclass
class Listing:
    """What a source listed and, by reason, how many entries it left out."""

    batches: Iterator[pa.RecordBatch]
    left_out: Counter[str] = field(default_factory=Counter)
    keeps_order: bool = False  # rows must stay in the order and shards that the source gives


class Source(Protocol):
    """Where images come from."""

    def list_images(self) -> Listing: ...

    def read_images(self, rows: pa.Table) -> Iterator[bytes | ImageError]:
        """One result for each row of the manifest, in order."""
        ...


class RowBuffer:
    """Collects rows as Python values and hands them out as record batches of one schema."""

    def __init__(self, schema: pa.Schema) -> None:
        self.schema = schema
        self.columns: list[list[Any]] = [[] for _ in schema]

    def append(self, *values: Any) -> None:
        for column, value in zip(self.columns, values, strict=True):
            column.append(value)

    def __len__(self) -> int:
        return len(self.columns[0])

    def drain(self) -> pa.RecordBatch:
        arrays = [
            pa.array(column, type=field.type)
            for column, field in zip(self.columns, self.schema, strict=True)
        ]
        self.columns = [[] for _ in self.schema]
        return pa.RecordBatch.from_arrays(arrays, schema=self.schema)


@dataclass(frozen=True)
class KeyFilter:
    """Globs a key must match, or must not."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def keeps(self, key: str) -> bool:
        if self.include and not any(fnmatchcase(key, glob) for glob in self.include):
            return False
        return not any(fnmatchcase(key, glob) for glob in self.exclude)


KEEP_ALL = KeyFilter()


def escape_key(name: str) -> str | None:
    """The name with its undecodable bytes as `\\xNN`, or None when it is valid UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return os.fsencode(name).decode("utf-8", "backslashreplace")
    return None
