"""Keep the decoded pixels of shards on a node's disk, for all processes and trainings there.

`KEY.npy` has the pixels, or `KEY.native` (`native_cache.py`), `KEY.json` the errors of images that
do not decode and the sums of both, `KEY.lock` whoever decodes them now. The key is that of all that
the pixels follow from, so files of one key are equal. The time of `KEY.json` is that of the last
use: what has not been used for longest makes room for more (`cache_entries.py`).
Modes follow the umask, as those of outputs do. Whoever may write pixels decides what is learned, so
files of others are used if they are root's or those of the folder's owner, who was chosen with it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import shutil
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from cifake_ray.errors import CacheError, ImageError
from cifake_ray.storage.datasets.cache_entries import SUFFIXES, make_room
from cifake_ray.storage.io.files import write_json
from cifake_ray.storage.io.paths import resolve_local

# What json and numpy raise for bytes that are not those that were written.
DAMAGE = (ArithmeticError, AttributeError, EOFError, LookupError, TypeError, ValueError)
Decoded = Iterator[tuple[int, Any]]  # the number of an image, and its pixels or its ImageError


def locate_cache(cache_dir: str | None) -> Path:
    """Return `--cache-dir`, else the user's cache folder."""
    if cache_dir is not None:
        return resolve_local(cache_dir, "--cache-dir")
    return resolve_local(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "cache") / "cifake_ray"


class Stored(NamedTuple):
    """What has been stored of the images."""

    errors: dict[int, str]
    sums: dict[str, int]  # CRC-32 of the pixels
    over_bytes: int | None = None  # the limit that the pixels went beyond, so that none are kept


@dataclass(frozen=True)
class DecodedCache(ABC):
    """The files of one key."""

    path: Path  # without a suffix
    about: str  # what the images are of, for people
    max_bytes: int  # of all that this user keeps in the folder
    suffix: ClassVar[str]  # of the pixels

    def fill(self, decode: Callable[[], Decoded], log: Callable[[str], None]) -> None:
        """Store what `decode` yields unless it is there. CacheError when the folder is unusable."""
        with self._explain_errors():
            if self._is_filled():  # another user's files serve too, whose lock may not be ours
                with suppress(OSError):  # whose last use is not ours to write
                    os.utime(self._errors_path)
                return
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _hold_lock(self._base.with_suffix(".lock"), log):
                if self._is_filled():
                    return
                self._make_room(self._size_bytes, log)
                errors, sums, over_bytes = self._store(decode())
                sums["unusable"] = zlib.crc32(json.dumps(errors).encode())
                limit = {} if over_bytes is None else {"over_bytes": over_bytes}
                record = {"unusable": errors, "crc32": sums, "about": self.about, **limit}
                write_json(self._errors_path, record)
                self._make_room(0, log)

    def _make_room(self, size_bytes: int, log: Callable[[str], None]) -> None:
        for entry in make_room(self._base, self.max_bytes - size_bytes):
            what = entry.about or entry.path.name
            log(f"train: removed decoded images of {what}, unused for longest (--cache-gb)")

    def read(self) -> tuple[dict[int, str], Any]:
        """Return the error of each image that does not decode, and the pixels, mapped into memory.

        The pixels are None if they are not kept.
        CacheError when a file is damaged, in a single bit even: all of them are summed once.
        """
        with self._explain_errors():
            path = self._errors_path
            try:
                record = json.loads(path.read_bytes())
                errors, sums = record["unusable"], record.get("crc32", {})
                unusable = {int(number): error for number, error in errors.items()}
                compare_sum(sums, "unusable", json.dumps(errors).encode())
                path = self._pixels_path
                pixels = self._map(sums)
            except DAMAGE as error:
                raise CacheError(
                    f"{path}: damaged ({error}); delete it, and the images are decoded again"
                ) from error
        return unusable, pixels

    @property
    def _size_bytes(self) -> int:
        """The bytes that the pixels will take, 0 if that shows only when they are written."""
        return 0

    @property
    def _base(self) -> Path:
        """The path, or one beside it that is ours while a stranger's files have that name."""
        for base in (self.path, self.path.with_name(f"{self.path.name}-{os.getuid()}")):
            paths = (base.with_suffix(suffix) for suffix in SUFFIXES)
            owners = {path.lstat().st_uid for path in paths if os.path.lexists(path)}
            others = owners - {os.getuid(), 0}
            if not others or others == {base.parent.stat().st_uid}:
                return base
        raise CacheError(
            f"{base}: another user has put files there, which may hold other pixels; choose another"
            " folder with --cache-dir"
        )

    @property
    def _pixels_path(self) -> Path:
        return self._base.with_suffix(self.suffix)

    @property
    def _errors_path(self) -> Path:
        return self._base.with_suffix(".json")

    @abstractmethod
    def _is_filled(self) -> bool: ...

    @abstractmethod
    def _store(self, decoded: Decoded) -> Stored:
        """Write the pixels, whole or not at all."""

    @abstractmethod
    def _map(self, sums: dict[str, int]) -> Any:
        """Map the pixels, None if they are not kept. ValueError when they are others."""

    @contextmanager
    def _explain_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise _explain_error(error, self.path.parent) from error


