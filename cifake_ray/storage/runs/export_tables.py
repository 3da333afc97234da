"""Encode score rows as CSV, Parquet, JSON lines, or keys alone."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from cifake_ray.errors import StorageError
from cifake_ray.storage.io.paths import AnyPath

Tables: TypeAlias = Iterator[tuple[AnyPath, pa.Table]]  # with where the rows are from, for errors

# A cell that starts with one of these is a formula to a spreadsheet, to some of them also after
# blanks or in full width. Source: OWASP, CSV injection.
FORMULA_START = r"^([\t\r\n]|[\s\v\x00\x{a0}\x{feff}]*[=+\-@\x{ff1d}\x{ff0b}\x{ff0d}\x{ff20}])"

TEXT = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
PLAIN = (
    pa.types.is_boolean,
    pa.types.is_integer,
    pa.types.is_floating,
    pa.types.is_decimal,
    pa.types.is_temporal,
    pa.types.is_null,
)


def encode_csv(tables: Tables) -> Iterator[bytes]:
    for number, (path, table) in enumerate(tables):
        columns = []
        for field, column in zip(table.schema, table.columns, strict=True):
            if pa.types.is_dictionary(field.type):
                column = column.cast(field.type.value_type)
            if any(is_text(column.type) for is_text in TEXT):
                column = escape_formulas(column.cast(pa.string()))
            elif not any(is_plain(column.type) for is_plain in PLAIN):
                raise StorageError(
                    f"{path}: the column {field.name} ({column.type}) does not fit into CSV; export"
                    " .parquet, or other --columns"
                )
            columns.append(column)
        names = escape_formulas(pa.array(table.column_names)).to_pylist()
        buffer = io.BytesIO()
        options = pa.csv.WriteOptions(include_header=number == 0)
        pa.csv.write_csv(pa.table(columns, names=names), buffer, options)
        yield buffer.getvalue()


def escape_formulas(text: pa.Array) -> pa.Array:
    """Return texts that no spreadsheet takes for a formula."""
    return pc.replace_substring_regex(text, FORMULA_START, r"'\1")


def encode_parquet(tables: Tables) -> Iterator[bytes]:
    _, first = next(tables)
    schema = first.schema.remove_metadata()  # it is about a shard
    sink = Sink()
    with pq.ParquetWriter(sink, schema, compression="zstd", write_page_checksum=True) as writer:
        writer.write_table(first.cast(schema))
        yield sink.take()
        for path, table in tables:
            if table.schema.names != schema.names:
                raise StorageError(f"{path}: other columns than the first; choose --columns")
            writer.write_table(table.cast(schema))
            yield sink.take()
    yield sink.take()


class Sink(io.RawIOBase):
    """A file whose bytes are taken away as it is written."""

    def __init__(self) -> None:
        self.waiting: list[bytes] = []
        self.position = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.waiting.append(bytes(data))
        self.position += len(self.waiting[-1])
        return len(self.waiting[-1])

    def tell(self) -> int:
        return self.position

    def take(self) -> bytes:
        taken, self.waiting = b"".join(self.waiting), []
        return taken


def encode_json_lines(tables: Tables) -> Iterator[bytes]:
    for path, table in tables:
        yield encode_json_rows(list_rows(path, table))


def encode_json_rows(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Return one line of JSON for each row."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def list_rows(path: AnyPath, table: pa.Table) -> Iterator[dict[str, Any]]:
    """Yield the rows as what JSON has. StorageError, naming `path`, for a column of bytes."""
    columns = {}
    for field, column in zip(table.schema, table.columns, strict=True):
        if pa.types.is_float32(field.type):  # 0.374, not 0.37400001287460327
            column = column.cast(pa.string()).cast(pa.float64())
        columns[field.name] = [_to_json(value, path, field) for value in column.to_pylist()]
    for row in zip(*columns.values(), strict=True):
        yield dict(zip(columns, row, strict=True))


def _to_json(value: Any, path: AnyPath, field: pa.Field) -> Any:
    """Return what JSON has for a value: null for NaN and infinity, text for dates and decimals."""
    if isinstance(value, dict):
        return {name: _to_json(item, path, field) for name, item in value.items()}
    if isinstance(value, list):
        return [_to_json(item, path, field) for item in value]
    if isinstance(value, bytes):
        raise StorageError(
            f"{path}: the column {field.name} ({field.type}) does not fit into JSON; export"
            " .parquet, or other --columns"
        )
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


def encode_keys(tables: Tables) -> Iterator[bytes]:
    for path, table in tables:
        keys = table.column("key").to_pylist()
        if odd := [key for key in keys if key is None or "\n" in key or "\r" in key]:
            raise StorageError(f"{path}: the key {odd[0]!r} is more than a line; export .jsonl")
        yield "".join(f"{key}\n" for key in keys).encode()
