"""The images of a folder: every regular file below it that is no clutter.

Ray's own listings are not used: they skip names that start with `_` or `.`.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import islice, repeat
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa

from cifake_ray.core.imaging.containers import explain_large
from cifake_ray.core.imaging.decode import MAX_IMAGE_BYTES
from cifake_ray.core.labels import LabelReader
from cifake_ray.core.schema import MANIFEST_FIELDS
from cifake_ray.errors import ImageError, StorageError
from cifake_ray.storage.io.paths import explain_errors, explain_os_error
from cifake_ray.storage.io.read_ahead import read_ahead
from cifake_ray.storage.sources.folder_metadata import (
    FolderMetadata,
    MetadataColumns,
    read_metadata,
)
from cifake_ray.storage.sources.source import (
    KEEP_ALL,
    KeyFilter,
    Listing,
    Part,
    batch_rows,
    check_locations,
    climbs,
    escape_key,
    make_label_reader,
)

NUM_READ_THREADS = 8
# Of a folder below the root: no permission, a path beyond PATH_MAX, or gone meanwhile.
UNREADABLE = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR)
READ_GROUP_SIZE = 16
SLOW_READ_S = 1e-4  # longer than it takes to copy a file of a few 100 kB from the page cache
MAX_SLOW_READS = 4  # one after another: less is chance, such as another process on this core
SLOW_ROWS = 1024  # that are then read ahead
_READ = os.O_RDONLY | os.O_NONBLOCK
_SEARCH = getattr(os, "O_PATH", os.O_RDONLY)  # a folder that may not be listed can be searched
_Fact: TypeAlias = tuple[str | None, int | None, int | None, int | None]


@dataclass(frozen=True)
class FolderSource:
    """Every regular file below a folder, whatever its extension, that is no clutter."""

    root: Path
    class_names: dict[str, int]
    key_filter: KeyFilter = KEEP_ALL
    follow_symlinks: bool = False  # else only links to files below the root count as files
    label_column: str = "label"  # of metadata beside the images
    source_column: str = "source"

    def list_images(
        self, parts: Sequence[Part] | None = None, max_rows: int | None = None
    ) -> Listing:
        """List the files below the folder, or below those of it whose names are `parts`."""
        listing = Listing(iter(()))
        rows = self._list_rows(listing, [""] if parts is None else list(map(str, parts)), max_rows)
        listing.batches = batch_rows(rows, pa.schema(MANIFEST_FIELDS))
        return listing

    def _list_rows(
        self, listing: Listing, prefixes: list[str], max_rows: int | None
    ) -> Iterator[Sequence[Any]]:
        left_out = listing.left_out
        read_labels = make_label_reader(self.class_names)
        root = os.path.realpath(self.root)
        labels = LabelReader(self.label_column, self.class_names)
        columns = MetadataColumns(labels, self.source_column)
        described: list[str] = []  # metadata files that were used
        # Folders, the metadata above them, and where links are followed the identities of the
        # folders above them.
        pending: list[tuple[str, FolderMetadata | None, frozenset[tuple[int, int]]]]
        pending = list(self._look_above(prefixes))
        num_rows = 0
        while pending and (max_rows is None or num_rows < max_rows):
            prefix, metadata, above = pending.pop()
            folder_labels = read_labels(prefix)
            found = read_metadata(self.root, prefix, columns, listing.notes, self.follow_symlinks)
            if found is not None:
                metadata = found
                described.append(found.name)
            try:
                if self.follow_symlinks:
                    status = os.stat(self.root / prefix)
                    above |= {(status.st_dev, status.st_ino)}
                entries = os.scandir(self.root / prefix)
            except OSError as error:
                if not prefix or error.errno not in UNREADABLE:
                    raise explain_os_error(error, self.root / prefix) from error
                listing.leave_out_folder(prefix, error)
                continue
            for entry in self._scan(self.root / prefix, entries):
                key = prefix + entry.name
                if entry.is_dir(follow_symlinks=False):
                    if reason := self.key_filter.find_folder_reason(f"{key}/"):
                        left_out[reason] += 1
                    else:
                        pending.append((f"{key}/", metadata, above))
                    continue
                if reason := self.key_filter.find_reason(key):
                    listing.leave_out_file(key, reason)
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
                        elif reason := self.key_filter.find_folder_reason(f"{key}/"):
                            left_out[reason] += 1
                        else:
                            pending.append((f"{key}/", metadata, above))
                        continue
                    if not stat.S_ISREG(status.st_mode):  # reading a pipe would never end
                        left_out["not a regular file"] += 1
                        continue
                    if entry.is_symlink() and not (
                        self.follow_symlinks or lies_below(os.path.realpath(entry.path), root)
                    ):
                        left_out["link out of the folder"] += 1
                        continue
                facts = metadata.describe(key, folder_labels) if metadata else folder_labels
                num_rows += 1
                escaped = None if key.isascii() else escape_key(key)
                if escaped is None:
                    yield key, key, None, size_bytes, mtime_ns, None, *facts, None
                else:
                    known = (None, None, size_bytes, mtime_ns, None, facts.label, None, None)
                    yield escaped, *known, "bad_key"
        listing.left += [prefix for prefix, *_ in pending]
        if described:
            more = f" and {len(described) - 1:,} more" if len(described) > 1 else ""
            listing.notes.append(
                f"labels, splits and sources are those of {described[0]}{more}, where it has them;"
                " its other columns travel only if it is given as the source itself"
            )
            listing.notes += [labels.describe()] if labels.counts else []

    def _look_above(
        self, prefixes: list[str]
    ) -> Iterator[tuple[str, FolderMetadata | None, frozenset[tuple[int, int]]]]:
        """Yield folders with what listing the folders above them has found: see `_list_rows`."""
        labels = LabelReader(self.label_column, self.class_names)  # it counts what it reads
        columns = MetadataColumns(labels, self.source_column)
        found: dict[str, FolderMetadata | None] = {}
        for prefix in prefixes:
            if climbs(prefix):
                raise StorageError(f"{self.root}: {prefix!r} is not below it")
            above = [prefix[: place + 1] for place, c in enumerate(prefix[:-1]) if c == "/"]
            metadata, identities = None, set[tuple[int, int]]()
            for folder in ["", *above] if prefix else []:
                if folder not in found:
                    found[folder] = read_metadata(
                        self.root, folder, columns, [], self.follow_symlinks
                    )
                metadata = found[folder] or metadata
                if self.follow_symlinks:
                    with suppress(OSError):  # it is gone, and so is what is below it
                        status = os.stat(self.root / folder)
                        identities.add((status.st_dev, status.st_ino))
            yield prefix, metadata, frozenset(identities)

    def _scan(self, folder: Path, entries: Any) -> Iterator[os.DirEntry[str]]:
        with explain_errors(folder), entries:
            yield from entries

    def read_images(self, rows: pa.Table) -> Iterator[bytes | ImageError]:
        check_locations(rows, lambda path: not climbs(path) or path == str(self.root))
        names = ("location", "size_bytes", "mtime_ns", "row")
        locations, sizes, mtimes_ns, offsets = (rows.column(name).to_pylist() for name in names)
        allowed = None if self.follow_symlinks else self.root
        return read_local_files(locations, sizes, mtimes_ns, self.root, allowed, offsets)


def _open_below(path: str, parent: int) -> int | None:
    """Open a file in an open folder; None for a link, which may lead anywhere."""
    try:
        return os.open(path.rpartition("/")[2], _READ | os.O_NOFOLLOW, dir_fd=parent)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return None


def lies_below(path: str, root: str) -> bool:
    """Return whether a path lies in a folder; both must be free of links."""
    return path.startswith(root.rstrip("/") + "/")


def _find_real_path(descriptor: int, path: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:  # no /proc: a link that is swapped in this very moment goes unnoticed
        return os.path.realpath(path)


def read_local_files(
    locations: Sequence[str | None],
    sizes: Sequence[int | None],
    mtimes_ns: Sequence[int | None],
    root: str | Path = "",
    allowed: Path | None = None,
    offsets: Sequence[int | None] | None = None,
) -> Iterator[bytes | ImageError]:
    """Yield one result for each path below `root`, in order; of a slow disk some are read ahead.

    A row without a location is one whose name is not valid UTF-8. Sizes in bytes and times are
    those of the listing; a file that differs is `changed`. What is read must lie in `allowed`. With
    an offset it is that part of the file that has `size` bytes from there on.
    """
    real = None if allowed is None else os.path.realpath(allowed)
    folder = os.path.join(root, "")

    def read(fact: _Fact, parent: int | None = None) -> bytes | ImageError:
        location, size_bytes, mtime_ns, offset = fact
        if location is None:
            return ImageError("bad_key", "the file name is not valid UTF-8; rename the file")
        path = location if location[:1] == "/" else folder + location
        return read_local_file(path, size_bytes, mtime_ns, real, offset, parent)

    facts = zip(locations, sizes, mtimes_ns, offsets or repeat(None, len(sizes)), strict=True)
    num_slow = 0  # reads, one after another
    with closing(_OpenParent(folder, real)) as parent:
        for fact in facts:
            # From the page cache a file comes sooner than a thread could be told to read it.
            started_s = time.perf_counter()
            image = read(fact, parent.find(fact[0]))
            is_slow = time.perf_counter() - started_s > SLOW_READ_S
            yield image
            num_slow = num_slow + 1 if is_slow else 0
            if num_slow == MAX_SLOW_READS:
                yield from _read_on_threads(read, islice(facts, SLOW_ROWS))
                num_slow = 0


def _read_on_threads(
    read: Callable[[_Fact], bytes | ImageError], facts: Iterable[_Fact]
) -> Iterator[bytes | ImageError]:
    items = ((fact, fact[1]) for fact in facts)
    with ThreadPoolExecutor(NUM_READ_THREADS) as threads:
        max_ahead = 2 * NUM_READ_THREADS * READ_GROUP_SIZE
        yield from read_ahead(read, items, threads, max_ahead=max_ahead, group_size=READ_GROUP_SIZE)


class _OpenParent:
    """The folder of the last file, kept open, so that only it is asked where it lies."""

    def __init__(self, root: str, allowed: str | None) -> None:
        self.root, self.allowed = root, allowed
        self.name: str | None = None
        self.descriptor: int | None = None

    def find(self, location: str | None) -> int | None:
        """Return the folder of a file if it lies in `allowed`; None if each file must be asked."""
        if self.allowed is None or location is None:
            return None
        name = location.rpartition("/")[0]
        if name != self.name:
            self.close()
            self.name = name
            path = os.path.join(self.root, name)
            with suppress(OSError):  # then opening the file says what is wrong
                self.descriptor = os.open(path, _SEARCH | os.O_DIRECTORY)
                if not lies_below(f"{_find_real_path(self.descriptor, path)}/", self.allowed):
                    self.close()
        return self.descriptor

    def close(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
        self.descriptor = None


def read_local_file(
    path: str,
    size_bytes: int | None = None,
    mtime_ns: int | None = None,
    allowed: str | None = None,
    offset: int | None = None,
    parent: int | None = None,
) -> bytes | ImageError:
    """Return a file's bytes if it is still as listed, else the error of its row.

    The file must lie in `allowed`, a folder free of links. With an `offset` the result is its
    `size_bytes` from there on. `parent` is its folder, open, and known to lie in `allowed`.
    """
    try:
        descriptor = None if parent is None else _open_below(path, parent)
        if descriptor is not None:
            allowed = None
        else:
            descriptor = os.open(path, _READ)
        try:
            status = os.fstat(descriptor)
            # Asked of the open file: names on the way may become links at any time.
            if allowed is not None and not lies_below(_find_real_path(descriptor, path), allowed):
                return ImageError("denied", "a link leads out of the folder; --follow-symlinks")
            if not stat.S_ISREG(status.st_mode):
                return ImageError("not_an_image", "not a regular file")
            size = status.st_size if offset is None or size_bytes is None else size_bytes
            if size_bytes is not None and (size, status.st_mtime_ns) != (size_bytes, mtime_ns):
                return ImageError("changed", "the file changed after it was listed")
            if offset is not None:  # the caller limits the parts
                os.lseek(descriptor, offset, os.SEEK_SET)
            elif size > MAX_IMAGE_BYTES:
                return explain_large(path, size, MAX_IMAGE_BYTES)
            data = os.read(descriptor, size + (offset is None))  # one more: it may be growing
            while len(data) < size and (more := os.read(descriptor, size - len(data))):
                data += more
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        hint = "; a path of Windows? write it relative to the list" if "\\" in path else ""
        return ImageError("not_found", f"the file is gone{hint}")
    except PermissionError:
        return ImageError("denied", "no permission to read the file")
    except OSError as error:
        is_path = error.errno in (errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
        return ImageError("not_found" if is_path else "io_network", f"{error.strerror}")
    if len(data) != size:
        return ImageError("changed", "the file changed while it was read")
    return data
