"""Every key is listed once, however a listing is divided and whatever order the store has."""

from __future__ import annotations

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


@pytest.mark.parametrize("order", [sort_by_bytes, sort_by_folder])
@settings(max_examples=300, deadline=None)
@given(keys=st.sets(KEYS, min_size=1, max_size=60))
def test_every_key_is_listed_once_in_either_order(
    order: Callable[[str], Any], keys: set[str]
) -> None:
    if order is sort_by_folder:  # there, a name is a folder or a file
        keys = {key for key in keys if not any(other.startswith(f"{key}/") for other in keys)}
    assert sorted(list_all(make_store(keys, order))) == sorted(keys)


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
