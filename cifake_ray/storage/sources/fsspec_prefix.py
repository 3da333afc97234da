"""Images in any store that fsspec opens, except local folders and S3: gs://, az://, hf://, memory://.

It uses only what all stores have, so it is slower than the code for S3: one
listing for each folder, two requests for each image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from itertools import repeat
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from cifake_ray.config import StoreConfig
from cifake_ray.core.imaging.containers import explain_large
from cifake_ray.core.imaging.decode import MAX_IMAGE_BYTES
from cifake_ray.core.schema import MANIFEST_FIELDS
from cifake_ray.errors import ImageError
from cifake_ray.storage.io.paths import STORE_ERRORS, explain_errors, find_errors, resolve_path
from cifake_ray.storage.io.read_ahead import read_ahead
from cifake_ray.storage.sources.source import (
    KEEP_ALL,
    KeyFilter,
    Listing,
    Part,
    batch_rows,
    check_locations,
    make_label_reader,
)

if TYPE_CHECKING:
    from upath import UPath

NUM_FETCH_THREADS = 16
# Names that stores give to what changes with the content, best first.
_STAMPS = ("ETag", "etag", "generation", "blob_id", "md5Hash", "mtime", "last_modified", "created")


def stamp_entry(info: dict[str, Any]) -> str | None:
    """Return an etag, a generation or a time from what fsspec knows of a file, if there is one."""
    value = next((info[name] for name in _STAMPS if info.get(name)), None)
    if isinstance(value, datetime):  # in one answer; seconds in another answer of the same store
        value = value.timestamp()
    if isinstance(value, float):
        return f"{value:.6f}"
    return None if value is None else str(value)


@dataclass(frozen=True)
class FsspecPrefixSource:
    """Every file below a folder of a store that is no clutter."""

    root: UPath
    class_names: dict[str, int]
    store: StoreConfig
    key_filter: KeyFilter = KEEP_ALL

    def list_images(
        self, parts: Sequence[Part] | None = None, max_rows: int | None = None
    ) -> Listing:
        """List the files below the prefix, or below those of its folders that are `parts`."""
        listing = Listing(iter(()))
        rows = self._list_rows(listing, [""] if parts is None else list(map(str, parts)), max_rows)
        listing.batches = batch_rows(rows, pa.schema(MANIFEST_FIELDS))
        return listing

    def _list_rows(
        self, listing: Listing, pending: list[str], max_rows: int | None
    ) -> Iterator[Sequence[Any]]:
        read_labels = make_label_reader(self.class_names)
        root = self.root.path.rstrip("/")
        scheme = str(self.root).partition("://")[0]
        num_rows = 0
        while pending and (max_rows is None or num_rows < max_rows):
            folder = root + pending.pop()
            labels = read_labels(folder[len(root) :])
            for info in self._list_folder(folder):
                name = info["name"].rstrip("/")
                if name == folder:  # some stores list a folder within itself
                    continue
                key = name[len(root) :].removeprefix("/")
                if info["type"] == "directory":
                    if reason := self.key_filter.find_folder_reason(f"{key}/"):
                        listing.left_out[reason] += 1
                    else:
                        pending.append(name[len(root) :])
                    continue
                if reason := self.key_filter.find_reason(key):
                    listing.leave_out(key, reason)
                    continue
                location = f"{scheme}://{name.removeprefix('/')}"
                stamp = (info.get("size"), None, stamp_entry(info))
                num_rows += 1
                yield key, location, None, *stamp, *labels, None
        listing.left += pending

    def _list_folder(self, folder: str) -> list[dict[str, Any]]:
        # fsspec's own walk leaves out what it cannot list below the top, and says nothing.
        with explain_errors(self.root):
            entries: list[dict[str, Any]] = self.root.fs.ls(folder, detail=True)
            return entries

    def read_images(self, rows: pa.Table) -> Iterator[bytes | ImageError]:
        root = f"{str(self.root).partition('://')[0]}://{self.root.path.strip('/')}/"
        check_locations(rows, lambda uri: f"{uri}/".startswith(root) and ".." not in uri.split("/"))
        names = ("location", "size_bytes", "etag", "row")
        columns = (rows.column(name).to_pylist() for name in names)
        return read_fsspec_files(self.store, *columns)


def read_fsspec_files(
    store: StoreConfig,
    locations: Sequence[str],
    sizes: Sequence[int | None],
    stamps: Sequence[str | None],
    offsets: Sequence[int | None] | None = None,
) -> Iterator[bytes | ImageError]:
    """Yield one result for each URI, in order; a few are fetched ahead.

    Sizes in bytes and stamps are those of the listing; a file that differs is `changed`. With an
    offset it is that part of the file that has `size` bytes from there on. StorageError when a
    store cannot be opened at all.
    """
    systems: dict[str, Any] = {}
    for location in locations:
        scheme, _, rest = location.partition("://")
        if scheme not in systems:
            systems[scheme] = resolve_path(f"{scheme}://{rest.partition('/')[0]}", store).fs  # type: ignore[union-attr]

    def read(fact: tuple[str, int | None, str | None, int | None]) -> bytes | ImageError:
        return read_fsspec_file(systems[fact[0].partition("://")[0]], *fact)

    facts = zip(locations, sizes, stamps, offsets or repeat(None, len(sizes)), strict=True)
    items = zip(facts, sizes, strict=True)
    with ThreadPoolExecutor(NUM_FETCH_THREADS) as threads:
        yield from read_ahead(read, items, threads, max_ahead=2 * NUM_FETCH_THREADS)


def read_fsspec_file(
    system: Any,
    location: str,
    size_bytes: int | None,
    stamp: str | None,
    offset: int | None = None,
) -> bytes | ImageError:
    """Return a file's bytes if it is still as listed, else the error of its row.

    With an `offset`, its `size_bytes` from there on.
    """
    path = system._strip_protocol(location)  # what fsspec's own `url_to_fs` does
    try:
        info = system.info(path)
        if info["type"] != "file":
            return ImageError("not_found", "a folder stands where the file was")
        size = info.get("size") if offset is None else size_bytes
        # A list's etag comes in quotes; of the stores some give them quotes and some do not.
        is_same = stamp is None or stamp.strip('"') == (stamp_entry(info) or "").strip('"')
        if size_bytes not in (None, size) or not is_same:
            return ImageError("changed", "the file changed after it was listed")
        if offset is not None and size is not None:  # the caller limits the parts
            data: bytes = system.cat_file(path, start=offset, end=offset + size)
        elif size is not None and size > MAX_IMAGE_BYTES:
            return explain_large(location, size, MAX_IMAGE_BYTES)
        else:
            data = system.cat_file(path)
    except FileNotFoundError:
        return ImageError("not_found", "the file is gone")
    except PermissionError:
        return ImageError("denied", "the store refused to give the file")
    except (OSError, *find_errors(STORE_ERRORS)) as error:  # type: ignore[misc]
        return ImageError("io_network", f"{type(error).__name__}: {error}")
    if size is not None and len(data) != size:
        return ImageError("changed", "the file changed while it was read")
    return data
