"""Export scores to one file, or to the layout of another program."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc

from cifake_ray.config import ExportConfig
from cifake_ray.core.evaluation.margin import find_margin
from cifake_ray.core.schema import THUMBNAIL_FIELD
from cifake_ray.errors import CifakeError, StorageError, UsageError
from cifake_ray.storage.io.files import exists, make_folder, write_chunks
from cifake_ray.storage.io.paths import AnyPath, is_inside
from cifake_ray.storage.io.records import PARQUET_ERRORS
from cifake_ray.storage.runs.export_layouts import (
    ImageFiles,
    describe_dataset,
    encode_image_parquet,
    encode_imagefolder,
    encode_samples,
    encode_tasks,
)
from cifake_ray.storage.runs.export_tables import (
    Tables,
    encode_csv,
    encode_json_lines,
    encode_keys,
    encode_parquet,
)
from cifake_ray.storage.runs.read_scores import LISTING, Scores, find_threshold, open_scores
from cifake_ray.storage.runs.sort_rows import sort_rows

EXISTS = "{} exists; choose another file, or give --overwrite"
MARGIN = pa.field("margin", pa.float64(), metadata={"computed": ""})

CONDITION = re.compile(r"\s*(.+?)\s*(>=|<=|==|!=|=|>|<)\s*(.*?)\s*", re.DOTALL)
COMPARE = {
    ">=": pc.greater_equal,
    "<=": pc.less_equal,
    ">": pc.greater,
    "<": pc.less,
    "=": pc.equal,
    "==": pc.equal,
    "!=": pc.not_equal,
}
TABLE_FORMATS: dict[str, Callable[[Tables], Iterator[bytes]]] = {
    "csv": encode_csv,
    "parquet": encode_parquet,
    "jsonl": encode_json_lines,
    "txt": encode_keys,
}
IMAGE_FORMATS: dict[str, Callable[[Tables, ImageFiles], Iterator[bytes]]] = {
    "label-studio": encode_tasks,
    "fiftyone": encode_samples,
    "imagefolder": encode_imagefolder,
    "parquet-images": encode_image_parquet,
}


def export_scores(
    scores: AnyPath, file: AnyPath, config: ExportConfig, counts: Counter[str] | None = None
) -> int:
    """Write the scores of a run to a file, whole or not at all; return the number of rows.

    `counts` gets it too, and what is missing. UsageError when the file exists and `config` does not
    replace it.
    """
    if exists(scores / "_run.json") and is_inside(file, scores):
        raise UsageError(f"{file} is inside {scores}; choose a file outside it")
    counts = Counter() if counts is None else counts
    chunks = encode_scores(scores, config, counts, file)
    if config.chosen_format == "fiftyone":
        metadata = file / "metadata.json"
        refuse_existing(metadata, overwrite=config.overwrite)
        write_export(file / "samples.json", chunks, overwrite=config.overwrite)
        dataset = describe_dataset(open_scores(scores))
        write_export(metadata, [dataset], overwrite=config.overwrite)
    else:
        write_export(file, chunks, overwrite=config.overwrite)
    return counts["rows"]


def write_export(file: AnyPath, chunks: Iterable[bytes], *, overwrite: bool) -> None:
    """Write a file, whole or not at all. UsageError when it exists and is not to be replaced."""
    refuse_existing(file, overwrite=overwrite)
    make_folder(file.parent)
    try:
        write_chunks(file, chunks, overwrite=overwrite)
    except FileExistsError as error:  # it appeared meanwhile
        raise UsageError(EXISTS.format(file)) from error


def refuse_existing(file: AnyPath, *, overwrite: bool) -> None:
    """Raise UsageError when a file exists and is not to be replaced."""
    if not overwrite and exists(file):
        raise UsageError(EXISTS.format(file))


def encode_scores(
    folder: AnyPath, config: ExportConfig, counts: Counter[str], file: AnyPath | None = None
) -> Iterator[bytes]:
    """Yield the bytes of the export, and count its rows in `counts`; `file` is where they go.

    Memory is that of a shard, with `--sort` of `sort_rows.RUN_ROWS` rows too.
    """
    yield from encode_shards(open_scores(folder), config, counts, file)


def encode_shards(
    scores: Scores,
    config: ExportConfig,
    counts: Counter[str],
    file: AnyPath | None = None,
    schema: pa.Schema | None = None,
) -> Iterator[bytes]:
    """Yield what `encode_scores` does, of scores that are open.

    With a `schema` a table gets its types. StorageError when one has other columns.
    """
    chosen = config.chosen_format
    tables = _choose_rows(scores, config, counts)
    if schema is not None:
        tables = _match_schema(tables, schema)
    try:
        if chosen in TABLE_FORMATS:
            yield from TABLE_FORMATS[chosen](tables)
        else:
            files = ImageFiles.find(scores, config, counts, file)
            yield from IMAGE_FORMATS[chosen](tables, files)
    except CifakeError:
        raise
    except (*PARQUET_ERRORS, ArithmeticError, TypeError) as error:  # values that Python cannot hold
        raise StorageError(
            f"{scores.folder}: rows cannot be exported as {chosen} ({error}); choose another format"
            " or other --columns"
        ) from error


def _choose_rows(scores: Scores, config: ExportConfig, counts: Counter[str]) -> Tables:
    """Yield what the options choose, in their order, with LISTING for formats that need images."""
    with_listing = config.chosen_format in IMAGE_FORMATS
    sort_keys = config.sort_keys
    used = [name for name, _ in sort_keys] + config.column_names + [config.by]
    uses_margin = MARGIN.name in used or any(
        condition.lstrip().startswith(MARGIN.name) for condition in config.where
    )
    tables = _filter_rows(scores, config, with_listing=with_listing, with_margin=uses_margin)
    if sort_keys or config.top is not None:
        sort = partial(sort_rows, keys=sort_keys, top=config.top, by=config.by)
        tables = ((scores.folder, rows) for rows in sort(_match_columns(tables, config)))
    for path, table in tables:
        for name in config.column_names:
            _check_column(table, name, "--columns")
        counts["rows"] += table.num_rows
        unasked = [
            field.name
            for field in (MARGIN, THUMBNAIL_FIELD)
            if field in list(table.schema) and field.name not in config.column_names
        ]
        table = table.drop_columns(unasked)
        if config.column_names and not with_listing:
            table = table.select(config.column_names)
        yield path, table


def read_schema(scores: Scores, config: ExportConfig) -> pa.Schema:
    """Return the columns of an export, by the first shard.

    UsageError for options that do not fit it.
    """
    first = replace(scores, paths=scores.paths[:1])
    _, table = next(_choose_rows(first, config, Counter()))
    schema: pa.Schema = table.schema.remove_metadata()  # it is about a shard
    return schema


def _match_schema(tables: Tables, schema: pa.Schema) -> Tables:
    for path, table in tables:
        if table.schema.names != schema.names:
            raise StorageError(f"{path}: other columns than the first; choose --columns")
        yield path, table.cast(schema)


def _filter_rows(
    scores: Scores, config: ExportConfig, *, with_listing: bool, with_margin: bool
) -> Tables:
    for path, table in scores.read_shards(with_listing=with_listing):
        if with_margin and MARGIN.name not in table.column_names:
            table = table.append_column(MARGIN, compute_margin(path, table))
        for condition in config.where:
            table = table.filter(_find_rows(table, condition))
        yield path, table


def _match_columns(tables: Tables, config: ExportConfig) -> Iterator[pa.Table]:
    """Yield tables that can be sorted together. StorageError when their columns differ."""
    schema: pa.Schema | None = None
    for path, table in tables:
        if schema is None:
            for name in [*(name for name, _ in config.sort_keys), config.by]:
                if name is not None:
                    _check_column(table, name, "--by" if name == config.by else "--sort")
            fields = [
                f.with_type(f.type.value_type) if pa.types.is_dictionary(f.type) else f
                for f in table.schema
            ]
            schema = pa.schema(fields, metadata=table.schema.metadata)
        if table.schema.names != schema.names:
            raise StorageError(f"{path}: other columns than the first, so --sort cannot join them")
        yield table.cast(schema)


def compute_margin(path: AnyPath, table: pa.Table) -> pa.Array:
    """Return the distance of p_fake to the threshold in log-odds, 0 or more; null without a score.

    UsageError for files that do not say their threshold.
    """
    threshold = find_threshold(table)
    if threshold is None or "p_fake" not in table.column_names:
        raise UsageError(f"{path}: no p_fake with a threshold, so it has no margin")
    return pa.array(find_margin(table.column("p_fake").to_numpy(), threshold), from_pandas=True)


def _check_column(table: pa.Table, name: str, option: str) -> None:
    if name not in table.column_names:
        there = ", ".join(n for n in table.column_names if n != LISTING)
        raise UsageError(f"{option}: there is no column {name!r}; there are {there}")


def _find_rows(table: pa.Table, condition: str) -> pa.ChunkedArray:
    """Return which rows satisfy `COLUMN OPERATOR VALUE`; a null satisfies only `= null`."""
    match = CONDITION.fullmatch(condition)
    if match is None:
        raise UsageError(f"--where {condition!r}: give COLUMN OPERATOR VALUE, as 'p_fake >= 0.9'")
    name, operator, text = match.groups()
    _check_column(table, name, "--where")
    column = table.column(name)
    if text == "null" and operator in ("=", "==", "!="):
        return pc.is_valid(column) if operator == "!=" else pc.is_null(column)
    try:
        value = pa.scalar(text.strip("'\"")).cast(column.type)
        return COMPARE[operator](column, value)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UsageError(
            f"--where {condition!r}: {text!r} cannot be compared with {name} ({column.type})"
        ) from error
