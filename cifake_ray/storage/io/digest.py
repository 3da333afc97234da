"""What tells one content of a file from another: its stamp, its size, and its sha256."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from cifake_ray.storage.io.files import MAX_READ_BYTES
from cifake_ray.storage.io.objects import list_objects, read_object
from cifake_ray.storage.io.paths import AnyPath, explain_errors
from cifake_ray.storage.io.regular_file import open_regular

if TYPE_CHECKING:
    from upath import UPath

PART_BYTES = 8 * 2**20  # of an object, one request
PARTS_AHEAD = 4  # in memory, however large the object


def stamp_file(path: AnyPath) -> tuple[int, str]:
    """Return the size in bytes and what changes with the content: a time or the store's etag."""
    with explain_errors(path):
        if isinstance(path, Path):
            status = path.stat()
            return status.st_size, str(status.st_mtime_ns)
        info = path.fs.info(path.path)
        return int(info["size"]), str(info.get("ETag") or info.get("mtime") or "")


def list_sizes(folder: AnyPath) -> dict[str, int]:
    """Return the name and the size in bytes of each entry of a folder, by one listing of it.

    Sorted by name; none when the folder does not exist. The size of a folder means nothing.
    """
    with explain_errors(folder):
        try:
            if isinstance(folder, Path):
                sizes = {}
                with os.scandir(folder) as entries:
                    for entry in entries:
                        with suppress(FileNotFoundError):  # removed a moment ago
                            sizes[entry.name] = entry.stat().st_size
            elif folder.protocol == "s3":
                listed = list_objects(folder, "/")
                sizes = {name.removesuffix("/"): size for name, size in listed.items()}
                sizes = {name: sizes[name] for name in sizes.keys() - {"", ".", ".."}}
            else:
                listing = folder.fs.ls(folder.path, detail=True)
                sizes = {Path(info["name"]).name: int(info["size"] or 0) for info in listing}
        except FileNotFoundError:
            return {}
    return dict(sorted(sizes.items()))


def hash_file(path: AnyPath, size_bytes: int | None = None) -> str:
    """Return the sha256 of a file, read in parts. StorageError when it cannot be read.

    A store need not be asked for the size of an object that the caller knows.
    """
    with explain_errors(path):
        if isinstance(path, Path):
            with open_regular(path, MAX_READ_BYTES) as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        for part in _read_parts(path, stamp_file(path)[0] if size_bytes is None else size_bytes):
            digest.update(part)
        return digest.hexdigest()


def _read_parts(path: UPath, size_bytes: int) -> Iterator[bytes]:
    """Yield an object in parts; threads read the next ones meanwhile."""

    def read(start: int) -> bytes:
        end = min(start + PART_BYTES, size_bytes)
        part = bytes(path.fs.cat_file(path.path, start=start, end=end))
        if len(part) != end - start:
            raise OSError(f"it answered {len(part):,} bytes when asked for {end - start:,}")
        return part

    if size_bytes <= PART_BYTES:
        yield read_object(path)
        return
    with ThreadPoolExecutor(PARTS_AHEAD, "part") as threads:
        starts = iter(range(0, size_bytes, PART_BYTES))
        pending = deque(threads.submit(read, start) for start in islice(starts, PARTS_AHEAD))
        while pending:
            yield pending.popleft().result()
            pending.extend(threads.submit(read, start) for start in islice(starts, 1))
