"""Write rows in pieces: small Parquet files, one behind the other in a file, read by their range.

The files lie in the output, since it has the room.
"""

from __future__ import annotations

import io
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq

from cifake_ray.errors import StorageError
from cifake_ray.storage.io.files import make_folder, open_ranges, write_bytes
from cifake_ray.storage.io.paths import AnyPath, explain_errors, is_from_s3fs
from cifake_ray.storage.io.records import PARQUET_ERRORS

ROW_FILE_NAME = re.compile(r"[0-9a-f]{16}\.rows")
HASH = ""  # the name of a column of hashes; a list may have one of the same name


@dataclass(frozen=True)
class RowFile:
    """A file of rows: where each of its pieces ends."""

    name: str
    ends: list[int]

    def __post_init__(self) -> None:
        if not ROW_FILE_NAME.fullmatch(self.name):
            raise ValueError(f"{self.name!r} is no name of a file of rows")
        if sorted(self.ends) != self.ends:
            raise ValueError(f"the pieces of {self.name} are in no order")

    def read(
        self, folder: AnyPath, start: int, stop: int, check: Callable[[pa.Schema], None]
    ) -> Iterator[pa.Table]:
        """Yield the pieces from `start` to before `stop` that have rows.

        StorageError when one is damaged, or `check` raises ValueError.
        """
        path, ends = folder / self.name, [0, *self.ends]
        with explain_errors(path):
            try:
                with open_ranges(path) as opened:
                    opened.seek(ends[start])
                    data = opened.read(ends[stop] - ends[start])
                for begin, end in pairwise(end - ends[start] for end in ends[start : stop + 1]):
                    if end > begin:
                        part = pa.BufferReader(data[begin:end])
                        table = pq.ParquetFile(part).read(use_threads=False)
                        check(table.schema)
                        yield table
            except PARQUET_ERRORS as error:
                if is_from_s3fs(error):  # the store has failed, not the file
                    raise
                raise _explain_damage(path, error) from error
            except StorageError as error:
                if not isinstance(error.__cause__, FileNotFoundError):
                    raise
                raise _explain_damage(path, error) from error


def write_pieces(folder: AnyPath, pieces: Iterable[pa.Table]) -> RowFile:
    """Write a new file of rows; a piece may have none."""
    data, ends = io.BytesIO(), []
    for piece in pieces:
        if piece.num_rows:
            data.write(_encode(piece))
        ends.append(data.tell())
    file = RowFile(f"{secrets.token_hex(8)}.rows", ends)
    make_folder(folder, parents=False)
    write_bytes(folder / file.name, data.getvalue())
    return file


def _explain_damage(path: AnyPath, error: BaseException) -> StorageError:
    return StorageError(
        f"{path}: what was listed is damaged or missing ({error}); remove the folder {path.parent}"
        " and run the same command again"
    )


def _encode(table: pa.Table) -> bytes:
    """Return a piece as Parquet: neighbours in a listing share the begin of a key."""
    delta = {name: "DELTA_BYTE_ARRAY" for name in ("key", "location") if name in table.column_names}
    plain = {name: "PLAIN" for name in (HASH, "etag") if name in table.column_names}
    others = [name for name in table.column_names if name not in delta.keys() | plain.keys()]
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        use_dictionary=others,
        column_encoding=delta | plain,
        write_statistics=False,
        write_page_checksum=True,
    )
    data: bytes = sink.getvalue().to_pybytes()
    return data
