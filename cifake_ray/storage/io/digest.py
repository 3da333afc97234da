"""What tells one content of a file from another: its stamp, and its sha256."""

from __future__ import annotations

import hashlib
from pathlib import Path

from cifake_ray.storage.io.files import MAX_READ_BYTES, read_bytes
from cifake_ray.storage.io.paths import AnyPath, explain_errors
from cifake_ray.storage.io.regular_file import open_regular


def stamp_file(path: AnyPath) -> tuple[int, str]:
    """Return the size in bytes and what changes with the content: a time or the store's etag."""
    with explain_errors(path):
        if isinstance(path, Path):
            status = path.stat()
            return status.st_size, str(status.st_mtime_ns)
        info = path.fs.info(path.path)
        return int(info["size"]), str(info.get("ETag") or info.get("mtime") or "")


def hash_file(path: AnyPath) -> str:
    """Return the sha256 of a file. StorageError when it cannot be read."""
    if not isinstance(path, Path):
        return hashlib.sha256(read_bytes(path)).hexdigest()
    with explain_errors(path), open_regular(path, MAX_READ_BYTES) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
