"""Scores as one CSV file.

Floor: storage.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from cifake_ray.errors import StorageError
from cifake_ray.storage.files import resolve_path, write_chunks
from cifake_ray.storage.parts import read_part
from cifake_ray.storage.runs import read_run

# A cell that starts with one of these is a formula to a spreadsheet. Source: OWASP, CSV injection.
FORMULA_START = r"^([=+\-@\t\r])"


def export_scores(scores: str, file: str) -> int:
    """Write the scores of a run as CSV and return the number of rows."""
    out = resolve_path(scores)
    run = read_run(out)
    if run is not None and not (out / "_SUCCESS").exists():
        raise StorageError(f"{out}: the run has not finished; run its command again first")
    folder = out if run is None else run.results_folder
    target = resolve_path(file)
    if run is not None and target.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"{target} lies inside {out}; choose a file outside it")
    paths = sorted(folder.glob("part-*.parquet"))
    if not paths:
        raise StorageError(f"{folder}: no part-*.parquet; give the output of score or evaluate")
    num_rows: int = sum(pq.ParquetFile(path).metadata.num_rows for path in paths)
    write_chunks(target, _encode_parts(paths))
    return num_rows


def _encode_parts(paths: list[Path]) -> Iterator[bytes]:
    for number, path in enumerate(paths):
        table = read_part(path)
        columns = []
        for field, column in zip(table.schema, table.columns, strict=True):
            if pa.types.is_dictionary(field.type):
                column = column.cast(field.type.value_type)
            if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
                column = _escape(column.cast(pa.string()))
            elif pa.types.is_nested(column.type) or pa.types.is_fixed_size_binary(column.type):
                raise StorageError(f"{path}: the column {field.name} does not fit into CSV")
            columns.append(column)
        names = _escape(pa.array(table.column_names)).to_pylist()
        buffer = io.BytesIO()
        options = pa.csv.WriteOptions(include_header=number == 0)
        pa.csv.write_csv(pa.table(columns, names=names), buffer, options)
        yield buffer.getvalue()


def _escape(text: pa.Array) -> pa.Array:
    return pc.replace_substring_regex(text, FORMULA_START, r"'\1")