@dataclass(frozen=True)
class PixelCache(DecodedCache):
    """Images of one size."""

    shape: tuple[int, ...]  # of the pixels, uint8[M, S, S, 3]
    suffix = ".npy"

    @property
    def _size_bytes(self) -> int:
        return math.prod(self.shape)

    def _is_filled(self) -> bool:
        return self._errors_path.exists() and self._pixels_path.exists()

    def _store(self, decoded: Decoded) -> Stored:
        errors: dict[int, str] = {}
        with create_unnamed(self._pixels_path) as (file, name):
            array = np.lib.format.open_memmap(name, "w+", np.uint8, self.shape)
            _allocate(file)
            for number, image in decoded:
                if isinstance(image, ImageError):
                    errors[number] = image.error
                else:
                    array[number] = image
            array.flush()
            return Stored(errors, {"pixels": zlib.crc32(array.data)})  # a second for each 4 GB

    def _map(self, sums: dict[str, int]) -> np.ndarray:
        array: np.ndarray = np.load(self._pixels_path, mmap_mode="r")
        if array.shape != self.shape or array.dtype != np.uint8:
            raise ValueError(f"{array.dtype}{list(array.shape)}")
        compare_sum(sums, "pixels", array.data)
        return array


def compare_sum(sums: dict[str, int], name: str, data: bytes | memoryview) -> None:
    """Raise ValueError when the data have another CRC-32 than when they were written.

    Files of earlier versions have no sums.
    """
    if sums.get(name) not in (None, zlib.crc32(data)):
        raise ValueError(f"the sum of the {name} is another")


def _explain_error(error: OSError, folder: Path) -> CacheError:
    reason = str(error.strerror or error).rstrip(".")
    if isinstance(error, PermissionError):
        places = (Path(error.filename or folder), folder, *folder.parents)
        path = next(path for path in places if os.path.exists(path))
        if path.stat().st_uid != os.getuid():
            reason += f" ({path} belongs to another user)"
    return CacheError(
        f"decoded images cannot be kept in {folder}: {reason}; choose another folder with"
        " --cache-dir or XDG_CACHE_HOME"
    )


@contextmanager
def _hold_lock(path: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of a file; its owner's death releases it."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # NFS locks only what can be written
    except PermissionError:
        file = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log("train: waiting for another process that decodes the same images")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


@contextmanager
def create_unnamed(path: Path) -> Iterator[tuple[int, str]]:
    """Yield an empty file and a name to open it by; at the end it is published as `path`.

    A process that is killed leaves nothing behind, or, where files need a name, one file that the
    next decoding of the same images removes. The caller holds the lock.
    """
    folder = os.open(path.parent, os.O_RDONLY)
    named = path.with_suffix(".writing")
    named.unlink(missing_ok=True)
    try:
        file = os.open(path.parent, os.O_TMPFILE | os.O_RDWR, 0o666)
        name = f"/proc/self/fd/{file}"
        is_unnamed = os.path.exists(name)
    except (AttributeError, OSError):  # macOS, NFS
        is_unnamed = False
    if not is_unnamed:
        file, name = os.open(named, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), str(named)
    try:
        yield file, name
        if is_unnamed:
            with suppress(FileExistsError):  # its sibling was lost: the same pixels are there
                os.link(name, path.name, dst_dir_fd=folder)  # with a folder, it follows the link
        else:
            os.replace(name, path)
    finally:
        if not is_unnamed:
            named.unlink(missing_ok=True)
        os.close(file)
        os.close(folder)


def _allocate(file: int) -> None:
    """Take the space of a sparse file: on a full disk, writing to it would kill the process."""
    size_bytes = os.fstat(file).st_size
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size_bytes)
    elif shutil.disk_usage(file).free < size_bytes:  # macOS
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
