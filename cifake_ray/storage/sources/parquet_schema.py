"""Choose the columns of a manifest whose images are in Parquet files, from the footers of all."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pyarrow as pa

from cifake_ray.core.schema import MANIFEST_FIELDS, SHARD_FIELDS
from cifake_ray.errors import StorageError
from cifake_ray.storage.io.paths import AnyPath
from cifake_ray.storage.sources.columns import (
    ColumnChoice,
    describe_left_out,
    describe_unlabelled,
    find_column,
)
from cifake_ray.storage.sources.image_table import ImageTable

NUM_FOOTER_THREADS = 16
REPLACED_COLUMNS = {f.name for f in MANIFEST_FIELDS + SHARD_FIELDS}


class _Footer(NamedTuple):
    schema: pa.Schema
    is_foreign: bool
    used: set[str | None]  # columns that have a meaning
    has_label: bool  # a column of labels
    is_unlabelled: bool  # neither has it one, nor does its path say one


def choose_schema(
    root: AnyPath, paths: Mapping[str, AnyPath], choice: ColumnChoice, needs_labels: bool
) -> tuple[pa.Schema, list[str]]:
    """Return the columns that any of some files has, and notes on what is left out or missing.

    `paths` are by their names below `root`. StorageError when they disagree on a column.
    """

    def read_footer(name: str) -> _Footer:
        with ImageTable(paths[name], name, choice) as table:
            has_label = table.label is not None
            return _Footer(
                table.schema.remove_metadata(),
                table.has_images and not table.is_ours,
                {"key", find_column(table.columns, "split"), choice.image}
                | {table.label, table.source},
                has_label,
                table.has_images and not has_label and table.of_path.label is None,
            )

    with ThreadPoolExecutor(NUM_FOOTER_THREADS) as threads:
        footers = list(threads.map(read_footer, paths))
    names = {name: 0 for footer in footers for name in footer.schema.names}
    choice.check_names(names, root)
    kept, left_out, notes = [], dict[str, None](), list[str]()
    for path, footer in zip(paths.values(), footers, strict=True):
        others = [column for column in footer.schema if column.name not in footer.used]
        extra, dropped = choice.choose_extra(others, path, REPLACED_COLUMNS)
        kept.append(pa.schema(extra))
        left_out |= dict.fromkeys(dropped if footer.is_foreign else ())
    if left_out:
        notes.append(describe_left_out(left_out))
    if (
        needs_labels
        and choice.label not in choice.drop
        and any(footer.is_unlabelled for footer in footers)
        and not any(footer.has_label for footer in footers)
    ):
        notes.append(describe_unlabelled(choice.label, names))
    try:
        unified = pa.unify_schemas(kept, promote_options="permissive")
    except pa.ArrowException as error:
        raise StorageError(
            f"{root}: the files disagree on a column ({error}); leave it out with --drop-columns"
        ) from error
    return pa.schema([*MANIFEST_FIELDS, *unified]), notes
