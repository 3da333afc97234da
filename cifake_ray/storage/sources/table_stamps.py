"""What tells one content of a table from another: a Parquet file, or a list as text."""

from __future__ import annotations

from pathlib import Path

from cifake_ray.errors import SourceChanged, StorageError
from cifake_ray.storage.io.paths import AnyPath, explain_errors
from cifake_ray.storage.sources.fsspec_prefix import stamp_entry


def stamp_table(path: AnyPath) -> str:
    """Return what changes when a file does: its size and its time or etag."""
    with explain_errors(path):
        if isinstance(path, Path):
            status = path.stat()
            return f"{status.st_size} {status.st_mtime_ns}"
        info = path.fs.info(path.path)
    stamp = stamp_entry(info)
    # Some stores give an etag with quotes in one answer and without them in another.
    return f"{info['size']} {stamp and stamp.strip(chr(34))}"


def stamp_again(path: AnyPath) -> str:
    """Return the stamp of a file that was listed before. SourceChanged when it is gone."""
    try:
        return stamp_table(path)
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise explain_change(path) from error
        raise


def explain_change(path: AnyPath) -> SourceChanged:
    """Return the error for a file whose parts are not what they were when they were named."""
    return SourceChanged(
        f"{path}: it has changed since its listing began; run the same command again to list anew"
    )
