"""The images of a folder: every regular file below it, whatever its name or extension.

Ray's own listings are not used: they skip names that start with `_` or `.`.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from cifake_ray.core.imaging.decode import MAX_IMAGE_BYTES
from cifake_ray.core.labels import read_path
from cifake_ray.core.schema import MANIFEST_FIELDS
from cifake_ray.errors import ImageError
from cifake_ray.storage.io.paths import explain_os_error
from cifake_ray.storage.sources.source import (
    KEEP_ALL,
    LISTING_BATCH_ROWS,
    KeyFilter,
    Listing,
    RowBuffer,
    escape_key,
)


@dataclass(frozen=True)
class FolderSource:
    """Every regular file below a folder, whatever its name or extension."""

    root: Path
    class_names: dict[str, int]
    key_filter: KeyFilter = KEEP_ALL
    follow_symlinks: bool = False  # else only links to files below the root count as files

    def list_images(self) -> Listing:
        left_out: Counter[str] = Counter()
        return Listing(self._list_batches(left_out), left_out)

    def _list_batches(self, left_out: Counter[str]) -> Iterator[pa.RecordBatch]:
        rows = RowBuffer(pa.schema(MANIFEST_FIELDS))
        root = os.path.realpath(self.root)
        # Names of the folders on the way, and their identities where links are followed.
        pending: list[tuple[tuple[str, ...], frozenset[tuple[int, int]]]] = [((), frozenset())]
        while pending:
            folders, above = pending.pop()
            labels = read_path(folders, self.class_names)
            prefix = "".join(f"{folder}/" for folder in folders)
            if self.follow_symlinks:
                status = self._stat(prefix)
                above |= {(status.st_dev, status.st_ino)}
            for entry in self._scan(prefix):
                if entry.is_dir(follow_symlinks=False):
                    pending.append(((*folders, entry.name), above))
                    continue
                key = prefix + entry.name
                if not self.key_filter.keeps(key):
                    left_out["excluded"] += 1
                    continue
                size_bytes, mtime_ns = None, None
                try:
                    status = entry.stat()
                    size_bytes, mtime_ns = status.st_size, status.st_mtime_ns
                except OSError:
                    pass  # a dangling link: stays listed, reading it gives the row its error
                else:
                    if stat.S_ISDIR(status.st_mode):
                        if not self.follow_symlinks:
                            left_out["link to a folder"] += 1
                        elif (status.st_dev, status.st_ino) in above:
                            left_out["link to a folder above it"] += 1
                        else:
                            pending.append(((*folders, entry.name), above))
                        continue
                    if not stat.S_ISREG(status.st_mode):  # reading a pipe would never end
                        left_out["not a regular file"] += 1
                        continue
                    if entry.is_symlink() and not (
                        self.follow_symlinks or lies_below(os.path.realpath(entry.path), root)
                    ):
                        left_out["link out of the folder"] += 1
                        continue
                escaped = escape_key(key)
                if escaped is None:
                    rows.append(key, key, None, size_bytes, mtime_ns, None, *labels, None)
                else:
                    known = (None, None, size_bytes, mtime_ns, None, labels.label, None, None)
                    rows.append(escaped, *known, "bad_key")
                if len(rows) >= LISTING_BATCH_ROWS:
                    yield rows.drain()
        if len(rows):
            yield rows.drain()

    def _stat(self, prefix: str) -> os.stat_result:
        folder = self.root / prefix
        try:
            return os.stat(folder)
        except OSError as error:
            raise explain_os_error(error, folder) from error

    def _scan(self, prefix: str) -> Iterator[os.DirEntry[str]]:
        folder = self.root / prefix
        try:
            with os.scandir(folder) as entries:
                yield from entries
        except OSError as error:
            raise explain_os_error(error, folder) from error

    def read_images(self, rows: pa.Table) -> Iterator[bytes | ImageError]:
        allowed = None if self.follow_symlinks else os.path.realpath(self.root)
        columns = ("location", "size_bytes", "mtime_ns", "error")
        for location, size_bytes, mtime_ns, error in zip(
            *(rows.column(name).to_pylist() for name in columns), strict=True
        ):
            if error is not None:
                yield ImageError(error, "the file name is not valid UTF-8; rename the file")
            else:
                yield read_local_file(
                    os.path.join(self.root, location), size_bytes, mtime_ns, allowed
                )


def lies_below(path: str, root: str) -> bool:
    """Whether a path lies in a folder; both are free of links."""
    return path.startswith(root.rstrip("/") + "/")


def _find_real_path(descriptor: int, path: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:  # no /proc: a link that is swapped in this very moment goes unnoticed
        return os.path.realpath(path)


def read_local_file(
    path: str,
    size_bytes: int | None = None,
    mtime_ns: int | None = None,
    allowed: str | None = None,
) -> bytes | ImageError:
    """A file's bytes if it is still what was listed, else the error its row gets.

    `allowed` is a folder, free of links, that what is read must lie in.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            # Asked of the open file: names on the way may become links at any time.
            if allowed is not None and not lies_below(_find_real_path(descriptor, path), allowed):
                return ImageError("denied", "a link leads out of the folder; --follow-symlinks")
            if not stat.S_ISREG(status.st_mode):
                return ImageError("not_an_image", "not a regular file")
            if size_bytes is not None and (status.st_size, status.st_mtime_ns) != (
                size_bytes,
                mtime_ns,
            ):
                return ImageError("changed", "the file changed after it was listed")
            if status.st_size > MAX_IMAGE_BYTES:
                return ImageError(
                    "too_large", f"{status.st_size} bytes; the limit is {MAX_IMAGE_BYTES}"
                )
            data = os.read(descriptor, status.st_size + 1)
            while len(data) < status.st_size and (more := os.read(descriptor, status.st_size)):
                data += more
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        return ImageError("not_found", "the file is gone")
    except PermissionError:
        return ImageError("denied", "no permission to read the file")
    except OSError as error:
        is_path = error.errno in (errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
        return ImageError("not_found" if is_path else "io_network", f"{error.strerror}")
    if len(data) != status.st_size:
        return ImageError("changed", "the file changed while it was read")
    return data
