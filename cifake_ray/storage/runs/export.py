"""Export scores to one file: CSV, Parquet, JSON lines, or keys alone."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from cifake_ray.config import ExportConfig
from cifake_ray.core.schema import SCORE_FIELDS
from cifake_ray.errors import CifakeError, StorageError, UsageError
from cifake_ray.storage.io.files import exists, list_folder, make_folder, write_chunks
from cifake_ray.storage.io.paths import AnyPath, is_inside
from cifake_ray.storage.io.records import PARQUET_ERRORS
from cifake_ray.storage.runs.shards import read_shard
from cifake_ray.storage.runs.verify import SHARD_NAME, open_finished, read_files

# A cell that starts with one of these is a formula to a spreadsheet, to some of them also after
# blanks or in full width. Source: OWASP, CSV injection.
FORMULA_START = r"^([\t\r\n]|[\s\v\x00\x{a0}\x{feff}]*[=+\-@\x{ff1d}\x{ff0b}\x{ff0d}\x{ff20}])"

EXISTS = "{} exists; choose another file, or give --overwrite"

TEXT = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
PLAIN = (
    pa.types.is_boolean,
    pa.types.is_integer,
    pa.types.is_floating,
    pa.types.is_decimal,
    pa.types.is_temporal,
    pa.types.is_null,
)
CONDITION = re.compile(r"\s*(.+?)\s*(>=|<=|==|!=|=|>|<)\s*(.*?)\s*")
COMPARE = {
    ">=": pc.greater_equal,
    "<=": pc.less_equal,
    ">": pc.greater,
    "<": pc.less,
    "=": pc.equal,
    "==": pc.equal,
    "!=": pc.not_equal,
}


def export_scores(scores: AnyPath, file: AnyPath, config: ExportConfig) -> int:
    """Write the scores of a run to a file, whole or not at all; return the number of rows.

    UsageError when the file exists and `config` does not replace it.
    """
    if exists(scores / "_run.json") and is_inside(file, scores):
        raise UsageError(f"{file} is inside {scores}; choose a file outside it")
    counts: list[int] = []
    write_export(file, encode_scores(scores, config, counts), config)
    return sum(counts)


def write_export(file: AnyPath, chunks: Iterable[bytes], config: ExportConfig) -> None:
    """Write a file, whole or not at all. UsageError when it exists and is not to be replaced."""
    refuse_existing(file, config)
    make_folder(file.parent)
    try:
        write_chunks(file, chunks, overwrite=config.overwrite)
    except FileExistsError as error:  # it appeared meanwhile
        raise UsageError(EXISTS.format(file)) from error


def refuse_existing(file: AnyPath, config: ExportConfig) -> None:
    """Raise UsageError when a file exists and is not to be replaced."""
    if not config.overwrite and exists(file):
        raise UsageError(EXISTS.format(file))


def encode_scores(scores: AnyPath, config: ExportConfig, counts: list[int]) -> Iterator[bytes]:
    """Yield the bytes of the export shard by shard, and append the number of rows of each."""
    encode = {
        "csv": _encode_csv,
        "parquet": _encode_parquet,
        "jsonl": _encode_json_lines,
        "txt": _encode_keys,
    }[config.chosen_format]
    if encode is _encode_keys and config.columns:
        raise UsageError("--columns: a .txt file holds keys only; choose another format")
    if exists(scores / "_run.json"):
        run = open_finished(scores)
        paths = [scores / row["name"] for row in read_files(run)]
    else:
        paths = [path for path in list_folder(scores) if SHARD_NAME.fullmatch(path.name)]
    if not paths:
        raise StorageError(
            f"{scores}: no part-*.parquet; give the output of score or evaluate, or for a bundle a"
            " file that ends in .onnx"
        )
    try:
        yield from encode(_read_tables(paths, config, counts))
    except CifakeError:
        raise
    except (*PARQUET_ERRORS, ArithmeticError, TypeError) as error:  # values that Python cannot hold
        raise StorageError(
            f"{scores}: rows cannot be exported as {config.chosen_format} ({error}); choose another"
            " format or other --columns"
        ) from error


def _read_tables(
    paths: list[AnyPath], config: ExportConfig, counts: list[int]
) -> Iterator[tuple[AnyPath, pa.Table]]:
    for path in paths:
        table = read_shard(path, SCORE_FIELDS[:1])
        for condition in config.where:
            table = table.filter(_find_rows(table, condition))
        for name in config.column_names:
            _check_column(table, name, "--columns")
        counts.append(table.num_rows)
        yield path, table.select(config.column_names or table.column_names)


def _check_column(table: pa.Table, name: str, option: str) -> None:
    if name not in table.column_names:
        raise UsageError(
            f"{option}: there is no column {name!r}; there are {', '.join(table.column_names)}"
        )


def _find_rows(table: pa.Table, condition: str) -> pa.ChunkedArray:
    """Return which rows satisfy `COLUMN OPERATOR VALUE`; a null satisfies only `= null`."""
    match = CONDITION.fullmatch(condition)
    if match is None:
        raise UsageError(f"--where {condition!r}: give COLUMN OPERATOR VALUE, as 'p_fake >= 0.9'")
    name, operator, text = match.groups()
    _check_column(table, name, "--where")
    column = table.column(name)
    if text == "null" and operator in ("=", "==", "!="):
        return pc.is_valid(column) if operator == "!=" else pc.is_null(column)
    try:
        value = pa.scalar(text.strip("'\"")).cast(column.type)
        return COMPARE[operator](column, value)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UsageError(
            f"--where {condition!r}: {text!r} cannot be compared with {name} ({column.type})"
        ) from error


Tables = Iterator[tuple[AnyPath, pa.Table]]


def _encode_csv(tables: Tables) -> Iterator[bytes]:
    for number, (path, table) in enumerate(tables):
        columns = []
        for field, column in zip(table.schema, table.columns, strict=True):
            if pa.types.is_dictionary(field.type):
                column = column.cast(field.type.value_type)
            if any(is_text(column.type) for is_text in TEXT):
                column = _escape(column.cast(pa.string()))
            elif not any(is_plain(column.type) for is_plain in PLAIN):
                raise StorageError(
                    f"{path}: the column {field.name} ({column.type}) does not fit into CSV; export"
                    " .parquet, or other --columns"
                )
            columns.append(column)
        names = _escape(pa.array(table.column_names)).to_pylist()
        buffer = io.BytesIO()
        options = pa.csv.WriteOptions(include_header=number == 0)
        pa.csv.write_csv(pa.table(columns, names=names), buffer, options)
        yield buffer.getvalue()


def _escape(text: pa.Array) -> pa.Array:
    return pc.replace_substring_regex(text, FORMULA_START, r"'\1")


def _encode_parquet(tables: Tables) -> Iterator[bytes]:
    _, first = next(tables)
    schema = first.schema.remove_metadata()  # it is about a shard
    sink = _Sink()
    with pq.ParquetWriter(sink, schema, compression="zstd", write_page_checksum=True) as writer:
        writer.write_table(first.cast(schema))
        yield sink.take()
        for path, table in tables:
            if table.schema.names != schema.names:
                raise StorageError(f"{path}: other columns than the first; choose --columns")
            writer.write_table(table.cast(schema))
            yield sink.take()
    yield sink.take()


class _Sink(io.RawIOBase):
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


def _encode_json_lines(tables: Tables) -> Iterator[bytes]:
    for path, table in tables:
        columns = {}
        for field, column in zip(table.schema, table.columns, strict=True):
            if pa.types.is_float32(field.type):  # 0.374, not 0.37400001287460327
                column = column.cast(pa.string()).cast(pa.float64())
            columns[field.name] = [_to_json(value, path, field) for value in column.to_pylist()]
        rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
        yield "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


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


def _encode_keys(tables: Tables) -> Iterator[bytes]:
    for path, table in tables:
        keys = table.column("key").to_pylist()
        if odd := [key for key in keys if key is None or "\n" in key or "\r" in key]:
            raise StorageError(f"{path}: the key {odd[0]!r} is more than a line; export .jsonl")
        yield "".join(f"{key}\n" for key in keys).encode()
