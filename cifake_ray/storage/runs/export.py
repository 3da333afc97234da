"""Export scores to one CSV file."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from cifake_ray.errors import StorageError, UsageError
from cifake_ray.storage.io.files import exists, list_folder, write_chunks
from cifake_ray.storage.io.paths import AnyPath, is_inside
from cifake_ray.storage.runs.shards import read_shard
from cifake_ray.storage.runs.verify import SHARD_NAME, open_finished, read_files

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


def export_scores(scores: AnyPath, file: AnyPath) -> int:
    """Write the scores of a run as CSV and return the number of rows."""
    if exists(scores / "_run.json"):
        run = open_finished(scores)
        if is_inside(file, scores):
            raise UsageError(f"{file} is inside {scores}; choose a file outside it")
        paths = [scores / row["name"] for row in read_files(run)]
    else:
        paths = [path for path in list_folder(scores) if SHARD_NAME.fullmatch(path.name)]
    if not paths:
        raise StorageError(f"{scores}: no part-*.parquet; give the output of score or evaluate")
    counts: list[int] = []
    write_chunks(file, _encode_parts(paths, counts))
    return sum(counts)


def _encode_parts(paths: list[AnyPath], counts: list[int]) -> Iterator[bytes]:
    for number, path in enumerate(paths):
        table = read_shard(path)
        counts.append(table.num_rows)
        columns = []
        for field, column in zip(table.schema, table.columns, strict=True):
            if pa.types.is_dictionary(field.type):
                column = column.cast(field.type.value_type)
            if any(is_text(column.type) for is_text in TEXT):
                column = _escape(column.cast(pa.string()))
            elif not any(is_plain(column.type) for is_plain in PLAIN):
                raise StorageError(
                    f"{path}: the column {field.name} ({column.type}) does not fit into CSV; read"
                    " the Parquet files instead"
                )
            columns.append(column)
        names = _escape(pa.array(table.column_names)).to_pylist()
        buffer = io.BytesIO()
        options = pa.csv.WriteOptions(include_header=number == 0)
        pa.csv.write_csv(pa.table(columns, names=names), buffer, options)
        yield buffer.getvalue()


def _escape(text: pa.Array) -> pa.Array:
    return pc.replace_substring_regex(text, FORMULA_START, r"'\1")
