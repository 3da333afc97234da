"""List what the cache of decoded images holds, keep it within a size, and clear it."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cifake_ray.errors import CacheError
from cifake_ray.storage.io.files import MAX_JSON_BYTES
from cifake_ray.storage.io.regular_file import read_regular

PIXELS = (".npy", ".native")
SUFFIXES = (*PIXELS, ".json", ".lock", ".writing")
KEY = re.compile(r"[0-9a-f]{32}(-[0-9]+)?")  # and of whom, where another user took the name
# An entry that was used so lately may be about to be mapped; once it is, it may lose its name.
MIN_IDLE_S = 300.0


@dataclass(frozen=True)
class CacheEntry:
    """The decoded images of some files and a preprocessing."""

    path: Path  # without a suffix
    size_bytes: int  # on the disk
    last_used: float  # Unix time in seconds
    about: str  # the shards and what was made of them; empty in caches of before
    is_ours: bool  # whether this user may remove it


def list_entries(folder: Path) -> list[CacheEntry]:
    """Return the entries of a cache folder, those used last first. CacheError if it is unreadable.

    Also pixels whose record a kill has prevented, but not what is being decoded now.
    """
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CacheError(f"{folder}: {error.strerror}; choose another --cache-dir") from error
    keys = {name.partition(".")[0] for name in names if name.endswith((*PIXELS, ".json"))}
    entries = []
    for key in sorted(filter(KEY.fullmatch, keys)):  # other files are not ours to remove
        with suppress(OSError, ValueError):  # removed meanwhile: it has no file
            if (entry := _read_entry(folder / key)) is not None:
                entries.append(entry)
    return sorted(entries, key=lambda entry: -entry.last_used)


def _read_entry(path: Path) -> CacheEntry | None:
    """Read an entry by its path without a suffix. OSError or ValueError when it is gone.

    None for files of others with such a name: ours have a lock, or a record of what is unusable.
    """
    files = [file for suffix in SUFFIXES if os.path.lexists(file := path.with_suffix(suffix))]
    facts, record = {file.suffix: file.lstat() for file in files}, None
    with suppress(OSError, ValueError):  # damaged: training says so
        record = json.loads(read_regular(path.with_suffix(".json"), MAX_JSON_BYTES))
    if ".lock" not in facts and not (isinstance(record, dict) and "unusable" in record):
        return None
    about = str(record.get("about", "")) if isinstance(record, dict) else ""
    owners = {fact.st_uid for fact in facts.values()}
    used = facts.get(".json") or max(facts.values(), key=lambda fact: fact.st_mtime)
    return CacheEntry(
        path,
        sum(fact.st_size for fact in facts.values()),
        used.st_mtime,
        about,
        os.getuid() == 0 or owners == {os.getuid()},
    )


def remove_entries(entries: Iterable[CacheEntry]) -> None:
    """Remove entries; a training that has mapped one keeps it until it ends.

    The record goes last, so that what a kill has left is still an entry. CacheError on failure.
    """
    for entry in entries:
        for suffix in (*PIXELS, ".writing", ".lock", ".json"):
            try:
                entry.path.with_suffix(suffix).unlink(missing_ok=True)
            except OSError as error:
                raise CacheError(f"{error.filename}: {error.strerror}; remove it") from error


def make_room(kept: Path, max_bytes: int) -> list[CacheEntry]:
    """Remove this user's entries beside `kept`, the longest unused first, down to `max_bytes`.

    Those of the last MIN_IDLE_S stay. Return what was removed.
    """
    entries = [entry for entry in list_entries(kept.parent) if entry.is_ours]
    total_bytes, removed = sum(entry.size_bytes for entry in entries), []
    for entry in reversed(entries):
        if total_bytes <= max_bytes or time.time() - entry.last_used < MIN_IDLE_S:
            break
        if entry.path != kept:
            removed.append(entry)
            total_bytes -= entry.size_bytes
    remove_entries(removed)
    return removed
