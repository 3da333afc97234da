"""Every error a command can end with, and its exit code.

CifakeError                 exit 1
├── UsageError              a wrong request, exit 2; also a ValueError
├── StorageError            cannot read or write a path, exit 4
│   ├── CacheError          no other attempt will help: the cache of decoded images
│   └── SourceChanged       what was listed is dropped: the next attempt lists anew
├── RunMismatch             the output belongs to another run, exit 2
├── BundleError             a bundle that is missing, incomplete or altered, exit 4
├── NothingToDo             the source holds no file, exit 5
└── ResourceError           the cluster cannot place the plan or carry it out, exit 6
ImageError                  a wrong image: becomes a row, never ends a run

Anything else, such as a ValueError that numpy, pyarrow, torch or json raise, is a bug: exit 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes, the same for every verb."""

    OK = 0
    UNEXPECTED = 1
    USAGE = 2
    TOO_MANY_ERRORS = 3
    STORAGE = 4
    EMPTY_SOURCE = 5
    RESOURCES = 6
    INTERRUPTED = 130
    TERMINATED = 143


class CifakeError(Exception):
    """An error for the user: one line that names the thing and the remedy."""

    exit_code = ExitCode.UNEXPECTED


class UsageError(CifakeError, ValueError):
    """A wrong request: an option, a path or a file of options that cannot mean anything."""

    exit_code = ExitCode.USAGE


class StorageError(CifakeError):
    """A path or bucket cannot be read or written, or contains something unexpected."""

    exit_code = ExitCode.STORAGE


class CacheError(StorageError):
    """The folder for decoded images cannot be used on this machine."""


class SourceChanged(StorageError):
    """The source is not what it was when its listing began."""


class RunMismatch(CifakeError):
    """The output folder belongs to a run with another fingerprint."""

    exit_code = ExitCode.USAGE


class BundleError(CifakeError):
    """A bundle is missing, incomplete or altered."""

    exit_code = ExitCode.STORAGE


class NothingToDo(CifakeError):
    """The source contains no file to work on."""

    exit_code = ExitCode.EMPTY_SOURCE


class ResourceError(CifakeError):
    """The plan needs more CPUs, GPUs, memory or time than the cluster provides."""

    exit_code = ExitCode.RESOURCES


class ImageError(Exception):
    """One image cannot be used. `error` is one of `core.schema.IMAGE_ERRORS`."""

    def __init__(self, error: str, detail: str) -> None:
        super().__init__(f"{error}: {detail}")
        self.error = error
        self.detail = detail

    def __reduce__(self) -> tuple[type[ImageError], tuple[str, str]]:
        return type(self), (self.error, self.detail)


def suggest_word(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean WORD?` for the nearest known word, or nothing when none is near."""
    near = get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""
