"""Hold the shards of a listing that keeps its order: in memory while few, then in files.

A file is a number of shards as they follow each other, each a piece of it (`row_files`), so any
process can read some of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pyarrow as pa

from cifake_ray.core.schema import MANIFEST_FIELDS
from cifake_ray.storage.io.paths import AnyPath
from cifake_ray.storage.io.records import check_columns
from cifake_ray.storage.runs.row_files import RowFile, write_pieces

MAX_HELD_BYTES = 256 * 2**20  # in memory; then they are written


@dataclass
class ListedShards:
    """Shards in the order of their files in `folder`, and behind them those in memory."""

    folder: AnyPath
    files: list[RowFile] = field(default_factory=list)
    held: list[pa.Table] = field(default_factory=list)
    held_bytes: int = 0

    @property
    def num_shards(self) -> int:
        return sum(len(file.ends) for file in self.files) + len(self.held)

    def add(self, batch: pa.RecordBatch) -> None:
        """Add the rows of a shard."""
        self.held.append(pa.Table.from_batches([batch]))
        self.held_bytes += batch.nbytes
        if self.held_bytes >= MAX_HELD_BYTES:
            self.write()

    def write(self) -> None:
        """Write the shards that are in memory to a file."""
        if self.held:
            self.files.append(write_pieces(self.folder, self.held))
            self.held, self.held_bytes = [], 0

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[pa.Table]:
        """Yield the shards from `start` to before `stop`. StorageError when one is damaged."""
        stop = self.num_shards if stop is None else min(stop, self.num_shards)
        first = 0
        for file in self.files:
            begin, end = max(start - first, 0), min(stop - first, len(file.ends))
            if begin < end:
                for table in file.read(self.folder, begin, end, _check_schema):
                    yield table.combine_chunks()
            first += len(file.ends)
        yield from self.held[max(start - first, 0) : max(stop - first, 0)]


def _check_schema(schema: pa.Schema) -> None:
    check_columns(schema, MANIFEST_FIELDS)
