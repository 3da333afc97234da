"""List a source and write its manifest, as a run without workers does."""

from __future__ import annotations

from cifake_ray.storage.io.files import make_folder
from cifake_ray.storage.io.paths import AnyPath
from cifake_ray.storage.runs.list_parts import THIS_PROCESS, list_rows
from cifake_ray.storage.runs.listed_rows import FOLDER_PREFIX, remove_rows
from cifake_ray.storage.runs.manifest import Manifest, deal_manifest
from cifake_ray.storage.sources.source import Listing


def write_manifest(
    folder: AnyPath, run_id: str, listing: Listing, shard_rows: int | None
) -> Manifest:
    make_folder(folder, parents=False)
    rows_folder = folder / f"{FOLDER_PREFIX}{run_id}"
    try:
        listing, rows = list_rows(
            lambda: listing, None, rows_folder, THIS_PROCESS, lambda line: None, describe=False
        )
        return deal_manifest(folder, run_id, listing, rows, shard_rows)
    finally:
        remove_rows(rows_folder)
