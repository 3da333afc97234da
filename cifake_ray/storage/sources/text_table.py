"""The rows of a list that is text: .csv, .tsv, .txt or .jsonl, each also as .gz.

Separator, spaces around it and a missing header are found in the text itself; the suffix only says
whether lines without any of that are paths (.txt) or an error.
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
from typing import Any, NamedTuple

from cifake_ray.core.imaging.containers import HEAD_BYTES, name_container
from cifake_ray.errors import UsageError
from cifake_ray.storage.io.files import open_file
from cifake_ray.storage.io.paths import AnyPath, explain_errors

TEXT_SUFFIXES = (".csv", ".tsv", ".txt", ".jsonl", ".ndjson")
SEPARATORS = (",", "\t", ";", "|")
# Names of the column of paths, in any case, if none has the name `path`.
PATH_NAMES = ("file_name", "filename", "file_path", "filepath", "image_path", "img_path", "image")
HEADER_LINES = 20  # a name in the header may hold line breaks
MAX_LABELS = 1000  # that are told apart
# Prompts and workflows are long. An open quote ends here, and not with the memory.
MAX_FIELD_CHARS = 64 * 2**20
# `a b.jpg 0` and `a.png,fake`: lists of ImageNet, Caffe and timm have no header.
_SEPARATOR = r'"?(?:[ \t]*[,;|\t][ \t]*|[ \t]+)'
_NUMBERED = re.compile(rf'"?(.+?\.\w{{1,5}}){_SEPARATOR}(-?\d+)\s*')
_NAMED = re.compile(
    rf'"?(.+?\.(?i:jpe?g|jfif|png|webp|gif|bmp|tiff?|avif|heic)){_SEPARATOR}([^\W\d]\w*)\s*'
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


def open_text_table(path: AnyPath, path_column: str, label_column: str) -> TextTable:
    """Read the header of a list. UsageError when it has no column of paths."""
    with explain_errors(path), open_file(path) as file:
        what = name_container(file.read(HEAD_BYTES))
    if what is not None and not path.name.lower().endswith(".gz"):
        raise UsageError(f"{path} is {what}")
    suffix = find_text_suffix(path.name)
    if suffix in (".jsonl", ".ndjson"):
        table = _open_json_lines(path)
    else:
        header = list(islice(_read_lines(path, ""), HEADER_LINES))
        separator = _find_separator(header, path_column)
        if separator is None and (table_or_none := _open_labelled(path, path_column, label_column)):
            return table_or_none
        if separator is None and suffix == ".txt":
            return TextTable([path_column], ((n, (line,)) for n, line in _iterate_text(path)))
        table = _open_csv(path, header, separator or ",")
    names = _rename(table.names, path_column, label_column)
    if path_column not in names:
        raise UsageError(
            f"{path}: no column {path_column!r}, only {', '.join(names) or 'none'};"
            " name it with --path-column"
        )
    return table._replace(names=names)


def _rename(names: Sequence[str], path_column: str, label_column: str) -> list[str]:
    """Return the names, those of known columns as they are asked for: `Label`, `file_name`."""
    renamed = list(names)
    for wanted in (path_column, label_column, "split", "source"):
        others = [wanted, *PATH_NAMES] if wanted == "path" else [wanted]
        for other in others:
            found = [i for i, name in enumerate(renamed) if name.lower() == other.lower()]
            if wanted not in renamed and len(found) == 1:
                renamed[found[0]] = wanted
    return renamed


def _find_separator(header: Sequence[str], path_column: str) -> str | None:
    """Return the separator with which the first line is a header with a column of paths."""
    for separator in SEPARATORS:
        names = _read_header(header, separator)
        if path_column in _rename(names, path_column, "label") and (
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
            if not values:
                continue
            num_columns = num_columns or len(values)
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
    """Open a list without a header, a label behind each path; None if any line is no such line.

    Numbers beyond 0 and 1 are classes of something else: their column is `class`.
    """
    labels: set[str] = set()
    for _, line in _iterate_text(path):
        found = _match_labelled(line)
        if found is None:
            return None
        if not labels and isinstance(path, Path) and os.path.lexists(path.parent / line):
            return None  # the name of a file that only looks like a path and a label
        if len(labels) < MAX_LABELS:
            labels.add(found[1])
    if not labels:
        return None
    is_class = any(re.fullmatch(r"-?\d+", label) for label in labels - {"0", "1", "-1"})
    rows = ((n, _match_labelled(line) or (line, None)) for n, line in _iterate_text(path))
    return TextTable([path_column, "class" if is_class else label_column], rows)


def _match_labelled(line: str) -> tuple[str, str] | None:
    match = _NUMBERED.fullmatch(line) or _NAMED.fullmatch(line)
    return None if match is None else (match[1], match[2])


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
    for number, line in _iterate_text(path):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}, line {number}: no JSON ({error})") from error
        if not isinstance(record, dict):
            raise UsageError(f"{path}, line {number}: no JSON object; give one a line")
        yield number, record


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
