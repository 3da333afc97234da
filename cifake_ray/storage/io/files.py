"""Bytes in and out of places: the only code that opens files.

Everything a run leaves behind is written whole or not at all.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from upath import UPath

from cifake_ray.errors import StorageError
from cifake_ray.storage.io.paths import AnyPath, explain_errors, explain_os_error

TEMPORARY_PREFIX = ".writing-"
MAX_PUT_BYTES = 5 * 2**30  # S3 takes no more in one PUT


def make_folder(folder: AnyPath) -> None:
    """Create a folder and its parents, where there are folders. StorageError when it fails."""
    if not isinstance(folder, Path):
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # FileExistsError here means that a file bears the name
        if isinstance(error, FileExistsError):
            error = NotADirectoryError(errno.ENOTDIR, "Not a directory")
        raise explain_os_error(error, folder) from error


def exists(place: AnyPath) -> bool:
    """Whether a file or folder is there. StorageError when that cannot be told."""
    with explain_errors(place):
        return place.exists()


def is_file(place: AnyPath) -> bool:
    """Whether a place is a file. StorageError when that cannot be told."""
    with explain_errors(place):
        if isinstance(place, Path):
            return place.is_file()
        try:
            return bool(place.fs.info(place.path)["type"] == "file")
        except FileNotFoundError:
            return False


def read_bytes(place: AnyPath) -> bytes:
    """The whole file. StorageError when it cannot be read."""
    with explain_errors(place):
        return place.read_bytes()


def read_if_exists(place: AnyPath) -> bytes | None:
    """The whole file, or None when there is none. StorageError when it cannot be read."""
    with explain_errors(place):
        try:
            return place.read_bytes()
        except FileNotFoundError:
            return None


def open_file(place: AnyPath) -> IO[bytes]:
    """A file to read at any position. StorageError when it cannot be opened."""
    with explain_errors(place):
        file: IO[bytes] = place.open("rb")
        return file


def open_ranges(place: AnyPath) -> IO[bytes]:
    """A file of which no more is fetched than is asked for. StorageError when it cannot be opened.

    What `open_file` gives reads ahead: good for a text, but a Parquet file would come whole.
    """
    with explain_errors(place):
        if isinstance(place, Path):
            return place.open("rb")
        return place.open("rb", cache_type="none")


def list_folder(folder: AnyPath) -> list[AnyPath]:
    """What stands directly in a folder, by name; nothing when it does not exist."""
    missing = (
        FileNotFoundError if isinstance(folder, Path) else (FileNotFoundError, NotADirectoryError)
    )
    with explain_errors(folder):
        try:
            return sorted(folder.iterdir(), key=lambda place: place.name)
        except missing:
            return []


def find_files(folder: AnyPath) -> list[str]:
    """The files below a folder, as paths relative to it, in order."""
    with explain_errors(folder):
        if isinstance(folder, Path):
            paths = (path for path in folder.rglob("*") if path.is_file())
            return sorted(path.relative_to(folder).as_posix() for path in paths)
        prefix = folder.path.rstrip("/") + "/"
        return sorted(path.removeprefix(prefix) for path in folder.fs.find(folder.path))


def stamp_file(place: AnyPath) -> tuple[int, str]:
    """Size in bytes, and something that changes with the content: a time, or the store's etag."""
    with explain_errors(place):
        if isinstance(place, Path):
            status = place.stat()
            return status.st_size, str(status.st_mtime_ns)
        info = place.fs.info(place.path)
        return int(info["size"]), str(info.get("ETag") or info.get("mtime") or "")


def remove(place: AnyPath) -> None:
    """Remove a file if it is there. StorageError when that fails."""
    with explain_errors(place), suppress(FileNotFoundError):
        place.unlink()


def discard(place: AnyPath) -> None:
    """Remove garbage if that can be done; where deleting is not allowed it stays and harms none."""
    with suppress(StorageError):
        remove(place)


def move(place: AnyPath, target: AnyPath) -> None:
    """Give a file another name; in a bucket it is copied. StorageError when that fails."""
    with explain_errors(place):
        if isinstance(place, Path):
            os.rename(place, str(target))
        else:
            place.fs.mv(place.path, target.path)  # type: ignore[union-attr]


def _write_atomically(
    path: Path,
    chunks: Iterable[bytes],
    publish: Callable[[Path, Path], None],
    durable: bool = True,
) -> None:
    """Write beside `path`, force to disk, then make it visible under its name in one step."""
    temporary = path.parent / f"{TEMPORARY_PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
    make_folder(path.parent)
    with explain_errors(path):
        try:
            with open(temporary, "xb") as file:
                file.writelines(chunks)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            publish(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        if not durable:
            return
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _put(place: UPath, data: bytes, mode: str) -> None:
    """One request, so that the object is there whole or not at all."""
    options = {"chunksize": MAX_PUT_BYTES} if place.protocol == "s3" else {}
    place.fs.pipe_file(place.path, data, mode=mode, **options)


def write_bytes(place: AnyPath, data: bytes) -> None:
    """Make `place` hold `data`, whole or not at all, replacing what was there."""
    write_chunks(place, [data])


def write_chunks(place: AnyPath, chunks: Iterable[bytes]) -> None:
    """Make `place` hold all the chunks, one after another, whole or not at all."""
    if isinstance(place, Path):
        _write_atomically(place, chunks, os.replace)
    else:
        with explain_errors(place):
            _put(place, b"".join(chunks), "overwrite")


def write_volatile(place: AnyPath, data: bytes) -> None:
    """As `write_bytes`, but not forced to disk: it survives a process, not a machine."""
    if isinstance(place, Path):
        _write_atomically(place, [data], os.replace, durable=False)
    else:
        write_bytes(place, data)


def create_bytes(place: AnyPath, data: bytes) -> bool:
    """Make `place` hold `data` if it does not exist. False, and nothing changed, if it does."""
    try:
        if isinstance(place, Path):
            _write_atomically(place, [data], _link)
            return True
        with explain_errors(place):
            try:
                _put(place, data, "create")  # S3: If-None-Match: *
            except OSError:
                if not place.exists():
                    raise
                return False
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


def read_json(place: AnyPath) -> dict[str, Any]:
    """A JSON object. StorageError when it is missing or not JSON."""
    try:
        value = json.loads(read_bytes(place))
    except ValueError as error:
        raise StorageError(f"{place}: not valid JSON ({error}); was it edited?") from error
    if not isinstance(value, dict):
        raise StorageError(f"{place}: holds no JSON object; was it edited?")
    return value


def write_json(place: AnyPath, value: dict[str, Any]) -> None:
    """Write a JSON object, whole or not at all."""
    write_bytes(place, encode_json(value))


def encode_json(value: dict[str, Any]) -> bytes:
    """Readable JSON, the same bytes for the same value."""
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def hash_json(value: Any) -> str:
    """sha256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def hash_file(place: AnyPath) -> str:
    """sha256 of a file. StorageError when it cannot be read."""
    if not isinstance(place, Path):
        return hashlib.sha256(read_bytes(place)).hexdigest()
    with explain_errors(place), open(place, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_writable(folder: AnyPath) -> None:
    """Fail now, not after an hour: write and remove a small file. StorageError if that fails."""
    probe = folder / f"{TEMPORARY_PREFIX}{os.getpid()}-probe"
    write_bytes(probe, b"probe")
    discard(probe)


def remove_leftovers(folder: AnyPath) -> None:
    """Remove the temporary files that killed writers left in a local folder; stores have none."""
    if not isinstance(folder, Path):
        return
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
