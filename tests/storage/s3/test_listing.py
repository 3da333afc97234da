"""Every key is listed once, however a listing is divided and whatever order the store has."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import escape

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cifake_ray.storage.s3.errors import S3Error
from cifake_ray.storage.s3.listing import KeyLister, KeyRange, Query
from cifake_ray.storage.s3.page import Page, parse_page


def sort_by_bytes(key: str) -> Any:
    return key


def sort_by_folder(key: str) -> Any:
    return key.split("/")


def make_store(
    keys: set[str], order: Callable[[str], Any], queries: list[Query] | None = None
) -> Callable[[Query], Page]:
    """Answers ListObjectsV2 for these keys, in this order."""
    ordered = sorted(keys, key=order)

    def ask(query: Query) -> Page:
        if queries is not None:
            queries.append(query)
        found = [key for key in ordered if key.startswith(query["prefix"])]
        start, size = 0, int(query["max-keys"])
        if token := query.get("continuation-token"):
            start = int(token)
        elif after := query.get("start-after"):
            start = sum(order(key) <= order(after) for key in found)
        page, is_truncated = found[start : start + size], start + size < len(found)
        contents = "".join(
            f"<Contents><Key>{escape(quote(key))}</Key><Size>1</Size><ETag>e</ETag></Contents>"
            for key in page
        )
        following = f"<NextContinuationToken>{start + size}</NextContinuationToken>"
        return parse_page(
            "<ListBucketResult><EncodingType>url</EncodingType>"
            f"<IsTruncated>{str(is_truncated).lower()}</IsTruncated>"
            f"{following if is_truncated else ''}{contents}</ListBucketResult>".encode()
        )

    return ask


def list_all(ask: Callable[[Query], Page], prefix: str = "", page_keys: int = 2) -> list[str]:
    lister = KeyLister(ask, num_threads=4, page_keys=page_keys)
    return [key for page in lister.list_pages([KeyRange(prefix)]) for key in page.keys]


# Few characters, so that stems are shared, folders meet files, and `/` meets what sorts around it.
NAMES = st.text(alphabet="ab-0.é\U0010ffff", min_size=1, max_size=4)
KEYS = st.lists(NAMES, min_size=1, max_size=4).map("/".join)


def drop_folders(keys: set[str], order: Callable[[str], Any]) -> set[str]:
    """Where keys are ordered by folder, a name is a folder or a file."""
    if order is sort_by_bytes:
        return keys
    return {key for key in keys if not any(other.startswith(f"{key}/") for other in keys)}


@pytest.mark.parametrize("order", [sort_by_bytes, sort_by_folder])
@settings(max_examples=300, deadline=None)
@given(keys=st.sets(KEYS, min_size=1, max_size=60))
def test_every_key_is_listed_once_in_either_order(
    order: Callable[[str], Any], keys: set[str]
) -> None:
    keys = drop_folders(keys, order)
    assert sorted(list_all(make_store(keys, order))) == sorted(keys)


@pytest.mark.parametrize("order", [sort_by_bytes, sort_by_folder])
@settings(max_examples=200, deadline=None)
@given(keys=st.sets(KEYS, min_size=1, max_size=60), data=st.data())
def test_every_key_is_listed_once_part_by_part(
    order: Callable[[str], Any], keys: set[str], data: st.DataObject
) -> None:
    keys = drop_folders(keys, order)
    ask = make_store(keys, order)
    listed: list[str] = []
    todo = [KeyRange("")]
    while todo:
        # Some of what is left, in any order and through JSON, each time with another end.
        todo = data.draw(st.permutations(todo))
        number = data.draw(st.integers(1, len(todo)))
        parts = [KeyRange(*part) for part in json.loads(json.dumps(todo[:number]))]
        lister = KeyLister(ask, data.draw(st.integers(1, 4)), 2, data.draw(st.integers(1, 30)))
        num_before = len(listed)
        listed += [key for page in lister.list_pages(parts) for key in page.keys]
        assert lister.left or number == len(parts)
        assert len(listed) - num_before <= lister.max_keys + 2 * lister.num_threads
        todo = todo[number:] + lister.left
    assert sorted(listed) == sorted(keys)


@settings(max_examples=100, deadline=None)
@given(keys=st.sets(st.text(alphabet="a/-", min_size=1, max_size=6), min_size=1, max_size=60))
def test_slashes_anywhere_are_part_of_a_key(keys: set[str]) -> None:
    assert sorted(list_all(make_store(keys, sort_by_bytes))) == sorted(keys)


def test_an_order_that_is_not_understood_is_not_divided() -> None:
    keys = {f"{number:04d}" for number in range(500)}
    queries: list[Query] = []
    ask = make_store(keys, lambda key: key[::-1], queries)
    assert sorted(list_all(ask, page_keys=10)) == sorted(keys)
    assert {query["prefix"] for query in queries} == {""}


def test_a_listing_does_not_end_where_it_could_not_go_on() -> None:
    """At a key that cannot be asked for, or in a store whose order is not understood."""
    not_utf8 = [f"{number:03d}\udcff" for number in range(500)]
    pages = iter(range(0, 500, 10))

    def ask(_: Query) -> Page:
        start = next(pages)
        keys = not_utf8[start : start + 10]
        return Page(keys, [1] * 10, ["e"] * 10, f"{start}" if start < 490 else None)

    no_order = make_store({f"{number:04d}" for number in range(500)}, lambda key: key[::-1])
    for store in (ask, no_order):
        lister = KeyLister(store, num_threads=2, page_keys=10, max_keys=1)
        assert sum(len(page.keys) for page in lister.list_pages([KeyRange("")])) == 500
        assert lister.left == []


def test_a_part_that_a_store_does_not_begin_where_it_was_left_is_told() -> None:
    ask = make_store({f"{number:04d}" for number in range(100)}, sort_by_bytes)

    def forget(query: Query) -> Page:
        return ask({name: value for name, value in query.items() if name != "start-after"})

    lister = KeyLister(forget, num_threads=1, page_keys=10)
    with pytest.raises(S3Error, match="in no order"):
        list(lister.list_pages([KeyRange("", "0050")]))


def test_a_flat_folder_is_divided_at_its_names() -> None:
    keys = {f"images/img_{number:05d}.jpg" for number in range(20_000)}
    queries: list[Query] = []
    listed = list_all(make_store(keys, sort_by_bytes, queries), "images/", page_keys=100)
    assert sorted(listed) == sorted(keys)
    pages = [query for query in queries if query["max-keys"] == "100"]
    assert len({query["prefix"] for query in pages}) > 4
    assert len(pages) < 300
    assert len(queries) < 1000


def test_a_million_folders_of_one_file_are_not_a_million_requests() -> None:
    keys = {f"{number:04d}/image.jpg" for number in range(5_000)}
    queries: list[Query] = []
    assert sorted(list_all(make_store(keys, sort_by_bytes, queries), page_keys=100)) == sorted(keys)
    assert len(queries) < 500


def test_the_first_error_ends_the_listing() -> None:
    ask = make_store({f"{number:04d}" for number in range(2_000)}, sort_by_bytes)
    asked = threading.Semaphore(20)

    def fail_later(query: Query) -> Page:
        if not asked.acquire(blocking=False):
            raise S3Error(403, "AccessDenied", "no more")
        return ask(query)

    with pytest.raises(S3Error, match="no more"):
        list_all(fail_later)
    wait_for_threads()


def test_a_mistake_in_a_thread_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)

    def break_down(query: Query) -> Page:
        raise ZeroDivisionError

    with pytest.raises(RuntimeError, match="ended unexpectedly"):
        list_all(break_down)


def test_whoever_stops_reading_ends_the_listing() -> None:
    ask = make_store({f"{number:04d}" for number in range(2_000)}, sort_by_bytes)
    pages = KeyLister(ask, num_threads=4, page_keys=2).list_pages([KeyRange("")])
    next(pages)
    pages.close()  # type: ignore[attr-defined]
    wait_for_threads()


def wait_for_threads() -> None:
    for thread in threading.enumerate():
        if thread.name == "list":
            thread.join(5)
            assert not thread.is_alive()


def test_a_page_says_keys_sizes_and_etags() -> None:
    page = parse_page(
        b'<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        b"<EncodingType>url</EncodingType><IsTruncated>false</IsTruncated>"
        b"<Contents><Key>a+b%2B%0A%01</Key><Size>3</Size><ETag>&quot;x&quot;</ETag></Contents>"
        b"<Contents><Key>%FF</Key><Size>0</Size></Contents></ListBucketResult>"
    )
    assert page == (["a b+\n\x01", "\udcff"], [3, 0], ['"x"', None], None)
