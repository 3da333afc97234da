"""Open local files that others may have put there: no pipe, no device, and never without end."""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path


def open_regular(path: Path, max_bytes: int | None = None) -> BufferedReader:
    """Open a local file to read. OSError for a pipe, a socket or a device: it may have no end.

    With `max_bytes` also for a file that is larger.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, "Is a directory")
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "Not a regular file")
        if max_bytes is not None and status.st_size > max_bytes:
            reason = f"{status.st_size:,} bytes, the limit is {max_bytes:,}"
            raise OSError(errno.EOVERFLOW, reason)
        return os.fdopen(descriptor, "rb")
    except OSError:
        os.close(descriptor)
        raise


def read_regular(path: Path, max_bytes: int) -> bytes:
    """Return the content of a local file, of the size that it has now. OSError beyond the limit."""
    with open_regular(path, max_bytes) as file:
        return file.read(os.fstat(file.fileno()).st_size)
