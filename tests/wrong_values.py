"""Wrong values for records that others may have written, and wrong things in the place of files."""

from __future__ import annotations

import copy
import math
import os
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

DELETED = object()
WRONG_VALUES: dict[str, Any] = {
    "null": None,
    "true": True,
    "text": "text",
    "outside": "../outside/victim",
    "control": "\x1b]0;owned\x07\n<script>",
    "negative": -1,
    "huge": 2**200,
    "large": 2**62,
    "nan": math.nan,
    "list": [],
    "nested": [[["x"]]],
    "mapping": {},
    "deep": {"a": {"b": {"c": 1}}},
    "deleted": DELETED,
}
NUM_PLACES = 5  # of a record, for each wrong value

# In the place of a file; `outside/victim` is beside the folder that its folder is in.
WRONG_KINDS: dict[str, Callable[[Path], Any]] = {
    "a pipe": os.mkfifo,
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "ten terabytes": lambda path: path.write_bytes(b"") or os.truncate(path, 10 * 2**40),
    "a folder": Path.mkdir,
    "a link to itself": lambda path: path.symlink_to(path),
    "a link out": lambda path: path.symlink_to("../../outside/victim"),
    "a dangling link out": lambda path: path.symlink_to("../../outside/new"),
}


def list_places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield where a value of a JSON record stands, for all of them, the record first."""
    yield place
    items: Any = ()
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
    for name, item in items:
        yield from list_places(item, (*place, name))


def choose(places: Iterable[Any], seed: str) -> list[Any]:
    """Return some of the places; all of them with CIFAKE_TEST_EXAMPLES."""
    found = list(places)
    if "CIFAKE_TEST_EXAMPLES" in os.environ:
        return found
    return random.Random(seed).sample(found, min(NUM_PLACES, len(found)))


def put(record: Any, place: tuple[Any, ...], value: Any) -> Any:
    """Return a record with another value in a place, or without it."""
    if not place:
        return {} if value is DELETED else value
    record = copy.deepcopy(record)
    inner = record
    for name in place[:-1]:
        inner = inner[name]
    if value is DELETED:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return record
