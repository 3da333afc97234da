"""What is counted of a listing does not depend on who lists which part of it first."""

from __future__ import annotations

import json
import random
from typing import Any

import pyarrow as pa

from cifake_ray.core.schema import MANIFEST_FIELDS
from cifake_ray.storage.sources.listing_counts import (
    MAX_NAMES,
    MORE,
    NONE,
    ListingCounts,
    add_counts,
)
from cifake_ray.storage.sources.source import batch_rows

NUM_SOURCES = MAX_NAMES + 300


def make_batches() -> list[pa.RecordBatch]:
    """More sources than are counted one by one, of one or two images, and images without one."""
    sources = [f"generator-{n:04d}" for n in range(NUM_SOURCES)]
    names: list[str | None] = [*sources, *sources[::2], *[None] * 50]
    random.Random(0).shuffle(names)
    rows: list[tuple[Any, ...]] = [
        (f"{n}.jpg", "at", None, n, None, None, n % 2, None, name, None)
        for n, name in enumerate(names)
    ]
    return [
        batch
        for start in range(0, len(rows), 100)
        for batch in batch_rows(rows[start : start + 100], pa.schema(MANIFEST_FIELDS))
    ]


def count(batches: list[pa.RecordBatch]) -> ListingCounts:
    counts = ListingCounts()
    for batch in batches:
        counts.add(batch)
    return counts


def test_counts_do_not_depend_on_the_order_or_on_who_counts() -> None:
    batches = make_batches()
    whole = count(batches).to_dict()
    assert json.dumps(count(batches[::-1]).to_dict()) == json.dumps(whole)
    merged = ListingCounts()
    for part in (batches[9:], batches[:4], batches[4:9]):
        merged.merge(count(part).to_record())
    assert json.dumps(merged.to_dict()) == json.dumps(whole)


def test_the_first_names_are_counted_apart_and_the_others_together() -> None:
    sources = count(make_batches()).to_dict()["sources"]
    assert sources.pop(NONE) == 50
    assert sources.pop(MORE) == 300 + 150
    assert sources == {f"generator-{n:04d}": 2 - n % 2 for n in range(MAX_NAMES)}


def test_a_column_that_is_empty_in_one_listing_only_is_counted_as_none_there() -> None:
    with_source = {"labels": {"REAL": 2}, "splits": {}, "sources": {"a": 1, NONE: 1}}
    without = {"labels": {"REAL": 3}, "splits": {}, "sources": {}}
    assert add_counts((with_source, 2), (without, 3)) == {
        "labels": {"REAL": 5},
        "splits": {},
        "sources": {"a": 1, NONE: 4},
    }
    assert add_counts((without, 3), (with_source, 2))["sources"] == {NONE: 4, "a": 1}
