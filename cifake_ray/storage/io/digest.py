"""What tells one content of a file from another: its stamp, its end, and its sha256."""

from __future__ import annotations

import hashlib
import os
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


def read_end(path: AnyPath, num_bytes: int) -> tuple[int, bytes] | None:
    """Return the size of a file and at most its last `num_bytes`; None when there is none.

    In a store these are two requests. StorageError when it cannot be read.
    """
    with explain_errors(path):
        try:
            if isinstance(path, Path):
                with open_regular(path) as file:
                    size_bytes = file.seek(0, os.SEEK_END)
                    file.seek(max(0, size_bytes - num_bytes))
                    return size_bytes, file.read(num_bytes)
            size_bytes = int(path.fs.info(path.path)["size"])
            if not size_bytes:
                return 0, b""
            start = max(0, size_bytes - num_bytes)
            return size_bytes, bytes(path.fs.cat_file(path.path, start=start, end=size_bytes))
        except FileNotFoundError:
            return None


def hash_file(path: AnyPath) -> str:
    """Return the sha256 of a file. StorageError when it cannot be read."""
    if not isinstance(path, Path):
        return hashlib.sha256(read_bytes(path)).hexdigest()
    with explain_errors(path), open_regular(path, MAX_READ_BYTES) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
