"""The columns of lists and Parquet files: which mean something, and which travel with the rows."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from cifake_ray.config import SourceConfig
from cifake_ray.core.labels import make_class_names, parse_split, read_folder_name
from cifake_ray.core.schema import (
    HEADER_FIELDS,
    MANIFEST_FIELDS,
    PROVENANCE_FIELDS,
    SCORE_FIELDS,
    SHARD_FIELDS,
    THUMBNAIL_FIELD,
)
from cifake_ray.errors import UsageError
from cifake_ray.storage.io.paths import AnyPath

RESERVED_COLUMNS = {field.name for field in [*MANIFEST_FIELDS, *SHARD_FIELDS, *SCORE_FIELDS]}
# What convert and score measure themselves; the others of one of these names are left out.
MEASURED_COLUMNS = {field.name for field in HEADER_FIELDS} | {"sha256"}
REPLACED = "(the output has its own)"
# Names of the column of paths, in any case and spelling, if none has the name `path`.
PATH_NAMES = """
filename filepath imagepath imgpath image img imagename imgname imagefile file fname relativepath
relpath fullpath images
"""
# Names of columns of splits, if none has the name `split`: as far as their values are splits.
SPLIT_COLUMNS = ("subset", "partition", "set", "usage", "phase")


@dataclass(frozen=True, kw_only=True)
class ColumnChoice:
    """The columns that a command names, and what class names mean in them."""

    image: str | None = None
    path: str = "path"
    label: str = "label"
    source: str = "source"
    drop: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    class_names: Mapping[str, int] = field(default_factory=make_class_names)
    reserved: frozenset[str] = frozenset(RESERVED_COLUMNS)

    @classmethod
    def from_config(cls, config: SourceConfig) -> ColumnChoice:
        return cls(
            image=config.image_column,
            path=config.path_column,
            label=config.label_column,
            source=config.source_column,
            drop=config.drop_columns,
            keep=config.keep_column,
            class_names=make_class_names(config.real_name, config.fake_name),
            reserved=frozenset(RESERVED_COLUMNS)
            | {field.name for field in PROVENANCE_FIELDS if getattr(config, "provenance", False)}
            | ({THUMBNAIL_FIELD.name} if getattr(config, "thumbnails", False) else set()),
        )

    def check_names(self, names: Iterable[str], place: AnyPath) -> None:
        """Raise UsageError for an option that names a column that is not there."""
        names = list(names)
        options = [("--image-column", self.image)]
        options += [("--label-column", self.label)] if self.label != "label" else []
        options += [("--source-column", self.source)] if self.source != "source" else []
        options += [("--drop-columns", name) for name in self.drop]
        options += [("--keep-column", name) for name in self.keep]
        for option, name in options:
            if name is not None and name not in names:
                raise UsageError(
                    f"{place}: {option} {name}: no such column, only {', '.join(names) or 'none'}"
                )

    def choose_extra(
        self, fields: Iterable[pa.Field], place: AnyPath, replaced: set[str]
    ) -> tuple[list[pa.Field], list[str]]:
        """Return the columns that travel with the rows, and why others do not: `mask (binary)`.

        Those of simple values travel, and what `--keep-column` names. A name in `replaced` is one
        that the output fills itself. UsageError for other names that the output uses.
        """
        kept, left_out = [], []
        for column in fields:
            if column.name in self.drop:
                continue
            if column.name in replaced | {"label", "source"}:  # these: options name others
                left_out.append(f"{column.name} {REPLACED}")
            elif column.name in self.reserved:
                raise UsageError(
                    f"{place}: the column {column.name!r} has a name that the output uses; rename"
                    f" it, or leave it out with --drop-columns {column.name}"
                )
            elif column.name in self.keep or is_simple(column.type):
                kept.append(pa.field(column.name, find_value_type(column.type)))
            else:
                left_out.append(f"{column.name} ({describe_type(column.type)})")
        return kept, left_out


def find_column(names: Iterable[str], wanted: str) -> str | None:
    """Return the column of a name, else the only one that differs in case or by an `s`."""
    names = list(names)
    found = [name for name in names if name.lower() in (wanted.lower(), f"{wanted.lower()}s")]
    return wanted if wanted in names else found[0] if len(found) == 1 else None


def rename_columns(names: Sequence[str], path_column: str, label_column: str) -> list[str]:
    """Return the names, those of known columns as they are asked for: `Label`, `file_name`."""
    renamed = list(names)
    for wanted in (path_column, label_column, "split", "source"):
        found = find_column(renamed, wanted)
        plain = [re.sub(r"[\W_]+", "", name.lower()) for name in renamed]
        for other in PATH_NAMES.split() if wanted == "path" else ():
            if found is None and plain.count(other) == 1:
                found = renamed[plain.index(other)]
        if found is not None:
            renamed[renamed.index(found)] = wanted
    return renamed


def find_split_column(names: Iterable[str]) -> str | None:
    """Return the column of splits, or one that may hold them: see `make_split_reader`."""
    names = list(names)
    found = (find_column(names, wanted) for wanted in ("split", *SPLIT_COLUMNS))
    return next((name for name in found if name is not None), None)


def make_split_reader(column: str | None) -> Callable[[object], str | None]:
    """Return what reads a column of splits; of one with another name, only the known words."""
    if column is None or find_column([column], "split"):
        return parse_split
    return lambda value: read_folder_name(str(value), {}).split


def describe_left_out(left_out: Collection[str]) -> str:
    """Return a line that names columns which do not travel."""
    line = f"left out columns: {', '.join(left_out)}"
    is_all_replaced = all(reason.endswith(REPLACED) for reason in left_out)
    return line if is_all_replaced else f"{line}; --keep-column NAME keeps one of another type"


def describe_unlabelled(wanted: str, columns: Iterable[str]) -> str:
    """Return a line for a table without a column of labels."""
    return f"no labels: no column `{wanted}`, only {', '.join(columns)}; --label-column names one"


def find_value_type(column_type: pa.DataType) -> pa.DataType:
    """Return the type of the values of a column, which may be written as a dictionary."""
    return column_type.value_type if pa.types.is_dictionary(column_type) else column_type


def is_binary(column_type: pa.DataType) -> bool:
    """Return whether a type is one of bytes."""
    kinds = ("is_binary", "is_large_binary", "is_fixed_size_binary", "is_binary_view")
    return any(getattr(pa.types, kind)(column_type) for kind in kinds)


def is_text(column_type: pa.DataType) -> bool:
    """Return whether a type is one of text."""
    kinds = ("is_string", "is_large_string", "is_string_view")
    return any(getattr(pa.types, kind)(column_type) for kind in kinds)


def is_simple(column_type: pa.DataType) -> bool:
    """Return whether a type is one of numbers, words or times: no bytes, and nothing nested."""
    value_type = find_value_type(column_type)
    is_extension = isinstance(value_type, pa.BaseExtensionType)
    return not (pa.types.is_nested(value_type) or is_binary(value_type) or is_extension)


def describe_type(column_type: pa.DataType) -> str:
    """Return a short name of a type: `binary`, `struct`, `list`, `int64`."""
    return str(column_type).partition("<")[0]


def check_text(column: pa.Field, place: AnyPath) -> None:
    """Raise UsageError when the values of a column cannot be written as text."""
    if not is_simple(column.type):
        raise UsageError(
            f"{place}: the column {column.name!r} holds {describe_type(column.type)}, no text;"
            f" leave it out with --drop-columns {column.name}"
        )


def read_label_names(schema: pa.Schema, column: str) -> list[str] | None:
    """Return class names in the order of their numbers, if a Hugging Face footer has them."""
    feature = _read_features(schema).get(column)
    names = feature.get("names") if isinstance(feature, dict) else None
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return names if is_list else None


def _read_features(schema: pa.Schema) -> dict[str, Any]:
    """Return the features of a Hugging Face footer; none when it is not what they write."""
    try:
        found = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
