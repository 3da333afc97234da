"""What tells one content of a file from another: its stamp, its size, its end and its sha256."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path

from cifake_ray.storage.io.files import MAX_READ_BYTES
from cifake_ray.storage.io.objects import list_objects, read_object
from cifake_ray.storage.io.paths import AnyPath, explain_errors
from cifake_ray.storage.io.regular_file import open_regular

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


def hash_file(path: AnyPath, size_bytes: int | None = None) -> str:
    """Return the sha256 of a file, or of its first `size_bytes`, read in parts.

    A store need not be asked for the size of an object that the caller knows. StorageError when it
    cannot be read.
    """
    digest = hashlib.sha256()
    with explain_errors(path):
        for part in _read_parts(path, stamp_file(path)[0] if size_bytes is None else size_bytes):
            digest.update(part)
    return digest.hexdigest()


def _read_parts(path: AnyPath, size_bytes: int) -> Iterator[bytes]:
    """Yield the first bytes of a file in parts; threads read the next ones of an object."""
    if isinstance(path, Path):
        with open_regular(path, MAX_READ_BYTES) as file:
            while size_bytes and (data := file.read(min(PART_BYTES, size_bytes))):
                yield data
                size_bytes -= len(data)
        return
    if size_bytes <= PART_BYTES:
        yield read_object(path)[:size_bytes]
        return

    def read(start: int) -> bytes:
        end = min(start + PART_BYTES, size_bytes)
        part = bytes(path.fs.cat_file(path.path, start=start, end=end))
        if len(part) != end - start:
            raise OSError(f"it answered {len(part):,} bytes when asked for {end - start:,}")
        return part

    with ThreadPoolExecutor(PARTS_AHEAD, "part") as threads:
        starts = iter(range(0, size_bytes, PART_BYTES))
        pending = deque(threads.submit(read, start) for start in islice(starts, PARTS_AHEAD))
        while pending:
            yield pending.popleft().result()
            pending.extend(threads.submit(read, start) for start in islice(starts, 1))
