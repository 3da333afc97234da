"""Read the rows of score and evaluate shard by shard, and the images behind them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import pyarrow as pa

from cifake_ray.config import SourceConfig, StoreConfig
from cifake_ray.core.schema import FOOTER_KEY, SCORE_FIELDS
from cifake_ray.errors import StorageError
from cifake_ray.storage.io.files import exists, list_folder
from cifake_ray.storage.io.paths import AnyPath, resolve_path
from cifake_ray.storage.runs.manifest import read_manifest_shard
from cifake_ray.storage.runs.run import Run
from cifake_ray.storage.runs.shards import read_shard
from cifake_ray.storage.runs.verify import SHARD_NAME, open_finished, read_files
from cifake_ray.storage.sources.allowed_paths import is_uri
from cifake_ray.storage.sources.open_source import open_source
from cifake_ray.storage.sources.source import Source

LISTING = ""  # a column: a list may use any other name for its own


@dataclass(frozen=True)
class Scores:
    """The scores of a folder: a finished run or some shards of it, or the files of one alone."""

    folder: AnyPath
    run: Run | None
    paths: tuple[AnyPath, ...]
    first_shard: int = 0  # of the run, the number of the first path

    def read_shards(
        self, wanted: Iterable[pa.Field] = SCORE_FIELDS[:1], *, with_listing: bool = False
    ) -> Iterator[tuple[AnyPath, pa.Table]]:
        """Yield the rows of each file; `with_listing` adds LISTING, where each image is.

        StorageError when one is damaged, lacks one of the columns in `wanted`, or is not of this
        run.
        """
        for number, path in enumerate(self.paths, self.first_shard):
            table = read_shard(path, SCORE_FIELDS if with_listing else wanted)
            if with_listing:
                listed = self.read_listing(number)
                if not listed.column("key").equals(table.column("key")):
                    raise StorageError(
                        f"{path}: other keys than the manifest has; `cifake-ray verify` checks them"
                    )
                rows = listed.combine_chunks().to_struct_array()
                table = table.append_column(pa.field(LISTING, rows.type), rows)
            yield path, table

    def read_listing(self, shard: int) -> pa.Table:
        """Return the rows of the manifest of a shard, in the order of its scores.

        StorageError when only the files are there.
        """
        run = self.require_run()
        return read_manifest_shard(run.manifest_folder, run.find_file(shard), shard)

    def require_run(self) -> Run:
        """Return the run. StorageError when only its files are there."""
        if self.run is None:
            raise StorageError(
                f"{self.folder}: only scores, which do not say where the images are; give the"
                " folder that has _run.json"
            )
        return self.run

    def open_source(self, store: StoreConfig, allow_prefix: tuple[str, ...] = ()) -> Source:
        """Open what the run has read. StorageError or UsageError when it is gone."""
        run = self.require_run()
        names = {field.name for field in fields(SourceConfig)}
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in run.config.items()
            if name in names
        }
        values |= {"src": self.find_root(), "out": str(run.out), "allow_prefix": allow_prefix}
        values |= {field.name: getattr(store, field.name) for field in fields(StoreConfig)}
        try:
            config = SourceConfig(**values)
        except TypeError as error:
            raise StorageError(
                f"{run.out}/_run.json: not the metadata of a run ({error}); it may have been edited"
            ) from error
        return open_source(config, resolve_path(config.src, store), run.out)

    def find_root(self) -> str:
        """Return what the run has read: a path or URI."""
        run = self.require_run()
        root = run.config.get("src") or run.config.get("shards")
        if not isinstance(root, str):
            raise StorageError(f"{run.out}/_run.json: names no source; it may have been edited")
        return root


def open_scores(folder: AnyPath) -> Scores:
    """Find the score files of a folder. StorageError when there are none, or not all of a run."""
    if exists(folder / "_run.json"):
        run = open_finished(folder, "score or evaluate")
        return Scores(folder, run, tuple(folder / row["name"] for row in read_files(run)))
    paths = [path for path in list_folder(folder) if SHARD_NAME.fullmatch(path.name)]
    if not paths:
        raise StorageError(
            f"{folder}: no part-*.parquet; give the output of score or evaluate, or for a bundle a"
            " file that ends in .onnx"
        )
    return Scores(folder, None, tuple(paths))


def read_footer(table: pa.Table) -> dict[str, Any]:
    """Return what the footer of a shard says, by name; nothing for a file of others."""
    data = (table.schema.metadata or {}).get(FOOTER_KEY, b"{}")
    try:
        footer = json.loads(data)
    except ValueError:
        return {}
    return footer if isinstance(footer, dict) else {}


def find_threshold(table: pa.Table) -> float | None:
    """Return the threshold of a shard; of one that a policy decides, the bundle's own."""
    footer = read_footer(table)
    try:
        found = footer.get("threshold", json.loads(footer.get("thresholds", "{}")).get("default"))
        return None if found is None else float(found)
    except (AttributeError, TypeError, ValueError):
        return None


def take_listing(rows: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Split rows of `read_shards(with_listing=True)` into scores and rows of the manifest."""
    index = rows.schema.get_field_index(LISTING)
    return rows.remove_column(index), pa.Table.from_struct_array(rows.column(index))


def find_image(root: str, location: str | None, row: int | None) -> str | None:
    """Return the path or URI of the file that is an image; None for one inside another file."""
    if location is None or row is not None:
        return None
    if is_uri(location) or location.startswith("/"):
        return location
    return f"{root.rstrip('/')}/{location}" if is_uri(root) else os.path.join(root, location)
