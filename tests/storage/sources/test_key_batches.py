"""Thousands of keys at once become the rows that each would become alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cifake_ray.core.labels import make_class_names
from cifake_ray.core.schema import MANIFEST_FIELDS
from cifake_ray.storage.s3.page import Page
from cifake_ray.storage.sources import key_batches
from cifake_ray.storage.sources.clutter import (
    MEDIA_SUFFIXES,
    SIDECAR_FILES,
    SIDECAR_SUFFIXES,
    SYSTEM_FILES,
    SYSTEM_PREFIXES,
    find_clutter,
    may_be_clutter,
)
from cifake_ray.storage.sources.key_batches import KeyBatches
from cifake_ray.storage.sources.source import KeyFilter, Listing, escape_key, make_label_reader

CLASS_NAMES = make_class_names()
FOLDERS = st.sampled_from(
    (
        *("FAKE", "real", "train", "test set", "sd-1.5", "é", "a\udcff", "real\udcff", ".git"),
        *(".GIT", "__MACOSX", "node_modules", ".Trash-1", "", ".", "..", "K\u212a"),
    )
) | st.text("aR/.é", max_size=4)
FILES = st.sampled_from(
    (
        *("1.jpg", "2.PNG", "a.TXT", "x.csv.gz", "x.jpg.gz", ".gz", "gz", ".DS_Store", "._a.jpg"),
        *("~$x", "README", "Readme.md", "metadata.csv", "METADATA.csv", "metadata.jsonl", ""),
        *("labels.csv", "l.tsv.gz", "Thumbs.db", "icon\r", "a.mp4", "a.", ".", "txt", ".txt"),
        *(".g\u212a", "\udcff", "\udcff.txt", "\u212a.\u212aML", ".git\u212aeep", "_SUCCESS"),
    )
) | st.text("a.~_t\udcffx\u0130", max_size=5)
KEYS = st.tuples(st.lists(FOLDERS, max_size=3), FILES).map(lambda key: "/".join([*key[0], key[1]]))
FILTERS = st.builds(
    KeyFilter,
    st.sampled_from([(), ("*.jpg",), ("*.txt", "*.gz"), ("*/.git/*", "real")]),
    st.sampled_from([(), ("*FAKE*",), ("train", "*.gz")]),
)


def list_rows(
    prefix: str, keys: list[str], sizes: list[int], key_filter: KeyFilter, listing: Listing
) -> Iterator[Sequence[Any]]:
    """What each key is, one after another."""
    read_labels = make_label_reader(CLASS_NAMES)
    for key, size in zip(keys, sizes, strict=True):
        if not key or (key[-1] == "/" and not size):
            listing.left_out["folder marker"] += 1
        elif reason := key_filter.find_reason(key):
            listing.leave_out(key, reason)
        else:
            labels = read_labels(key.rpartition("/")[0])
            etag = f'"{size}"' if size else None
            if (escaped := escape_key(key)) is None:
                yield key, f"s3://b/{prefix}{key}", None, size, None, etag, *labels, None
            else:
                yield escaped, None, None, size, None, etag, labels.label, None, None, "bad_key"


@settings(max_examples=500, deadline=None)
@given(
    prefix=st.sampled_from(["", "é/", "in/FAKE/"]),
    keys=st.lists(KEYS, max_size=30),
    key_filter=st.just(KeyFilter()) | FILTERS,
    data=st.data(),
)
def test_keys_become_the_rows_that_each_would_become_alone(
    prefix: str, keys: list[str], key_filter: KeyFilter, data: st.DataObject
) -> None:
    sizes = data.draw(st.lists(st.integers(0, 3), min_size=len(keys), max_size=len(keys)))
    page_keys, batch_rows = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 20))
    alone, listing = Listing(iter(())), Listing(iter(()))
    expected = list(list_rows(prefix, keys, sizes, key_filter, alone))
    pages = (
        Page(
            [prefix + key for key in keys[start : start + page_keys]],
            sizes[start : start + page_keys],
            [f'"{size}"' if size else None for size in sizes[start : start + page_keys]],
            None,
        )
        for start in range(0, len(keys), page_keys)
    )
    rows = KeyBatches("s3://b/", prefix, CLASS_NAMES, key_filter, listing)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(key_batches, "LISTING_BATCH_ROWS", batch_rows)
        batches = list(rows.make_batches(pages))
    table = pa.Table.from_batches(batches, pa.schema(MANIFEST_FIELDS))
    assert [tuple(row.values()) for row in table.to_pylist()] == expected
    assert all(batch.num_rows for batch in batches)
    assert listing.left_out == alone.left_out
    assert (listing.notes, listing.tables) == (alone.notes, alone.tables)


def test_every_name_that_is_clutter_is_looked_at() -> None:
    suffixes = [*SIDECAR_SUFFIXES, *MEDIA_SUFFIXES, *(f"{s}.gz" for s in SIDECAR_SUFFIXES)]
    names = [*SYSTEM_FILES, *SIDECAR_FILES, *(f"{start}x.jpg" for start in SYSTEM_PREFIXES)]
    names += [f"x.{suffix}" for suffix in suffixes] + [f".{suffix}" for suffix in suffixes]
    names += [name.upper() for name in names]
    assert all(map(find_clutter, names))
    assert all(may_be_clutter(pa.array(names)))
    assert not any(may_be_clutter(pa.array(["1.jpg", "a", "", "é.webp", "x.parquet"])))
