"""Sort the values of a column into named slices: words as they are, numbers into buckets."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cifake_ray.core.schema import LABEL_NAMES
from cifake_ray.errors import UsageError

MISSING = "(none)"
MAX_VALUES = 1000  # of a column that is no number; a slice of each
MAX_PLAIN_NUMBERS = 10  # different numbers that are slices by themselves; more are put into buckets
NUM_BUCKETS = 5  # of numbers that have no EDGES, with as many images each
# The first number of each bucket but the lowest.
EDGES: dict[str, tuple[float, ...]] = {
    "size": (64, 128, 256, 512, 1024, 2048, 4096),  # of the longer side, pixels
    "megapixels": (0.1, 0.25, 0.5, 1, 2, 5, 10, 20),
    "jpeg_quality": (50, 75, 85, 90, 95),
}
# Columns that follow from others, unless the table has one of that name.
DERIVED = {"size": ("width", "height"), "megapixels": ("width", "height")}


def check_slices(names: tuple[str, ...], schema: pa.Schema) -> None:
    """Raise UsageError for a column that a table does not have, or that cannot be sliced."""
    for name in names:
        if name not in schema.names and not set(DERIVED.get(name, [name])) <= set(schema.names):
            others = [*(d for d in DERIVED if d not in schema.names), *schema.names]
            raise UsageError(f"--slice {name}: no such column; there are {', '.join(others)}")
        if name in schema.names:
            kind = schema.field(name).type
            if pa.types.is_nested(kind) or pa.types.is_binary(kind):
                raise UsageError(f"--slice {name}: its values are {kind}; give one of words")


def name_buckets(table: pa.Table, name: str) -> tuple[np.ndarray, list[str]]:
    """Return the slice of each row, int64[N], and the names of the slices.

    UsageError when a column of words has more than MAX_VALUES; `source` may have any number.
    """
    column = _find_column(table, name)
    if name == "label":
        names = pa.array([MISSING, *LABEL_NAMES])
        return _encode(names.take(pc.fill_null(pc.add(column, 1), 0)))
    numbers = None if name == "source" else _read_numbers(column)
    if numbers is not None and (name in EDGES or len(pc.unique(numbers)) > MAX_PLAIN_NUMBERS):
        return _encode(pa.array(_write_buckets(numbers, EDGES.get(name))))
    codes, names = _encode(pc.fill_null(column.cast(pa.string()), MISSING))
    if name != "source" and len(names) > MAX_VALUES:
        raise UsageError(
            f"--slice {name}: {len(names):,} different values; give a column of at most"
            f" {MAX_VALUES:,}, or of numbers"
        )
    return codes, names


def _find_column(table: pa.Table, name: str) -> pa.Array:
    if name in table.column_names:
        column = table.column(name).combine_chunks()
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    width, height = (table.column(side).combine_chunks() for side in DERIVED[name])
    if name == "size":
        return pc.max_element_wise(width, height, skip_nulls=False)
    return pc.divide(pc.multiply(width.cast(pa.float64()), height), 1e6)


def _encode(values: pa.Array) -> tuple[np.ndarray, list[str]]:
    encoded = values.dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    codes: np.ndarray = encoded.indices.to_numpy().astype(np.int64)
    return codes, encoded.dictionary.to_pylist()


def _read_numbers(column: pa.Array) -> pa.Array | None:
    """Return a column as float64 if it holds numbers, as words too: a list of others has these."""
    kind = column.type
    if pa.types.is_boolean(kind) or pa.types.is_temporal(kind):
        return None
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        column = pc.if_else(pc.equal(pc.utf8_trim_whitespace(column), ""), None, column)
        if column.null_count == len(column):
            return None
    try:
        return column.cast(pa.float64())
    except pa.ArrowInvalid:
        return None


def _write_buckets(numbers: pa.Array, edges: tuple[float, ...] | None) -> list[str]:
    """Return `under 64`, `64-127` or `128 or more` for each number, MISSING for what is none."""
    values = numbers.to_numpy(zero_copy_only=False)
    known = values[np.isfinite(values)]
    is_whole = bool(np.all(known == np.round(known)))
    if edges is None:
        shares = np.linspace(0, 1, NUM_BUCKETS + 1)[1:-1]
        found = np.quantile(known, shares) if len(known) else np.empty(0)
        edges = tuple(np.unique(np.ceil(found) if is_whole else found).tolist())
    show = "{:,.0f}" if is_whole else "{:,.4g}"
    texts = [show.format(edge) for edge in edges]
    ends = [show.format(edge - 1) for edge in edges] if is_whole else texts
    names = [f"under {texts[0]}"] if edges else ["all"]
    for start, first, end, last in zip(texts, edges, ends[1:], edges[1:], strict=False):
        names.append(start if is_whole and last - first == 1 else f"{start}-{end}")
    names += [f"{texts[-1]} or more"] if edges else []
    index = np.searchsorted(edges, values, side="right")
    return [
        names[i] if is_known else MISSING
        for i, is_known in zip(index.tolist(), np.isfinite(values).tolist(), strict=True)
    ]
