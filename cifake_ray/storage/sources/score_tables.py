"""The rows of tables that hold scores already: our own output, or somebody else's.

A table has `key`, `label` and `p_fake`, `logit` or both. There are no images: reading a row gives
no bytes, and the scores travel with the listing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa
from scipy.special import expit, logit

from cifake_ray.core.labels import LabelReader
from cifake_ray.core.schema import HEADER_FIELDS, MANIFEST_FIELDS, SCORE_FIELDS
from cifake_ray.errors import ImageError, StorageError, UsageError
from cifake_ray.storage.io.files import is_file
from cifake_ray.storage.io.paths import AnyPath, explain_errors
from cifake_ray.storage.sources.columns import (
    RESERVED_COLUMNS,
    ColumnChoice,
    find_column,
    make_split_reader,
    read_label_names,
    rename_columns,
)
from cifake_ray.storage.sources.image_table import find_image_column, open_parquet
from cifake_ray.storage.sources.open_source import detect_kind
from cifake_ray.storage.sources.parquet import find_tables
from cifake_ray.storage.sources.source import (
    KEEP_ALL,
    LISTING_BATCH_ROWS,
    KeyFilter,
    Listing,
    Part,
    batch_rows,
)
from cifake_ray.storage.sources.text_table import open_text_table

MAX_LOGIT = 1000.0  # of a p_fake of exactly 0 or 1: beyond that of any other float64
CARRIED_FIELDS = [f for f in SCORE_FIELDS if f.name in ("logit", "p_fake")] + HEADER_FIELDS
NO_SCORE = "without a score"
_NO_SCORES = "no column p_fake or logit"


class _Opened(NamedTuple):
    names: list[str]
    types: list[pa.DataType]
    lines: Iterator[tuple[int, Sequence[object]]]
    unit: str  # line or row
    label_names: list[str] | None


def find_score_tables(place: AnyPath, uri: str, choice: ColumnChoice) -> list[AnyPath]:
    """Return the tables of scores that a path holds; none if it is one of images.

    A column `p_fake` or `logit` makes a table one of scores, unless it holds the images too.
    """
    kind = detect_kind(place, uri, choice)
    if kind not in ("list", "shards"):
        return []
    tables = [place] if is_file(place) else find_tables(place)
    if tables[0].suffix.lower() == ".parquet":
        column = find_image_column(tables[0], choice)
        if column is not None and column.content != "paths":
            return []
    try:
        names = _open_table(tables[0], choice).names
    except UsageError:  # no column of keys: perhaps a list, which has its own remedy
        return []
    has_scores = any(find_column(names, name) for name in ("p_fake", "logit"))
    if not has_scores and choice.path not in rename_columns(names, choice.path, choice.label):
        raise UsageError(f"{tables[0]}: {_NO_SCORES}, only {', '.join(names)}; give one to measure")
    return tables if has_scores else []


def _list_key_columns(choice: ColumnChoice) -> tuple[str, ...]:
    return ("key", "path") if choice.path == "path" else (choice.path,)


def _open_table(path: AnyPath, choice: ColumnChoice) -> _Opened:
    """Open a table. UsageError when it has no column of keys."""
    wanted = _list_key_columns(choice)
    if path.suffix.lower() == ".parquet":
        table = open_parquet(path)
        schema = table.schema_arrow
        if not any(find_column(schema.names, name) for name in wanted):
            raise UsageError(f"{path}: no column {wanted[0]!r}; name it with --path-column")
        label = find_column(schema.names, choice.label)

        def iterate_rows() -> Iterator[tuple[int, Sequence[object]]]:
            number = 0
            with explain_errors(path):
                for batch in table.iter_batches(LISTING_BATCH_ROWS):
                    columns = (column.to_pylist() for column in batch.columns)
                    for values in zip(*columns, strict=True):
                        yield number, values
                        number += 1
            table.close(force=True)

        label_names = read_label_names(schema, label) if label else None
        return _Opened(schema.names, schema.types, iterate_rows(), "row", label_names)
    for number, name in enumerate(wanted, 1):
        try:
            names, lines = open_text_table(path, name, choice.label)
            break
        except UsageError:
            if number == len(wanted):
                raise
    return _Opened(list(names), [pa.string()] * len(names), lines, "line", None)


@dataclass(frozen=True)
class ScoreTables:
    """Tables of scores: a `Source` whose rows are measured as they are."""

    root: AnyPath
    tables: tuple[AnyPath, ...]
    choice: ColumnChoice = field(default_factory=ColumnChoice)
    key_filter: KeyFilter = KEEP_ALL
    is_ours: bool = False  # rows may have an error instead of a score, and no label

    def list_images(
        self, parts: Sequence[Part] | None = None, max_rows: int | None = None
    ) -> Listing:
        listing = Listing(iter(()), keeps_order=True)
        listing.batches = self._list_batches(listing)
        return listing

    def _list_batches(self, listing: Listing) -> Iterator[pa.RecordBatch]:
        labels = LabelReader(self.choice.label, self.choice.class_names)
        first, seen = None, dict[str, tuple[AnyPath, int]]()
        for path in self.tables:
            opened = _open_table(path, self.choice)
            if len(set(opened.names)) != len(opened.names):
                raise UsageError(f"{path}: two columns have the same name; rename one")
            self.choice.check_names(opened.names, path)
            places = self._find_places(path, opened.names)
            others = [
                pa.field(name, kind)
                for n, (name, kind) in enumerate(zip(opened.names, opened.types, strict=True))
                if n not in places.values()
            ]
            extra, _ = self.choice.choose_extra(others, path, RESERVED_COLUMNS)
            if extra != (first := first or extra):
                raise StorageError(f"{path}: other columns than {self.tables[0]}; measure it apart")
            carried = [opened.names.index(column.name) for column in extra]
            rows = self._make_rows(path, opened, places, carried, labels, seen, listing.left_out)
            yield from batch_rows(rows, pa.schema([*MANIFEST_FIELDS, *CARRIED_FIELDS, *extra]))
        if labels.counts and not self.is_ours:
            listing.notes.append(labels.describe())

    def _find_places(self, path: AnyPath, names: list[str]) -> dict[str, int]:
        """Return the position of each column that means something."""
        wanted = {field.name: field.name for field in [*CARRIED_FIELDS, *SCORE_FIELDS]}
        wanted |= {"label": self.choice.label, "source": self.choice.source}
        places = {}
        for name, written in wanted.items():
            found = None if written in self.choice.drop else find_column(names, written)
            if found is not None:
                places[name] = names.index(found)
        keys = (find_column(names, name) for name in _list_key_columns(self.choice))
        places["key"] = names.index(next(name for name in keys if name is not None))
        if "label" not in places:
            raise UsageError(
                f"{path}: no column {self.choice.label!r}, only {', '.join(names)}; scores are"
                " measured against labels; --label-column names them"
            )
        if "p_fake" not in places and "logit" not in places:
            raise UsageError(f"{path}: {_NO_SCORES}, only {', '.join(names)}")
        return places

    def _make_rows(
        self,
        path: AnyPath,
        opened: _Opened,
        places: dict[str, int],
        carried: list[int],
        labels: LabelReader,
        seen: dict[str, tuple[AnyPath, int]],
        left_out: Counter[str],
    ) -> Iterator[Sequence[Any]]:
        read_split = make_split_reader("split")
        for number, values in opened.lines:
            where = f"{path}, {opened.unit} {number}"
            cells = {name: _clean(values[place]) for name, place in places.items()}
            key = cells["key"]
            if isinstance(key, int):  # as a text table writes it
                key = str(key)
            if key is None:
                raise UsageError(f"{where}: no key; give each image one")
            if not isinstance(key, str):
                kind = type(key).__name__
                raise UsageError(f"{where}: the key is of type {kind}; give words or whole numbers")
            if not self.key_filter.keeps(key):
                left_out["excluded"] += 1
                continue
            if key in seen:
                other, line = seen[key]
                raise UsageError(
                    f"{where}: the key {key!r} is also in {other}, {opened.unit} {line}; delete one"
                )
            seen[key] = path, number
            error = cells.get("error")
            label = labels.read(cells["label"], opened.label_names)
            scores: tuple[float | None, float | None] = (None, None)
            if error is None:
                scores = _read_scores(where, cells)
                if label is None and not self.is_ours:
                    raise UsageError(
                        f"{where}: the label {cells['label']!r} is neither REAL nor FAKE;"
                        " --real-name and --fake-name tell what other values mean"
                    )
            elif not self.is_ours:
                left_out[NO_SCORE] += 1
                continue
            header = (_read_header(where, f, cells.get(f.name)) for f in HEADER_FIELDS)
            facts = label, read_split(cells.get("split")), _write(cells.get("source"))
            extra = (values[place] for place in carried)
            yield key, *[None] * 5, *facts, error, *scores, *header, *extra

    def read_images(self, rows: pa.Table) -> Iterator[bytes | ImageError]:
        for error in rows.column("error").to_pylist():
            yield b"" if error is None else ImageError(error, "as it was scored")


def _clean(value: object) -> object:
    """Return a value without spaces around it; None for an empty one."""
    return (value.strip() or None) if isinstance(value, str) else value


def _write(value: object) -> str | None:
    return None if value is None else str(value)


def _read_scores(where: str, cells: dict[str, object]) -> tuple[float, float]:
    """Return logit and p_fake; each follows from the other where it is missing."""
    given: dict[str, float] = {}
    for name in ("p_fake", "logit"):
        if (value := cells.get(name)) is None:
            continue
        try:
            given[name] = number = float(str(value))
        except ValueError as error:
            raise UsageError(f"{where}: {name} is {value!r}, no number") from error
        if not math.isfinite(number) or (name == "p_fake" and not 0 <= number <= 1):
            bounds = "from 0 to 1" if name == "p_fake" else "that is finite"
            raise UsageError(f"{where}: {name} is {value}; give a number {bounds}")
    if not given:
        raise UsageError(f"{where}: neither p_fake nor logit; delete the row, or give its `error`")
    if "logit" not in given:
        given["logit"] = min(max(float(logit(given["p_fake"])), -MAX_LOGIT), MAX_LOGIT)
    p_fake = given["p_fake"] if "p_fake" in given else float(expit(given["logit"]))
    return given["logit"], p_fake


def _read_header(where: str, column: pa.Field, value: object) -> object:
    """Return a value of a column that `score` measures; UsageError for one of another type."""
    if value is None or pa.types.is_string(column.type):
        return _write(value)
    try:
        return int(float(str(value)))
    except (ValueError, OverflowError) as error:
        raise UsageError(f"{where}: {column.name} is {value!r}, no number") from error
