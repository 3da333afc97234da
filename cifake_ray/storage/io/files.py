"""Read, write and list files. Everything a run writes appears whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import socket
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

from cifake_ray.errors import StorageError
from cifake_ray.storage.io.objects import (
    create_object,
    list_objects,
    put_object,
    read_object,
    replace_object,
)
from cifake_ray.storage.io.paths import AnyPath, explain_errors, explain_loss
from cifake_ray.storage.io.regular_file import open_regular, read_regular

TEMPORARY_PREFIX = ".writing-"
TEMPORARY_NAME = re.compile(r"\.writing-(?P<pid>\d+)-(?P<host>[0-9a-f]{8})-[0-9a-f]{8}")
PROBE_NAME = f"{TEMPORARY_PREFIX}probe"
FOREIGN_AGE_S = 3600.0  # a write that another host has not touched for so long is over
MAX_READ_BYTES = 16 * 2**30  # of a file that is read whole: weights, a shard
MAX_JSON_BYTES = 64 * 2**20


def make_folder(folder: AnyPath, *, parents: bool = True) -> None:
    """Create a local folder and its parents; stores have none. StorageError when it fails.

    Without `parents` it fails where they are gone, so that no output that was moved comes back.
    """
    if not isinstance(folder, Path):
        return
    with explain_errors(folder):
        try:
            folder.mkdir(parents=parents, exist_ok=True)
        except FileExistsError:  # a file has the name
            raise NotADirectoryError(errno.ENOTDIR, "Not a directory") from None
        except FileNotFoundError as error:
            raise explain_loss(folder) from error


def exists(path: AnyPath) -> bool:
    """Return whether a file or folder exists. StorageError when that cannot be found out."""
    with explain_errors(path):
        return path.exists()


def is_file(path: AnyPath) -> bool:
    """Return whether a path is a file. StorageError when that cannot be found out."""
    with explain_errors(path):
        if isinstance(path, Path):
            return path.is_file()
        try:
            return bool(path.fs.info(path.path)["type"] == "file")
        except FileNotFoundError:
            return False


def read_bytes(path: AnyPath, max_bytes: int = MAX_READ_BYTES) -> bytes:
    """Return the content of a file. StorageError when it cannot be read, or is too large."""
    with explain_errors(path):
        return _read(path, max_bytes)


def _read(path: AnyPath, max_bytes: int) -> bytes:
    return read_regular(path, max_bytes) if isinstance(path, Path) else read_object(path)


def read_if_exists(path: AnyPath) -> bytes | None:
    """Return the content of a file, None when there is none. StorageError when it is unreadable."""
    with explain_errors(path):
        try:
            return _read(path, MAX_READ_BYTES)
        except FileNotFoundError:
            return None


def open_file(path: AnyPath) -> IO[bytes]:
    """Open a file to read at any position. StorageError when it cannot be opened."""
    with explain_errors(path):
        file: IO[bytes] = open_regular(path) if isinstance(path, Path) else path.open("rb")
        return file


def open_ranges(path: AnyPath) -> IO[bytes]:
    """Open a file without reading ahead, as Parquet needs. StorageError when it cannot be opened.

    `open_file` reads ahead, which is good for text but would fetch a Parquet file whole.
    """
    with explain_errors(path):
        if isinstance(path, Path):
            return open_regular(path)
        return path.open("rb", cache_type="none")


def list_folder(folder: AnyPath) -> list[AnyPath]:
    """Return the entries of a folder, sorted by name; none when it does not exist."""
    missing = (
        FileNotFoundError if isinstance(folder, Path) else (FileNotFoundError, NotADirectoryError)
    )
    with explain_errors(folder):
        if not isinstance(folder, Path) and folder.protocol == "s3":
            names = {name.partition("/")[0] for name in list_objects(folder, "/")}
            return [folder / name for name in sorted(names - {"", ".", ".."})]
        try:
            return sorted(folder.iterdir(), key=lambda path: path.name)
        except missing:
            return []


def find_files(folder: AnyPath) -> list[str]:
    """Return the files below a folder as sorted relative paths."""
    with explain_errors(folder):
        if isinstance(folder, Path):
            paths = (path for path in folder.rglob("*") if path.is_file())
            return sorted(path.relative_to(folder).as_posix() for path in paths)
        if folder.protocol == "s3":
            return [name for name in list_objects(folder) if name and not name.endswith("/")]
        prefix = folder.path.rstrip("/") + "/"
        return sorted(path.removeprefix(prefix) for path in folder.fs.find(folder.path))


def remove(path: AnyPath) -> None:
    """Remove a file if it exists, so that no power cut brings it back. StorageError on failure."""
    with explain_errors(path), suppress(FileNotFoundError):
        path.unlink()
        sync_folder(path.parent)


def discard(path: AnyPath) -> None:
    """Remove a file that does no harm if it stays, such as where deleting is not allowed."""
    with suppress(StorageError), explain_errors(path), suppress(FileNotFoundError):
        path.unlink()


def move(path: AnyPath, target: AnyPath) -> None:
    """Rename a file, so that no power cut undoes it; in a bucket it is copied.

    StorageError when that fails.
    """
    with explain_errors(path):
        if isinstance(path, Path):
            os.rename(path, str(target))
            sync_folder(path.parent)
        else:
            path.fs.mv(path.path, target.path)  # type: ignore[union-attr]


def _write_atomically(
    path: Path,
    chunks: Iterable[bytes],
    publish: Callable[[Path, Path], None],
    *,
    durable: bool = True,
    force_name: bool = True,
) -> None:
    """Write a temporary file next to `path`, force it to disk, then publish it in one step."""
    name = f"{TEMPORARY_PREFIX}{os.getpid()}-{identify_host()}-{secrets.token_hex(4)}"
    temporary = path.parent / name
    with explain_errors(path):
        try:
            with open(temporary, "xb") as file:
                file.writelines(chunks)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            publish(temporary, path)
        except FileNotFoundError as error:
            raise error if path.parent.exists() else explain_loss(path) from error
        finally:
            discard(temporary)
        if durable and force_name:
            sync_folder(path.parent)


def sync_folder(folder: AnyPath) -> None:
    """Force the names of a local folder's files to disk; stores do it themselves."""
    if not isinstance(folder, Path):
        return
    with explain_errors(folder), suppress(FileNotFoundError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_bytes(path: AnyPath, data: bytes, *, force_name: bool = True) -> None:
    """Write or replace a file, whole or not at all.

    Without `force_name` a loss of power may undo that until its folder is forced to disk.
    """
    if isinstance(path, Path):
        _write_atomically(path, [data], os.replace, force_name=force_name)
    else:
        with explain_errors(path):
            replace_object(path, data)


def write_chunks(path: AnyPath, chunks: Iterable[bytes], *, overwrite: bool = True) -> None:
    """Write a file with the chunks, one after another, whole or not at all.

    FileExistsError when there is one and a local file is not to be overwritten.
    """
    if isinstance(path, Path):
        _write_atomically(path, chunks, os.replace if overwrite else _link)
        return
    with explain_errors(path):
        # In parts, of which the store makes an object at the end.
        file = path.fs.open(path.path, "wb", autocommit=False)
        try:
            for chunk in chunks:
                file.write(chunk)
            file.close()
        except BaseException:
            file.discard()
            file.closed = True  # else it is written when the garbage is collected
            raise
        file.commit()


def write_volatile(path: AnyPath, data: bytes) -> None:
    """Write as `write_bytes` does, but do not force it to disk: a power cut may lose it."""
    if isinstance(path, Path):
        _write_atomically(path, [data], os.replace, durable=False)
    else:
        with explain_errors(path):
            put_object(path, data)


def create_bytes(path: AnyPath, data: bytes) -> bool:
    """Write a file that does not exist yet. Return False and change nothing if it does.

    Either way no power cut takes it away.
    """
    if not isinstance(path, Path):
        with explain_errors(path):
            return create_object(path, data)
    with suppress(FileExistsError):
        _write_atomically(path, [data], _link)
        return True
    sync_folder(path.parent)
    return False


def _link(temporary: Path, path: Path) -> None:
    """Publish by link(2), which fails if the name is taken, where rename would not."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        with open(path, "xb") as file:  # a file system without links, such as exFAT
            file.write(temporary.read_bytes())


def read_json(path: AnyPath) -> dict[str, Any]:
    """Return the JSON object in a file. StorageError when it is missing or not JSON."""
    return parse_json(path, read_bytes(path, MAX_JSON_BYTES))


def parse_json(path: AnyPath, data: bytes) -> dict[str, Any]:
    """Return the JSON object in the content of a file. StorageError when it is none."""
    try:
        value = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{path}: not valid JSON ({error}); it may have been edited") from error
    if not isinstance(value, dict):
        raise StorageError(f"{path}: holds no JSON object; it may have been edited")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def write_json(path: AnyPath, value: dict[str, Any]) -> None:
    """Write a JSON object, whole or not at all."""
    write_bytes(path, encode_json(value))


def encode_json(value: dict[str, Any]) -> bytes:
    """Return indented JSON, the same bytes for the same value."""
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def hash_json(value: Any) -> str:
    """Return the sha256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def check_writable(folder: AnyPath) -> None:
    """Write and remove a small file, to fail before the work. StorageError when that fails."""
    make_folder(folder)
    probe = folder / PROBE_NAME  # always this name: the next check removes it too
    write_bytes(probe, b"probe")
    discard(probe)


def remove_leftovers(folder: AnyPath) -> None:
    """Remove the temporary files of killed processes below a local folder; stores have none.

    Other hosts may share the folder, so a file of theirs is removed only when it is old.
    """
    if not isinstance(folder, Path):
        return
    for path in folder.rglob(f"{TEMPORARY_PREFIX}*"):
        if path.name == PROBE_NAME or _is_left(path):
            discard(path)


def _is_left(path: Path) -> bool:
    name = TEMPORARY_NAME.fullmatch(path.name)
    if name and name["host"] == identify_host():
        return not _is_alive(int(name["pid"]))
    try:  # both times are of the file system: clocks of two hosts are never compared
        return path.parent.stat().st_mtime - path.stat().st_mtime > FOREIGN_AGE_S
    except OSError:  # such as when another process has just removed it
        return False


@cache
def identify_host() -> str:
    """Return 8 hex digits that two processes share if each can see whether the other is alive."""
    facts = [socket.gethostname()]
    with suppress(OSError):  # only Linux has them; two containers may have one host name
        facts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        facts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:8]


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, PermissionError) as error:
        return isinstance(error, PermissionError)  # it belongs to another user
    return True
