"""The rows of a list that is text: .csv, .tsv, .txt, .lst, .jsonl or .json, each also as .gz.

Separator, spaces around it and a missing header are found in the text itself; the suffix only says
whether lines without any of that are paths (.txt, .lst) or an error.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import islice
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
# `a b.jpg 0`, `a.png,fake` and `real a.png`: lists of ImageNet, Caffe and timm have no header;
# MXNet's have a number before each label.
_SEPARATOR = r'"?(?:[ \t]*[,;|\t][ \t]*|[ \t]+)"?'
_IMAGE = r"\.(?i:jpe?g|jfif|png|webp|gif|bmp|tiff?|avif|heic)"
_LABEL_BEHIND = (
    re.compile(rf'"?(?P<path>.+?\.\w{{1,5}}){_SEPARATOR}(?P<label>-?\d+)"?\s*'),
    re.compile(rf'"?(?P<path>.+?{_IMAGE}){_SEPARATOR}(?P<label>[^\W\d]\w*)"?\s*'),
)
# A first word may be part of a name with spaces, `my photo.jpg`, unless it is a class.
_LABEL_BEFORE = (
    re.compile(rf"(?:\d+\t)?(?P<label>-?\d+(?:\.\d+)?)[\t,;|] *(?P<path>.+{_IMAGE})\s*"),
    re.compile(rf'"?(?P<label>-1|[01]|(?i:real|fake)){_SEPARATOR}(?P<path>.+{_IMAGE})"?\s*'),
)

_EXCEL_SEPARATOR = re.compile(r"sep=.\s*")  # a first line that Excel writes and does not show


class TextTable(NamedTuple):
    """A list after its header."""

    names: list[str]
    rows: Iterator[tuple[int, Sequence[str | None]]]  # with the number of their line


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
    with explain_errors(path), open_file(path) as file:
        what = name_container(file.read(HEAD_BYTES))
    if what is not None and not path.name.lower().endswith(".gz"):
        raise UsageError(f"{path} is {what}")
    suffix = find_text_suffix(path.name)
    if suffix in (".jsonl", ".ndjson", ".json"):
        table = _open_json_lines(path)
    else:
        header = list(islice(_read_lines(path, ""), HEADER_LINES))
        separator = _find_separator(header, path_column)
        if separator is None and (table_or_none := _open_labelled(path, path_column, label_column)):
            return table_or_none
        if separator is None and suffix in (".txt", ".lst", ".list"):
            return TextTable([path_column], ((n, (line,)) for n, line in _iterate_text(path)))
        table = _open_csv(path, header, separator or ",")
    names = rename_columns(table.names, path_column, label_column)
    if path_column not in names:
        is_header = not any(re.search(rf"{_IMAGE}$", name) for name in names)
        raise UsageError(
            f"{path}: no column {path_column!r}, only {shorten(', '.join(names), 500) or 'none'}; "
            + (remedy if is_header else "put a line with names before them")
        )
    return table._replace(names=names)


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


def _open_csv(path: AnyPath, header: Sequence[str], separator: str) -> TextTable:
    """Open a list with a header; spaces around values are dropped if the header has them."""
    first = next((line for line in header if line.strip()), "")
    has_spaces = f"{separator} " in first or f" {separator}" in first
    rows = _iterate_csv(path, separator, has_spaces)
    names = [name.strip() for name in next(rows, (1, []))[1]]
    return TextTable(names, rows)


def _iterate_csv(
    path: AnyPath, separator: str, has_spaces: bool
) -> Iterator[tuple[int, Sequence[str]]]:
    csv.field_size_limit(MAX_FIELD_CHARS)  # it is the process's
    reader = csv.reader(
        _read_lines(path, ""), delimiter=separator, strict=True, skipinitialspace=has_spaces
    )
    num_columns = None
    try:
        for values in reader:
            if not any(value.strip() for value in values) and len(values) <= 1:
                continue
            num_columns = num_columns or len(values)
            while len(values) > num_columns and not values[-1].strip():
                values.pop()  # a comma that ends the line, but not the header
            if len(values) != num_columns:
                raise UsageError(
                    f"{path}, line {reader.line_num}: {len(values)} values for {num_columns}"
                    f" columns; quote values that hold a {_name_separator(separator)}"
                )
            yield reader.line_num, [v.strip() for v in values] if has_spaces else values
    except csv.Error as error:
        raise UsageError(f"{path}, line {reader.line_num}: {error}") from error


def _name_separator(separator: str) -> str:
    return {",": "comma", "\t": "tab", ";": "semicolon", "|": "bar"}[separator]


def _open_labelled(path: AnyPath, path_column: str, label_column: str) -> TextTable | None:
    """Open a list without a header, a label beside each path; None if any line is no such line.

    Numbers beyond 0 and 1 are classes of something else: their column is `class`.
    """
    for patterns in (_LABEL_BEHIND, _LABEL_BEFORE):
        if labels := _find_labels(path, patterns):
            is_class = any(re.fullmatch(r"-?\d+", label) for label in labels - {"0", "1", "-1"})
            match = partial(_match_labelled, patterns)
            rows = ((n, match(line) or (line, None)) for n, line in _iterate_text(path))
            return TextTable([path_column, "class" if is_class else label_column], rows)
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


def _iterate_text(path: AnyPath) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(_read_lines(path, "\n"), 1):
        if text := line.rstrip("\n").removesuffix("\r"):
            yield number, text


def _open_json_lines(path: AnyPath) -> TextTable:
    """Open a list of JSON objects; the columns are the names that occur in any of them."""
    names = list(dict.fromkeys(name for _, record in _iterate_json(path) for name in record))
    rows = (
        (number, [_write_value(record.get(name)) for name in names])
        for number, record in _iterate_json(path)
    )
    return TextTable(names, rows)


def _iterate_json(path: AnyPath) -> Iterator[tuple[int, dict[str, Any]]]:
    if find_text_suffix(path.name) == ".json":
        yield from enumerate(_read_json_array(path), 1)
        return
    for number, line in _iterate_text(path):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}, line {number}: no JSON ({error})") from error
        if not isinstance(record, dict):
            raise UsageError(f"{path}, line {number}: no JSON object; give one a line")
        yield number, record


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


def _read_lines(path: AnyPath, newline: str) -> Iterator[str]:
    """Yield lines with their ends; `newline` is that of `open`."""
    with explain_errors(path), ExitStack() as stack:
        file: Any = stack.enter_context(open_file(path))
        try:
            if path.suffix.lower() == ".gz":
                file = stack.enter_context(gzip.open(file))
            text = io.TextIOWrapper(file, encoding="utf-8-sig", newline=newline)
            stack.enter_context(text)
            for number, line in enumerate(iter(partial(text.readline, MAX_FIELD_CHARS), "")):
                if len(line) == MAX_FIELD_CHARS:
                    raise UsageError(
                        f"{path}, line {number + 1}: more than {MAX_FIELD_CHARS:,} characters; a"
                        " list has a line for each image"
                    )
                if number or not _EXCEL_SEPARATOR.fullmatch(line):
                    yield line
        except UnicodeDecodeError as error:
            raise UsageError(f"{path}: not UTF-8 ({error}); save the list as UTF-8") from error
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UsageError(f"{path}: not a whole gzip file ({error}); copy it again") from error
