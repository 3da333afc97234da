"""Allowed paths of a list: its own folder, and what `--allow-prefix` adds.

A list may come from an untrusted author; without this check one line of it could
make this program read any file or bucket that its user may read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from cifake_ray.errors import UsageError
from cifake_ray.storage.io.paths import (
    SCHEMES,
    AnyPath,
    parse_file_uri,
    refuse_credentials,
    resolve_path,
)

_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_S3_NAMES = re.compile(r"^s3[an]://")  # what Hadoop and Spark call S3


def is_uri(path: str) -> bool:
    """Return whether a path of a list begins with a scheme."""
    return _URI.match(path) is not None


@lru_cache(maxsize=4096)
def _find_real_folder(folder: str) -> str:
    return os.path.realpath(folder)


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _find_spelling(path: str) -> str:
    """Return a path as it is on disk if it was written on Windows or with spaces around it."""
    if "\\" not in path and path[-1:] != " ":
        return path
    spellings = (path, path.rstrip(), path.replace("\\", "/"), path.rstrip().replace("\\", "/"))
    return next((spelling for spelling in spellings if os.path.lexists(spelling)), path)


@dataclass(frozen=True)
class AllowedPaths:
    """Where the rows of one list may point."""

    root: str  # what relative paths are relative to: a folder, or a URI without its last slash
    folders: tuple[str, ...]  # with all links resolved
    prefixes: tuple[str, ...]  # URIs without their last slash

    def locate(self, path: str) -> str:
        """Return the absolute path or URI of a row's path. UsageError when it is not allowed.

        Keys are exact: nothing in a URI of a store is decoded or normalised.
        """
        if path.startswith("file://"):
            return self._check_local(parse_file_uri(path))
        if is_uri(path):
            return self._check_remote(_S3_NAMES.sub("s3://", path))
        if path.startswith("/"):
            return self._check_local(path)
        if is_uri(self.root):
            return self._check_remote(f"{self.root}/{path}")
        return self._check_local(os.path.join(self.root, path))

    def allows(self, path: str) -> bool:
        """Return whether `locate` finds a path."""
        try:
            return bool(self.locate(path))
        except UsageError:
            return False

    def find_below(self, location: str) -> str | None:
        """Return the path of an image below the folder of the list; None when it lies elsewhere."""
        root = self.root.rstrip("/") + "/"
        return location[len(root) :] if location.startswith(root) else None

    def _check_local(self, path: str) -> str:
        path = os.path.abspath(_find_spelling(path))
        folder, name = os.path.split(path)
        real = os.path.join(_find_real_folder(folder), name)
        if os.path.islink(real):
            real = os.path.realpath(real)
        if not any(_is_below(real, allowed) for allowed in self.folders):
            self._refuse(
                path if real == path else f"{path} (that is {real})", os.path.dirname(real)
            )
        return path

    def _check_remote(self, uri: str) -> str:
        check_uri(uri)
        rest = uri.partition("://")[2]
        if not rest.partition("/")[2]:
            raise UsageError(f"{uri!r} names no file; give the bucket and the key")
        if ".." in rest.split("/"):  # a server or proxy might climb up with it
            raise UsageError(f"{uri!r}: '..' is not followed; give the path without it")
        if not any(_is_below(uri, allowed) for allowed in self.prefixes):
            self._refuse(uri, uri.rpartition("/")[0])
        return uri

    def _refuse(self, location: str, folder: str) -> None:
        raise UsageError(
            f"{location} lies outside {self.root}, the folder of the list; if that is meant, give"
            f" --allow-prefix {folder}"
        )


def check_uri(uri: str) -> None:
    """Raise UsageError for a scheme that is never fetched, and for credentials (not shown)."""
    refuse_credentials(uri)
    scheme = uri.partition("://")[0]
    if scheme in ("http", "https"):
        raise UsageError(
            f"{scheme}:// is never fetched, whatever is allowed; copy the images to a folder or a"
            " bucket first"
        )
    if scheme not in SCHEMES:
        raise UsageError(
            f"{scheme}:// is not supported; give a local path or one of"
            f" {', '.join(f'{name}://' for name in SCHEMES)}"
        )


def make_allowed_paths(list_place: AnyPath, allow_prefix: Iterable[str] = ()) -> AllowedPaths:
    """Return the allowed paths of a list. UsageError when a prefix is neither folder nor URI."""
    is_local = isinstance(list_place, Path)
    _find_real_folder.cache_clear()  # a link may have moved since another list was read
    root = str(list_place.parent) if is_local else str(list_place).rpartition("/")[0]
    folders = [os.path.realpath(root)] if is_local else []
    prefixes = [] if is_local else [root]
    for value in allow_prefix:
        value = _S3_NAMES.sub("s3://", value)
        try:
            if is_uri(value) and not value.startswith("file://"):
                check_uri(value)
                if not value.partition("://")[2].partition("/")[0]:
                    raise UsageError(f"{value!r} names no bucket")
                prefixes.append(value.rstrip("/"))
            else:
                folders.append(os.path.realpath(str(resolve_path(value))))
        except ValueError as error:
            raise UsageError(f"--allow-prefix: {error}") from error
    return AllowedPaths(root, tuple(folders), tuple(prefixes))
