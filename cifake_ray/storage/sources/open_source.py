"""Opens the source of images that a command names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cifake_ray.config import SourceConfig
from cifake_ray.core.imaging.containers import HEAD_BYTES, name_container
from cifake_ray.core.labels import make_class_names
from cifake_ray.errors import NothingToDo, StorageError, UsageError
from cifake_ray.storage.io.files import exists, is_file, open_file
from cifake_ray.storage.io.paths import AnyPath, explain_errors, is_inside
from cifake_ray.storage.sources.folder import FolderSource
from cifake_ray.storage.sources.fsspec_prefix import FsspecPrefixSource
from cifake_ray.storage.sources.list_file import ListFileSource
from cifake_ray.storage.sources.parquet import ParquetSource, open_parquet
from cifake_ray.storage.sources.s3_inventory import INVENTORY_NAME, S3InventorySource
from cifake_ray.storage.sources.s3_prefix import S3PrefixSource
from cifake_ray.storage.sources.source import KeyFilter, Source
from cifake_ray.storage.sources.text_table import find_text_suffix

GLANCE_KEYS = 1000  # what S3 lists in one request; no more of a bucket is looked at here


def split_prefix(uri: str) -> tuple[str, str]:
    """Return bucket and prefix of s3://BUCKET/PREFIX, unchanged; the prefix ends with a slash."""
    bucket, _, prefix = uri.partition("://")[2].partition("/")
    return bucket, prefix if not prefix or prefix.endswith("/") else prefix + "/"


def iterate_names(place: AnyPath, uri: str) -> Iterator[str]:
    """Yield paths below a folder: all that lie directly in it, or in S3 the first keys below it."""
    with explain_errors(place):
        if isinstance(place, Path):
            yield from (path.name for path in place.iterdir())
        elif uri.startswith("s3://"):
            bucket, prefix = split_prefix(uri)
            page = place.fs.call_s3(
                "list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=GLANCE_KEYS
            )
            yield from (entry["Key"][len(prefix) :] for entry in page.get("Contents", ()))
        else:
            own = place.path.rstrip("/")  # some stores list a file or folder within itself
            names = (name.rstrip("/") for name in place.fs.ls(own, detail=False))
            yield from (name.rpartition("/")[2] for name in names if name != own)


def check_there(place: AnyPath, uri: str) -> bool:
    """Return True for a file and False for a folder. StorageError when there is neither."""
    if isinstance(place, Path):
        if not exists(place):
            raise StorageError(f"{place}: no such file or folder; check the path")
        return not place.is_dir()
    if not uri.endswith("/") and is_file(place):
        return True
    try:
        is_empty = next(iterate_names(place, uri), None) is None
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError) and not uri.startswith("s3://"):
            is_empty = True  # S3 says this of a bucket, the others of a folder
        else:
            raise
    if is_empty:
        bucket, prefix = split_prefix(uri)
        raise NothingToDo(
            f"{uri}: the bucket {bucket!r} holds nothing below {prefix!r}; check the bucket and the"
            " prefix"
        )
    return False


def detect_kind(place: AnyPath, uri: str) -> str:
    """Return folder, list, inventory or shards. UsageError when it is none of them."""
    if not check_there(place, uri):
        if exists(place / "_run.json"):
            return "shards"
        names = iterate_names(place, uri)
        has_tables = any(name.endswith(".parquet") and "/" not in name for name in names)
        return "shards" if has_tables else "folder"
    suffix = place.suffix.lower()
    if suffix == ".parquet":
        with open_parquet(place) as table:
            return "shards" if "image" in table.schema_arrow.names else "list"
    if find_text_suffix(place.name):
        return "list"
    if place.name == INVENTORY_NAME:
        return "inventory"
    with explain_errors(place), open_file(place) as file:
        what = name_container(file.read(HEAD_BYTES))
    if what is not None:
        raise UsageError(f"{place} is {what}")
    raise UsageError(
        f"{place} is one file, neither a list (.csv, .tsv, .txt, .jsonl, .parquet) nor the"
        f" {INVENTORY_NAME} of an S3 Inventory; give its folder (in a bucket with / at the end),"
        " and --include for an image"
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
    if kind == "auto":
        kind = detect_kind(src, config.src)
    elif check_there(src, config.src) and kind == "folder":
        raise UsageError(f"{src} is a file; --source-kind folder needs a folder")
    key_filter = KeyFilter(config.include, config.exclude)
    class_names = make_class_names(config.real_name, config.fake_name)
    if kind == "shards":
        return ParquetSource(src, key_filter=key_filter, min_shard_rows=config.shard_size)
    if kind == "list":
        columns = (config.path_column, config.label_column, config.source_column)
        return ListFileSource(src, *columns, key_filter, config.allow_prefix, store, class_names)
    if kind == "inventory":
        return S3InventorySource(src, class_names, store, key_filter)
    check_outside(out, src)
    if isinstance(src, Path):
        return FolderSource(
            src,
            class_names,
            key_filter,
            config.follow_symlinks,
            config.label_column,
            config.source_column,
        )
    if config.src.startswith("s3://"):
        bucket, prefix = split_prefix(config.src)
        return S3PrefixSource(bucket, prefix, store, class_names, key_filter)
    return FsspecPrefixSource(src, class_names, store, key_filter)
