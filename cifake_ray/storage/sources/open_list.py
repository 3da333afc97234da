"""Open a list of images, or some parts of it: a Parquet file, or text (`text_table`).

A part of Parquet is neighbouring row groups. A part of a text is the lines from one place to the
next; one that is compressed, or an array of JSON, is one part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from cifake_ray.errors import UsageError
from cifake_ray.storage.io.paths import AnyPath, explain_errors
from cifake_ray.storage.sources.columns import ColumnChoice, read_label_names, rename_columns
from cifake_ray.storage.sources.image_table import open_parquet
from cifake_ray.storage.sources.source import LISTING_BATCH_ROWS
from cifake_ray.storage.sources.table_stamps import explain_change, stamp_again
from cifake_ray.storage.sources.text_table import (
    PART_ROWS,
    Place,
    TextLayout,
    can_start_within,
    find_text_layout,
    read_text_parts,
)

ListPart = tuple[str, ...]  # its name; but for a whole list, the stamp and the place follow
Lines = Iterator[tuple[int, Sequence[object]]]  # with their numbers


class OpenedList(NamedTuple):
    """A list after its header."""

    path: AnyPath
    stamp: str
    names: list[str]
    types: list[pa.DataType]
    label_names: list[str] | None  # of a Hugging Face footer
    parts: Iterator[tuple[ListPart, Lines]]  # lines that are not read are passed over


def open_list(
    path: AnyPath,
    name: str,
    path_column: str,
    choice: ColumnChoice,
    wanted: Sequence[ListPart],
    layouts: dict[ListPart, TextLayout],
) -> OpenedList:
    """Open some parts of a list, or all if `wanted` holds its name alone.

    `layouts` keeps those of texts, by name and stamp: finding one can take reading all of a text.
    UsageError for one without a column of paths; SourceChanged for one that has changed since its
    parts were named.
    """
    label_names, stamp = None, stamp_again(path)
    if any(part[1:2] not in ((), (stamp,)) for part in wanted):
        raise explain_change(path)
    if path.suffix.lower() == ".parquet":
        table = open_parquet(path)
        types = table.schema_arrow.types
        names = rename_columns(table.schema_arrow.names, path_column, choice.label)
        if choice.label in names:
            written = table.schema_arrow.names[names.index(choice.label)]
            label_names = read_label_names(table.schema_arrow, written)
        if path_column not in names:
            raise UsageError(
                f"{path}: no column {path_column!r}, only {', '.join(names) or 'none'};"
                " name it with --path-column; --image-column names one of images"
            )
        parts = _read_groups(path, (name, stamp), table, wanted)
    else:
        layout = layouts.get((name, stamp)) or find_text_layout(path, path_column, choice.label)
        layouts[name, stamp] = layout
        names, types = layout.names, [pa.string()] * len(layout.names)
        parts = _read_text(path, (name, stamp), layout, wanted)
    if len(set(names)) != len(names):
        raise UsageError(f"{path}: two columns have the same name; rename one")
    choice.check_names(names, path)
    return OpenedList(path, stamp, names, types, label_names, parts)


def _read_groups(
    path: AnyPath, stamped: ListPart, table: pq.ParquetFile, wanted: Sequence[ListPart]
) -> Iterator[tuple[ListPart, Lines]]:
    is_whole, chosen, number = stamped[:1] in wanted, set(wanted), 0
    groups, num_rows = list[int](), 0
    for group in range(table.num_row_groups):
        groups.append(group)
        num_rows += table.metadata.row_group(group).num_rows
        if num_rows >= PART_ROWS or group == table.num_row_groups - 1:
            part = (*stamped, str(groups[0]))
            if is_whole or part in chosen:
                yield part, _iterate_groups(path, table, groups, number)
            groups, number, num_rows = [], number + num_rows, 0
    table.close(force=True)


def _iterate_groups(path: AnyPath, table: pq.ParquetFile, groups: list[int], number: int) -> Lines:
    with explain_errors(path):
        for batch in table.iter_batches(LISTING_BATCH_ROWS, row_groups=groups):
            for values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                number += 1
                yield number, values


def _read_text(
    path: AnyPath, stamped: ListPart, layout: TextLayout, wanted: Sequence[ListPart]
) -> Iterator[tuple[ListPart, Lines]]:
    num_rows, *at = [int(number) for number in wanted[0][2:]] or [PART_ROWS]
    start = Place(*at) if at else None
    found = read_text_parts(path, layout, num_rows, start)
    if not can_start_within(path, layout):
        yield stamped[:1], chain.from_iterable(lines for _, lines in found)
        return
    for place, lines in found:
        numbers = (num_rows, place.num_lines, place.num_bytes)
        part = (*stamped, *map(str, numbers))
        if start is None or part in wanted:
            yield part, lines
        if part == wanted[-1]:
            return
