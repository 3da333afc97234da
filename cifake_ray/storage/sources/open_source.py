"""Opens the source of images that a command names."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

from cifake_ray.config import SourceConfig
from cifake_ray.core.imaging.containers import HEAD_BYTES, name_container
from cifake_ray.errors import StorageError, UsageError
from cifake_ray.storage.io.files import exists, open_file
from cifake_ray.storage.io.paths import AnyPath, explain_errors, is_inside
from cifake_ray.storage.sources.columns import ColumnChoice
from cifake_ray.storage.sources.folder import FolderSource
from cifake_ray.storage.sources.fsspec_prefix import FsspecPrefixSource
from cifake_ray.storage.sources.glance import GLANCE_KEYS, check_there, glance_files, split_prefix
from cifake_ray.storage.sources.image_table import find_image_column
from cifake_ray.storage.sources.list_file import ListFileSource
from cifake_ray.storage.sources.parquet import (
    ParquetSource,
    choose_image_column,
    is_table_name,
)
from cifake_ray.storage.sources.s3_inventory import INVENTORY_NAME, S3InventorySource
from cifake_ray.storage.sources.s3_prefix import S3PrefixSource
from cifake_ray.storage.sources.source import KEEP_ALL, KeyFilter, Source
from cifake_ray.storage.sources.tar import (
    TAR_SUFFIXES,
    TarSource,
    holds_tars,
    stamp_tar,
)
from cifake_ray.storage.sources.tar_images import IMAGE_SUFFIXES
from cifake_ray.storage.sources.text_table import TEXT_SUFFIXES, find_text_suffix


def holds_tables(place: AnyPath, uri: str, choice: ColumnChoice) -> bool:
    """Return whether the images of a folder are in Parquet files: if only those may hold any.

    A folder with image files is one of tables too if their Parquet files hold images, as a data set
    with a picture in its description; else the files may describe the images.
    """
    first, has_images = None, False
    for name in glance_files(place, uri):
        if is_table_name(name):
            first = first or name
        has_images |= name.lower().endswith(tuple(IMAGE_SUFFIXES))
    if first is None or not has_images:
        return first is not None
    try:
        column = find_image_column(place / first, choice)
    except StorageError:  # among images, a file that is called Parquet and is none
        return False
    return column is not None and column.content != "paths"


def detect_kind(place: AnyPath, uri: str, choice: ColumnChoice) -> str:
    """Return folder, list, inventory, shards or tar. UsageError when it is none of them."""
    if not check_there(place, uri):
        if exists(place / "_run.json"):
            return "shards"
        if holds_tars(islice(glance_files(place, uri), GLANCE_KEYS)):
            return "tar"
        return "shards" if holds_tables(place, uri, choice) else "folder"
    suffix = place.suffix.lower()
    if place.name.lower().endswith(TAR_SUFFIXES):
        return "tar"
    if suffix == ".parquet":
        column = find_image_column(place, choice)
        return "list" if column is None or column.content == "paths" else "shards"
    if place.name == INVENTORY_NAME:
        return "inventory"
    if find_text_suffix(place.name):
        return "list"
    with explain_errors(place), open_file(place) as file:
        what = name_container(file.read(HEAD_BYTES))
    if what is not None:
        raise UsageError(f"{place} is {what}")
    raise UsageError(
        f"{place} is one file, neither a list ({', '.join(TEXT_SUFFIXES)}, .parquet), a .tar nor"
        f" the {INVENTORY_NAME} of an S3 Inventory; give its folder (in a bucket with / at the"
        " end), and --include for an image"
    )


def check_outside(out: AnyPath, source: AnyPath) -> None:
    """Raise UsageError when the output would lie inside the source."""
    if is_inside(out, source):
        raise UsageError(
            f"the output {out} lies inside the source {source}; choose a folder outside it, or the"
            " output would become input"
        )


def open_source(config: SourceConfig, src: AnyPath, out: AnyPath) -> Source:
    """Open `src`, which `config.src` names; `out` must lie outside it.

    StorageError or UsageError when there is no source.
    """
    store = config.store
    kind: str = config.source_kind
    choice = ColumnChoice.from_config(config)
    if kind == "auto":
        kind = detect_kind(src, config.src, choice)
    elif check_there(src, config.src) and kind == "folder":
        raise UsageError(f"{src} is a file; --source-kind folder needs a folder")
    key_filter = KeyFilter(config.include, config.exclude)
    if kind == "shards" or (kind == "list" and src.suffix.lower() == ".parquet"):
        column = choose_image_column(src, choice)
        if column.content == "paths":
            kind = "list"
        if column.content == "paths" or kind == "shards":
            choice = replace(choice, image=column.name)
    if kind == "shards":
        return ParquetSource(
            src,
            choice,
            needs_labels=config.needs_labels,
            key_filter=key_filter,
            min_shard_rows=config.shard_size,
        )
    if kind == "list":
        return ListFileSource(
            src, choice, config.needs_labels, key_filter, config.allow_prefix, store
        )
    class_names = dict(choice.class_names)
    if kind == "inventory":
        return S3InventorySource(src, class_names, store, key_filter)
    check_outside(out, src)
    is_tar, is_one = kind == "tar", kind == "tar" and check_there(src, config.src)
    kept = KEEP_ALL if is_tar else key_filter
    files: FolderSource | S3PrefixSource | FsspecPrefixSource
    if isinstance(src, Path):
        files = FolderSource(
            src,
            class_names,
            kept,
            config.follow_symlinks or is_one,
            config.label_column,
            config.source_column,
        )
    elif config.src.startswith("s3://"):
        files = S3PrefixSource(*split_prefix(config.src), store, class_names, kept)
    else:
        files = FsspecPrefixSource(src, class_names, store, kept)
    if not is_tar:
        return files
    only = stamp_tar(src, config.src) if is_one else None
    return TarSource(files, class_names, key_filter, config.label_column, config.shard_size, only)
