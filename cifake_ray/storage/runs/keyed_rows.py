"""Read what persons say of images: a table of keys with labels or verdicts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cifake_ray.errors import UsageError
from cifake_ray.storage.io.paths import AnyPath
from cifake_ray.storage.runs.export_tables import escape_formulas
from cifake_ray.storage.sources.image_table import open_parquet, read_pieces
from cifake_ray.storage.sources.text_table import open_text_table

PUT_KEY = "call the column of keys `key`"


def read_keyed_rows(
    path: AnyPath, wanted: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the lines of CSV, text, JSON lines or Parquet with their numbers, as text.

    An empty cell, and an optional column that is not there, is "". UsageError when `key` or a
    wanted column is missing, and for a line without a key.
    """
    lines: Iterator[tuple[int, Sequence[Any]]]
    if path.suffix.lower() == ".parquet":
        table = open_parquet(path)
        names = table.schema_arrow.names
        columns = [name for name in ("key", *wanted, *optional) if name in names]
        lines, names = _iterate_parquet(path, table, columns), columns
    else:
        names, lines = open_text_table(path, "key", (*wanted, "label")[0], PUT_KEY)
    if missing := [name for name in ("key", *wanted) if name not in names]:
        raise UsageError(
            f"{path}: no column {missing[0]!r}, only {', '.join(names) or 'none'}; give the columns"
            f" {' and '.join(('key', *wanted))}"
        )
    positions = {name: names.index(name) for name in ("key", *wanted, *optional) if name in names}
    empty = dict.fromkeys(optional, "")
    for number, values in lines:
        row = {name: _to_text(values[position]) for name, position in positions.items()}
        if not row["key"]:
            raise UsageError(f"{path}, line {number}: no key; give one or delete the line")
        yield number, empty | row


def read_answers(
    path: AnyPath, column: str, words: Mapping[str, Any], optional: Sequence[str] = ()
) -> dict[str, dict[str, Any]]:
    """Return the row of each key; a word of the column, in any case, becomes what it means.

    UsageError for another word, and for a key with two different answers.
    """
    rows: dict[str, dict[str, Any]] = {}
    for number, row in read_keyed_rows(path, [column], optional):
        word = row[column].strip().lower()
        if word not in words:
            raise UsageError(
                f"{path}, line {number}: {column} is {row[column]!r}; give"
                f" {', '.join(name for name in words if name)}"
            )
        answered = {**row, column: words[word]}
        if rows.setdefault(row["key"], answered)[column] != answered[column]:
            raise UsageError(
                f"{path}, line {number}: {row['key']!r} has another {column} before; keep one"
            )
    return rows


def find_keys(keys: pa.ChunkedArray, given: pa.Array) -> pa.ChunkedArray:
    """Return where each key is among those that persons gave, null where it is not.

    A key that a spreadsheet would take for a formula is also found as CSV exports write it.
    """
    exact = pc.index_in(keys, given)
    if not pc.any(pc.starts_with(given, "'")).as_py():
        return exact
    return pc.coalesce(exact, pc.index_in(escape_formulas(keys), given))


def _iterate_parquet(
    path: AnyPath, table: Any, columns: Sequence[str]
) -> Iterator[tuple[int, Sequence[Any]]]:
    number = 0
    for group in range(table.num_row_groups):
        for batch in read_pieces(table, path, group, columns):
            held = (batch.column(name).to_pylist() for name in columns)
            for values in zip(*held, strict=True):
                number += 1
                yield number, values
    table.close(force=True)


def _to_text(value: Any) -> str:
    return "" if value is None else str(value)
