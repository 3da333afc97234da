"""Opens whatever a person names as the source of images.

Floor: storage.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

from cifake_ray.config import SourceConfig
from cifake_ray.core.labels import make_class_names
from cifake_ray.errors import StorageError
from cifake_ray.storage.folders import FolderSource
from cifake_ray.storage.listing import KeyFilter, Source
from cifake_ray.storage.lists import ListSource
from cifake_ray.storage.places import resolve_path
from cifake_ray.storage.tables import TableSource

LIST_SUFFIXES = (".csv", ".txt", ".parquet")


def detect_kind(path: Path) -> str:
    """folder, list or shards. ValueError when it is none of them."""
    if path.is_dir():
        if (path / "_run.json").exists():
            return "shards"
        if any(path.glob("*.parquet")):
            return "shards"
        return "folder"
    if path.suffix.lower() == ".parquet":
        try:
            return "shards" if "image" in pq.read_schema(path).names else "list"
        except (OSError, ValueError) as error:
            raise StorageError(f"{path}: not a readable Parquet file ({error})") from error
    if path.suffix.lower() in LIST_SUFFIXES:
        return "list"
    raise ValueError(f"{path}: neither a folder nor a .csv, .txt or .parquet file")


def open_source(config: SourceConfig) -> Source:
    """The source `config.src` names. StorageError or ValueError when there is none."""
    path, out = resolve_path(config.src), resolve_path(config.out)
    if not path.exists():
        raise StorageError(f"{path}: no such file or folder; check the path")
    kind = detect_kind(path) if config.source_kind == "auto" else config.source_kind
    key_filter = KeyFilter(config.include, config.exclude)
    if kind == "shards":
        return TableSource(path, key_filter=key_filter, min_shard_rows=config.shard_size)
    if kind == "list":
        return ListSource(
            path, config.path_column, config.label_column, config.source_column, key_filter
        )
    if not path.is_dir():
        raise ValueError(f"{path} is a file; --source-kind folder needs a folder")
    if out.resolve().is_relative_to(path.resolve()):
        raise ValueError(
            f"the output {out} lies inside the source {path}; choose a folder outside it, or the"
            " output would become input"
        )
    class_names = make_class_names(config.real_name, config.fake_name)
    return FolderSource(path, class_names, key_filter)
