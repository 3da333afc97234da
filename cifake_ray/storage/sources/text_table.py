"""The rows of a list that is text: .csv, .tsv, .txt, .lst, .jsonl or .json, each also as .gz.

Separator, spaces around it and a missing header are found in the text itself; the suffix only says
whether lines without any of that are paths (.txt, .lst) or an error.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import os
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

from cifake_ray.core.imaging.containers import HEAD_BYTES, name_container
from cifake_ray.errors import UsageError
from cifake_ray.storage.io.files import open_file
from cifake_ray.storage.io.paths import AnyPath, explain_errors
from cifake_ray.storage.sources.columns import rename_columns

TEXT_SUFFIXES = (".csv", ".tsv", ".txt", ".lst", ".list", ".jsonl", ".ndjson", ".json")
SEPARATORS = (",", "\t", ";", "|")
HEADER_LINES = 20  # a name in the header may hold line breaks
MAX_LABELS = 1000  # that are told apart
# Prompts and workflows are long. An open quote ends here, and not with the memory.
MAX_FIELD_CHARS = 64 * 2**20
MAX_JSON_BYTES = 256 * 2**20  # of one array, which is held in memory
PART_ROWS = 16_384  # from one place where a worker begins to the next
# `a b.jpg 0`, `a.png,fake` and `real a.png`: lists of ImageNet, Caffe and timm have no header;
# MXNet's have a number before each label.
_SEPARATOR = r'"?(?:[ \t]*[,;|\t][ \t]*|[ \t]+)"?'
_IMAGE = r"\.(?i:jpe?g|jfif|png|webp|gif|bmp|tiff?|avif|heic)"
_LABELLED = {
    "label behind": (
        re.compile(rf'"?(?P<path>.+?\.\w{{1,5}}){_SEPARATOR}(?P<label>-?\d+)"?\s*'),
        re.compile(rf'"?(?P<path>.+?{_IMAGE}){_SEPARATOR}(?P<label>[^\W\d]\w*)"?\s*'),
    ),
    # A first word may be part of a name with spaces, `my photo.jpg`, unless it is a class.
    "label before": (
        re.compile(rf"(?:\d+\t)?(?P<label>-?\d+(?:\.\d+)?)[\t,;|] *(?P<path>.+{_IMAGE})\s*"),
        re.compile(rf'"?(?P<label>-1|[01]|(?i:real|fake)){_SEPARATOR}(?P<path>.+{_IMAGE})"?\s*'),
    ),
}

_EXCEL_SEPARATOR = re.compile(r"sep=.\s*")  # a first line that Excel writes and does not show


Row = tuple[int, Sequence[str | None]]  # with the number of its line


class TextTable(NamedTuple):
    """A list after its header."""

    names: list[str]
    rows: Iterator[Row]


class TextLayout(NamedTuple):
    """How a list is written: all that its rows need to be read from any place on."""

    kind: str  # csv, json, array (of JSON), paths, or one of _LABELLED
    names: list[str]  # of the columns, as they are asked for
    written: list[str]  # the same, as they are written
    separator: str = ""
    has_spaces: bool = False  # around the separators


@dataclass
class Place:
    """How much of a list was read: its lines, and its bytes without compression."""

    num_lines: int = 0
    num_bytes: int = 0


def find_text_suffix(name: str) -> str | None:
    """Return the suffix of a list that is text, without `.gz`; None for any other file."""
    name = name.lower().removesuffix(".gz")
    return next((suffix for suffix in TEXT_SUFFIXES if name.endswith(suffix)), None)


def open_text_table(
    path: AnyPath,
    path_column: str,
    label_column: str,
    remedy: str = "name it with --path-column",
) -> TextTable:
    """Read the header of a list. UsageError when it has no column of paths."""
    layout = find_text_layout(path, path_column, label_column, remedy)
    parts = read_text_parts(path, layout, PART_ROWS)
    return TextTable(layout.names, chain.from_iterable(rows for _, rows in parts))


def find_text_layout(
    path: AnyPath,
    path_column: str,
    label_column: str,
    remedy: str = "name it with --path-column",
) -> TextLayout:
    """Return how a list is written. UsageError when it has no column of paths."""
    with explain_errors(path), open_file(path) as file:
        what = name_container(file.read(HEAD_BYTES))
    if what is not None and not path.name.lower().endswith(".gz"):
        raise UsageError(f"{path} is {what}")
    suffix = find_text_suffix(path.name)
    if suffix in (".jsonl", ".ndjson", ".json"):
        records = _iterate_json(path, suffix == ".json")
        written = list(dict.fromkeys(name for record in records for name in record))
        layout = TextLayout("array" if suffix == ".json" else "json", written, written)
    else:
        header = list(islice(_read_lines(path, ""), HEADER_LINES))
        separator = _find_separator(header, path_column)
        if separator is None and (labelled := _find_labelled(path, path_column, label_column)):
            return labelled
        if separator is None and suffix in (".txt", ".lst", ".list"):
            return TextLayout("paths", [path_column], [path_column])
        layout = _read_csv_layout(path, header, separator or ",")
    names = rename_columns(layout.names, path_column, label_column)
    if path_column not in names:
        is_header = not any(re.search(rf"{_IMAGE}$", name) for name in names)
        raise UsageError(
            f"{path}: no column {path_column!r}, only {shorten(', '.join(names), 500) or 'none'}; "
            + (remedy if is_header else "put a line with names before them")
        )
    return layout._replace(names=names)


def can_start_within(path: AnyPath, layout: TextLayout) -> bool:
    """Return whether reading a list can begin at a `Place`: where a row ends, quotes included."""
    return layout.kind != "array" and path.suffix.lower() != ".gz"


def read_text_parts(
    path: AnyPath, layout: TextLayout, part_rows: int, start: Place | None = None
) -> Iterator[tuple[Place, Iterator[Row]]]:
    """Yield `part_rows` rows at a time with the place where they begin, from a place on.

    Rows that are left unread cost only the search for their ends.
    """
    place = replace(start or Place())
    lines: Iterator[tuple[int, Any]]
    if layout.kind == "csv":
        lines = _iterate_csv(path, layout.separator, layout.has_spaces, len(layout.names), place)
        if start is None:
            next(lines, None)  # the header
    elif layout.kind == "array":
        lines = enumerate(_read_json_array(path), 1)
    else:
        lines = _iterate_text(path, place)
    read = _make_row_reader(path, layout)
    before = replace(place)
    while (first := next(lines, None)) is not None:
        some = chain([first], islice(lines, part_rows - 1))
        yield before, (read(number, line) for number, line in some)
        deque(some, 0)
        before = replace(place)


def _make_row_reader(path: AnyPath, layout: TextLayout) -> Callable[[int, Any], Row]:
    """Return what makes a row of a line and its number."""
    if layout.kind == "csv":
        return lambda number, values: (number, values)
    if layout.kind == "paths":
        return lambda number, line: (number, (line,))
    if layout.kind in _LABELLED:
        match = partial(_match_labelled, _LABELLED[layout.kind])
        return lambda number, line: (number, match(line) or (line, None))

    def read(number: int, line: Any) -> Row:
        record = line if layout.kind == "array" else _parse_record(path, number, line)
        return number, [_write_value(record.get(name)) for name in layout.written]

    return read


def _find_separator(header: Sequence[str], path_column: str) -> str | None:
    """Return the separator with which the first line is a header with a column of paths."""
    for separator in SEPARATORS:
        names = _read_header(header, separator)
        if path_column in rename_columns(names, path_column, "label") and (
            len(names) > 1 or names[0] == path_column  # else the path of one image
        ):
            return separator
    return None


def _read_header(header: Sequence[str], separator: str) -> list[str]:
    reader = csv.reader(header, delimiter=separator, skipinitialspace=True)
    try:
        return [name.strip() for name in next(filter(None, reader), [])]
    except csv.Error:
        return []


def _read_csv_layout(path: AnyPath, header: Sequence[str], separator: str) -> TextLayout:
    """Read the header of a list; spaces around values are dropped if the header has them."""
    first = next((line for line in header if line.strip()), "")
    has_spaces = f"{separator} " in first or f" {separator}" in first
    rows = _iterate_csv(path, separator, has_spaces, None, Place())
    names = [name.strip() for name in next(rows, (1, []))[1]]
    return TextLayout("csv", names, names, separator, has_spaces)


def _iterate_csv(
    path: AnyPath, separator: str, has_spaces: bool, num_columns: int | None, place: Place
) -> Iterator[tuple[int, Sequence[str]]]:
    csv.field_size_limit(MAX_FIELD_CHARS)  # it is the process's
    lines = _read_lines(path, "", place)
    reader = csv.reader(lines, delimiter=separator, strict=True, skipinitialspace=has_spaces)
    try:
        for values in reader:
            if not any(value.strip() for value in values) and len(values) <= 1:
                continue
            num_columns = num_columns or len(values)
            while len(values) > num_columns and not values[-1].strip():
                values.pop()  # a comma that ends the line, but not the header
            if len(values) != num_columns:
                raise UsageError(
                    f"{path}, line {place.num_lines}: {len(values)} values for {num_columns}"
                    f" columns; quote values that hold a {_name_separator(separator)}"
                )
            yield place.num_lines, [v.strip() for v in values] if has_spaces else values
    except csv.Error as error:
        raise UsageError(f"{path}, line {place.num_lines}: {error}") from error


def _name_separator(separator: str) -> str:
    return {",": "comma", "\t": "tab", ";": "semicolon", "|": "bar"}[separator]


def _find_labelled(path: AnyPath, path_column: str, label_column: str) -> TextLayout | None:
    """Return the layout of a list without a header, a label beside each path, in every line.

    None for any other list. Numbers beyond 0 and 1 are classes of something else: their column is
    `class`.
    """
    for kind, patterns in _LABELLED.items():
        if labels := _find_labels(path, patterns):
            is_class = any(re.fullmatch(r"-?\d+", label) for label in labels - {"0", "1", "-1"})
            names = [path_column, "class" if is_class else label_column]
            return TextLayout(kind, names, names)
    return None


def _find_labels(path: AnyPath, patterns: Sequence[re.Pattern[str]]) -> set[str]:
    """Return the labels of a list, of which all lines match a pattern; none if one does not."""
    labels: set[str] = set()
    for _, line in _iterate_text(path):
        found = _match_labelled(patterns, line)
        if found is None:
            return set()
        if not labels and isinstance(path, Path) and os.path.lexists(path.parent / line):
            return set()  # the name of a file that only looks like a path and a label
        if len(labels) < MAX_LABELS:
            labels.add(found[1])
    return labels


def _match_labelled(patterns: Sequence[re.Pattern[str]], line: str) -> tuple[str, str] | None:
    match = next((match for pattern in patterns if (match := pattern.fullmatch(line))), None)
    return None if match is None else (match["path"], match["label"])


def _iterate_text(path: AnyPath, place: Place | None = None) -> Iterator[tuple[int, str]]:
    place = place or Place()
    for line in _read_lines(path, "\n", place):
        if text := line.rstrip("\n").removesuffix("\r"):
            yield place.num_lines, text


def _iterate_json(path: AnyPath, is_array: bool) -> Iterator[dict[str, Any]]:
    if is_array:
        yield from _read_json_array(path)
        return
    for number, line in _iterate_text(path):
        yield _parse_record(path, number, line)


def _parse_record(path: AnyPath, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}, line {number}: no JSON ({error})") from error
    if not isinstance(record, dict):
        raise UsageError(f"{path}, line {number}: no JSON object; give one a line")
    return record


def _read_json_array(path: AnyPath) -> list[dict[str, Any]]:
    """Return the objects of a file that is one array of them."""
    lines, size_bytes = [], 0
    for line in _read_lines(path, "\n"):
        lines.append(line)
        size_bytes += len(line)
        if size_bytes > MAX_JSON_BYTES:
            raise UsageError(f"{path}: too large for one array; write an object a line (.jsonl)")
    try:
        records = json.loads("".join(lines))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: no JSON ({error})") from error
    if not isinstance(records, list) or not all(isinstance(each, dict) for each in records):
        raise UsageError(
            f'{path}: no array of objects, [{{"path": ..., "label": ...}}, ...]; write one, or an'
            " object a line (.jsonl)"
        )
    return records


def _write_value(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value)


def _read_lines(path: AnyPath, newline: str, place: Place | None = None) -> Iterator[str]:
    """Yield lines with their ends from a place on, which moves along; `newline` is `open`'s."""
    place = place or Place()
    with explain_errors(path), ExitStack() as stack:
        file: Any = stack.enter_context(open_file(path))
        try:
            if path.suffix.lower() == ".gz":
                file = stack.enter_context(gzip.open(file))
            if place.num_bytes == 0 and file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8:
                place.num_bytes = len(codecs.BOM_UTF8)
            file.seek(place.num_bytes)
            text = io.TextIOWrapper(file, encoding="utf-8", newline=newline)
            stack.enter_context(text)
            may_be_of_excel = place.num_bytes in (0, len(codecs.BOM_UTF8))
            for line in iter(partial(text.readline, MAX_FIELD_CHARS), ""):
                if len(line) == MAX_FIELD_CHARS:
                    raise UsageError(
                        f"{path}, line {place.num_lines + 1}: more than {MAX_FIELD_CHARS:,}"
                        " characters; a list has a line for each image"
                    )
                place.num_bytes += len(line) if line.isascii() else len(line.encode())
                if not (may_be_of_excel and _EXCEL_SEPARATOR.fullmatch(line)):
                    place.num_lines += 1
                    yield line
                may_be_of_excel = False
        except UnicodeDecodeError as error:
            raise UsageError(f"{path}: not UTF-8 ({error}); save the list as UTF-8") from error
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UsageError(f"{path}: not a whole gzip file ({error}); copy it again") from error
