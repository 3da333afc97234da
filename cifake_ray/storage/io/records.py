"""Check what anyone may have written, field by field: JSON and the columns of Parquet files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import pyarrow as pa

Record = TypeVar("Record")

MAX_WHOLE_NUMBER = 2**63 - 1  # what Parquet and Arrow hold
# What reading a Parquet file that anyone may have written can raise.
PARQUET_ERRORS = (OSError, ValueError, LookupError, RecursionError, MemoryError, pa.ArrowException)


def parse_record(kind: type[Record], values: object) -> Record:
    """Return the dataclass with these fields; those that it does not have are ignored.

    Whole numbers are counts: from 0 to MAX_WHOLE_NUMBER. ValueError, with the name of the field,
    for a number beyond them or not finite, another type, or a field that is missing.
    """
    record: Record = _parse(kind, values, "")
    return record


@cache
def _read_hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _parse(hint: Any, value: Any, name: str) -> Any:
    kind = get_origin(hint) or hint
    items = get_args(hint)
    if kind is UnionType:  # with None alone
        return None if value is None else _parse(items[0], value, name)
    if hint is Any:
        return value
    if isinstance(kind, type) and is_dataclass(kind) and isinstance(value, dict):
        hints, values = _read_hints(kind), {}
        for field in fields(kind):
            path = f"{name}.{field.name}".lstrip(".")
            if field.name in value:
                values[field.name] = _parse(hints[field.name], value[field.name], path)
            elif field.default is MISSING and field.default_factory is MISSING:
                raise ValueError(f"there is no {path}")
        return kind(**values)
    if kind is tuple and isinstance(value, list):
        if items[-1] is not Ellipsis and len(items) != len(value):
            raise ValueError(f"{name} has {len(value)} items, not {len(items)}")
        return tuple(_parse(items[0], item, f"{name}[{n}]") for n, item in enumerate(value))
    if kind is list and isinstance(value, list):
        return [_parse(items[0], item, f"{name}[{n}]") for n, item in enumerate(value)]
    if kind in (dict, Mapping) and isinstance(value, dict):
        return {key: _parse(items[1], item, f"{name}[{key!r}]") for key, item in value.items()}
    if kind is int and type(value) is int and 0 <= value <= MAX_WHOLE_NUMBER:
        return value
    if kind is float and type(value) is float and math.isfinite(value):
        return value
    if kind is float and type(value) is int and abs(value) <= MAX_WHOLE_NUMBER:
        return value
    if kind in (bool, str) and isinstance(value, kind):
        return value
    raise ValueError(f"{name or 'it'} is {shorten_value(value)}")


def check_columns(schema: Iterable[pa.Field], wanted: Iterable[pa.Field]) -> None:
    """Raise ValueError when a column is missing, there twice, or of another type."""
    for column in wanted:
        found = [field.type for field in schema if field.name == column.name]
        if found != [column.type]:
            there = " and ".join(map(str, found)) or "missing"
            raise ValueError(f"the column {column.name} is {there}, not {column.type}")


def shorten_value(value: object) -> str:
    """Return a value for an error message."""
    if isinstance(value, dict | list):
        return f"a {type(value).__name__}"
    text = "a very large number" if isinstance(value, int) and abs(value) > 2**64 else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
