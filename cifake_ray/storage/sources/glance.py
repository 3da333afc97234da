"""A first look at a place before it is listed: what is there, and the names of some files."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cifake_ray.errors import NothingToDo, StorageError
from cifake_ray.storage.io.files import exists, is_file
from cifake_ray.storage.io.paths import AnyPath, explain_errors

if TYPE_CHECKING:
    from upath import UPath

GLANCE_KEYS = 1000  # what S3 lists in one request; no more of a bucket is looked at here


def split_prefix(uri: str) -> tuple[str, str]:
    """Return bucket and prefix of s3://BUCKET/PREFIX, unchanged; the prefix ends with a slash."""
    bucket, _, prefix = uri.partition("://")[2].partition("/")
    return bucket, prefix if not prefix or prefix.endswith("/") else prefix + "/"


def iterate_names(place: AnyPath, uri: str) -> Iterator[str]:
    """Yield paths below a folder: all that lie directly in it, or in S3 the first keys below it."""
    with explain_errors(place):
        if isinstance(place, Path):
            yield from (path.name for path in place.iterdir())
        elif uri.startswith("s3://"):
            yield from (key for key, _, _ in iterate_entries(place, uri))
        else:
            own = place.path.rstrip("/")  # some stores list a file or folder within itself
            names = (name.rstrip("/") for name in place.fs.ls(own, detail=False))
            yield from (name.rpartition("/")[2] for name in names if name != own)


def iterate_entries(place: UPath, uri: str) -> Iterator[tuple[str, int, str | None]]:
    """Yield key, size in bytes and etag of the first objects below a prefix on S3."""
    bucket, prefix = split_prefix(uri)
    with explain_errors(place):
        page = place.fs.call_s3(
            "list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=GLANCE_KEYS
        )
        for entry in page.get("Contents", ()):
            yield entry.get("Key", "")[len(prefix) :], entry.get("Size", 0), entry.get("ETag")


def check_there(place: AnyPath, uri: str) -> bool:
    """Return True for a file and False for a folder. StorageError when there is neither."""
    if isinstance(place, Path):
        if not exists(place):
            raise StorageError(f"{place}: no such file or folder; check the path")
        return not place.is_dir()
    if not uri.endswith("/") and is_file(place):
        return True
    try:
        is_empty = next(iterate_names(place, uri), None) is None
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError) and not uri.startswith("s3://"):
            is_empty = True  # S3 says this of a bucket, the others of a folder
        else:
            raise
    if is_empty:
        bucket, prefix = split_prefix(uri)
        raise NothingToDo(
            f"{uri}: the bucket {bucket!r} holds nothing below {prefix!r}; check the bucket and the"
            " prefix"
        )
    return False


def scan_folder(place: AnyPath, below: str) -> Iterator[tuple[str, bool]]:
    """Yield the names in a folder below `place`, and whether each is a folder."""
    with explain_errors(place):
        if isinstance(place, Path):
            with os.scandir(place / below) as entries:
                yield from ((e.name, e.is_dir(follow_symlinks=False)) for e in entries)
        else:
            own = f"{place.path.rstrip('/')}/{below}".rstrip("/")
            for info in place.fs.ls(own, detail=True):
                name = info["name"].rstrip("/")
                if name != own:  # some stores list a folder within itself
                    yield name.rpartition("/")[2], info["type"] == "directory"


def glance_files(place: AnyPath, uri: str) -> Iterator[str]:
    """Yield paths of files below a folder: all directly in it, then some of those further down."""
    if uri.startswith("s3://"):
        yield from iterate_names(place, uri)
        return
    pending, num_below = deque([""]), 0
    while pending and num_below < GLANCE_KEYS:
        below = pending.popleft()
        try:
            for name, is_folder in scan_folder(place, below):
                num_below += below != ""
                if is_folder and not name.startswith((".", "_")):
                    pending.append(f"{below}{name}/")
                elif not is_folder:
                    yield below + name
        except StorageError:
            if not below:
                raise  # else the listing will tell
