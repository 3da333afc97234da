"""Bytes in and out of the places a URI names: the only code that opens files.

Floor: storage. Everything a run leaves behind is written whole or not at all.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from cifake_ray.errors import StorageError

TEMPORARY_PREFIX = ".writing-"


def resolve_path(uri: str) -> Path:
    """The absolute local path a URI names. ValueError for a scheme that is not supported."""
    scheme, separator, rest = uri.partition("://")
    if not separator:
        rest = uri
    elif scheme != "file":
        raise ValueError(f"{scheme}:// is not supported: {uri!r}; give a local path")
    if not rest:
        raise ValueError("an empty path was given; name a folder or file")
    return Path(os.path.abspath(os.path.expanduser(rest)))


def explain_os_error(error: OSError, path: Path | str) -> StorageError:
    """One line for an operating-system error: what failed, where, and what to do."""
    remedies = {
        errno.ENOENT: "check the path",
        errno.EACCES: "check the permissions",
        errno.EPERM: "check the permissions",
        errno.EROFS: "the file system is read-only; choose another folder",
        errno.ENOSPC: "the disk is full; free some space and run the same command again",
        errno.EDQUOT: "the quota is used up; free some space and run the same command again",
        errno.EFBIG: "the file would exceed a size limit; raise it and run the same command again",
        errno.ENOTDIR: "a file stands where a folder is needed",
        errno.EISDIR: "a folder stands where a file is needed",
    }
    remedy = remedies.get(error.errno or 0, "check the disk and run the same command again")
    return StorageError(f"{path}: {error.strerror or error}; {remedy}")


def make_folder(folder: Path) -> None:
    """Create a folder and its parents. StorageError when that cannot be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # FileExistsError here means that a file bears the name
        if isinstance(error, FileExistsError):
            error = NotADirectoryError(errno.ENOTDIR, "Not a directory")
        raise explain_os_error(error, folder) from error


def read_bytes(path: Path) -> bytes:
    """The whole file. StorageError when it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise explain_os_error(error, path) from error


def _write_then(path: Path, chunks: Iterable[bytes], publish: Callable[[Path, Path], None]) -> None:
    """Write beside `path`, force to disk, then make it visible under its name in one step."""
    temporary = path.parent / f"{TEMPORARY_PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
    make_folder(path.parent)
    try:
        try:
            with open(temporary, "xb") as file:
                file.writelines(chunks)
                file.flush()
                os.fsync(file.fileno())
            publish(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except FileExistsError:
        raise
    except OSError as error:
        raise explain_os_error(error, path) from error


def write_bytes(path: Path, data: bytes) -> None:
    """Make `path` hold `data`, whole or not at all, replacing what was there."""
    _write_then(path, [data], os.replace)


def write_chunks(path: Path, chunks: Iterable[bytes]) -> None:
    """Make `path` hold all the chunks, one after another, whole or not at all."""
    _write_then(path, chunks, os.replace)


def create_bytes(path: Path, data: bytes) -> bool:
    """Make `path` hold `data` if it does not exist. False, and nothing changed, if it does."""
    try:
        _write_then(path, [data], _link)
    except FileExistsError:
        return False
    return True


def _link(temporary: Path, path: Path) -> None:
    """link(2) fails if the name is taken, where rename would not."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        with open(path, "xb") as file:  # a file system without links, such as exFAT
            file.write(temporary.read_bytes())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. StorageError when it is missing or not JSON."""
    try:
        value = json.loads(read_bytes(path))
    except ValueError as error:
        raise StorageError(f"{path}: not valid JSON ({error}); was it edited?") from error
    if not isinstance(value, dict):
        raise StorageError(f"{path}: holds no JSON object; was it edited?")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object, whole or not at all."""
    write_bytes(path, encode_json(value))


def encode_json(value: dict[str, Any]) -> bytes:
    """Readable JSON, the same bytes for the same value."""
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def hash_json(value: Any) -> str:
    """sha256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """sha256 of a file. StorageError when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise explain_os_error(error, path) from error


def check_writable(folder: Path) -> None:
    """Fail now, not after an hour: write and remove a small file. StorageError if that fails."""
    probe = folder / f"{TEMPORARY_PREFIX}probe-{os.getpid()}"
    write_bytes(probe, b"probe")
    probe.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that killed writers left in `folder`."""
    for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
        pid = path.name.removeprefix(TEMPORARY_PREFIX).partition("-")[0]
        if not (pid.isdigit() and _is_alive(int(pid))):
            path.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
