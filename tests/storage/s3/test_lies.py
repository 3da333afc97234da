"""Images in a store that lies: each key is its own bytes or an error row, and all ends soon."""

from __future__ import annotations

import gzip
import random
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from faults.command import wait_until
from hypothesis import given, settings
from hypothesis import strategies as st
from lying_store import Lie, LyingStore, Request, make_etag, make_xml, run_lying_store

from cifake_ray.config import StoreConfig
from cifake_ray.core.labels import make_class_names
from cifake_ray.errors import ImageError, StorageError
from cifake_ray.storage.s3.errors import S3Error
from cifake_ray.storage.s3.limits import S3Limits
from cifake_ray.storage.s3.listing import KeyLister, KeyRange, Query
from cifake_ray.storage.s3.location import check_bucket
from cifake_ray.storage.s3.page import parse_page
from cifake_ray.storage.s3.prefetch import read_objects
from cifake_ray.storage.sources.s3_prefix import S3PrefixSource

LIMITS = S3Limits(
    max_attempts=3,
    connect_timeout_s=1,
    read_timeout_s=1,
    deadline_s=2,
    first_pause_s=0.01,
    max_pause_s=0.05,
)
MAX_S = 15.0  # on a machine that has other work; most end at LIMITS.deadline_s
MAX_MEMORY_BYTES = 200 * 2**20
BODY = bytes(range(250)) * 4
MB = bytes(2**20)


@pytest.fixture(scope="module")
def running_store() -> Iterator[LyingStore]:
    with run_lying_store() as store:
        yield store


@pytest.fixture
def store(aws_env: None, running_store: LyingStore) -> LyingStore:
    """The same for all tests: to learn its address takes longer than the deadline of LIMITS."""
    running_store.lies.clear()
    running_store.objects = {"a.jpg": BODY, "b.jpg": BODY[::-1], "c.jpg": b"c"}
    wait_until(lambda: read(running_store) == [BODY, b"c"], timeout_s=60)
    return running_store


def read(
    store: LyingStore, offsets: list[int] | None = None, sizes: tuple[int | None, ...] = (1000, 1)
) -> list[Any]:
    """`a.jpg`, about which the store lies, and `c.jpg`, about which it does not."""
    return list(
        read_objects(
            StoreConfig(s3_endpoint_url=store.endpoint),
            ["s3://b/a.jpg", "s3://b/c.jpg"],
            sizes,
            [make_etag(BODY), make_etag(b"c")],
            LIMITS,
            offsets,
        )
    )


def raw(status: str, *headers: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *headers, "", ""]).encode()


ETAG = make_etag(BODY)
GZIP = gzip.compress(bytes(2**26))
CHUNKED = raw("200 OK", "Transfer-Encoding: chunked")
# What the store answers for `a.jpg`, and the error of its row.
ANSWERS: dict[str, tuple[Lie, str]] = {
    "fewer-bytes": (lambda r: r.answer(200, BODY[:-1], ETag=ETAG), "changed"),
    "more-bytes": (lambda r: r.answer(200, BODY + b"x", ETag=ETAG), "changed"),
    "no-bytes": (lambda r: r.answer(200, b"", ETag=ETAG), "changed"),
    "fewer-than-it-says": (lambda r: r.answer(200, BODY[:9], Content_Length="1000"), "io_network"),
    "gigabytes-it-says": (lambda r: r.answer(200, BODY, Content_Length="9" * 17), "changed"),
    "length-of-5000-digits": (
        lambda r: r.answer(200, BODY + b"x", Content_Length="9" * 5000),
        "changed",
    ),
    "length-is-no-digit": (lambda r: r.answer(200, BODY + b"x", Content_Length="\xb2"), "changed"),
    "two-lengths": (lambda r: r.answer(200, BODY, Content_Length="1000, 999"), "io_network"),
    "another-version": (lambda r: r.answer(200, BODY, ETag='"other"'), "changed"),
    "a-part": (lambda r: r.answer(206, BODY, Content_Range="bytes 0-999/2000"), "io_network"),
    "a-part-as-whole": (
        lambda r: r.answer(200, BODY, ETag=ETAG, Content_Range="bytes 0-999/2000"),
        "io_network",
    ),
    "no-content": (lambda r: r.answer(204), "io_network"),
    "not-modified": (lambda r: r.answer(304), "io_network"),
    "status-999": (lambda r: r.answer(999), "io_network"),
    "gzip": (lambda r: r.answer(200, GZIP, Content_Encoding="gzip"), "changed"),
    "huge-error": (lambda r: r.answer(503, MB * 17), "io_throttled"),
    "html": (lambda r: r.answer(200, b"<html>Sign in</html>"), "changed"),
    "encoding-of-error": (
        lambda r: r.answer(403, b"<?xml version='1.0' encoding='x'?><Error/>"),
        "denied",
    ),
    "retry-after-words": (lambda r: r.answer(503, Retry_After="\xb2"), "io_throttled"),
    "endless-chunks": (
        lambda r: r.repeat(CHUNKED, b"100000\r\n" + MB + b"\r\n"),
        "changed",
    ),
    "endless-trailer": (
        lambda r: r.repeat(CHUNKED + b"0\r\n", b"a: b\r\n"),
        "io_network",
    ),
    "endless-continue": (lambda r: r.repeat(b"", raw("100 Continue")), "io_network"),
    "endless-headers": (lambda r: r.repeat(b"HTTP/1.1 200 OK\r\n", b"a: b\r\n"), "io_network"),
    "endless-header": (lambda r: r.repeat(b"HTTP/1.1 200 OK\r\na: ", b"b" * 1000), "io_network"),
    "endless-status": (lambda r: r.repeat(b"HTTP/1.1 200 ", b"b" * 1000), "io_network"),
    "dripping-header": (lambda r: r.repeat(b"HTTP/1.1 200 OK\r\na: ", b"b", 0.2), "io_network"),
    "dripping-body": (
        lambda r: r.repeat(raw("200 OK", "Content-Length: 1000"), b"b", 0.2),
        "io_network",
    ),
    "no-length": (lambda r: r.repeat(raw("200 OK"), MB), "changed"),
    "no-http": (lambda r: r.repeat(b"SSH-2.0-OpenSSH_9.6\r\n", b"x", 0.2), "io_network"),
}


@pytest.mark.parametrize(("lie", "error"), ANSWERS.values(), ids=ANSWERS)
def test_an_answer_that_is_wrong_is_the_error_of_its_row(
    store: LyingStore, lie: Lie, error: str
) -> None:
    store.lies[:] = [lambda request: request.key == "a.jpg" and lie(request)]
    tracemalloc.start()
    started_s = time.monotonic()
    result, other = read(store)
    elapsed_s, (_, peak_bytes) = time.monotonic() - started_s, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert other == b"c"
    assert isinstance(result, ImageError)
    assert result.error == error, result
    assert len(result.detail) < 300
    assert result.detail.isprintable()
    assert elapsed_s < MAX_S
    assert peak_bytes < MAX_MEMORY_BYTES


PARTS: dict[str, tuple[Lie, str]] = {
    "whole": (lambda r: r.answer(200, BODY, ETag=ETAG), "denied"),
    "another-start": (
        lambda r: r.answer(206, BODY[1:101], Content_Range="bytes 1-100/1000"),
        "io_network",
    ),
    "fewer": (lambda r: r.answer(206, BODY[:50], Content_Range="bytes 0-49/1000"), "io_network"),
    "fewer-than-it-says": (
        lambda r: r.answer(206, BODY[:50], Content_Range="bytes 0-99/1000"),
        "io_network",
    ),
    "more": (lambda r: r.answer(206, BODY, Content_Range="bytes 0-999/1000"), "changed"),
    "no-range": (lambda r: r.answer(206, BODY[:50]), "changed"),
    "no-numbers": (lambda r: r.answer(206, BODY[:100], Content_Range="bytes */*"), "io_network"),
    "another-version": (
        lambda r: r.answer(206, BODY[:100], Content_Range="bytes 0-99/1000", ETag='"other"'),
        "changed",
    ),
}


@pytest.mark.parametrize(("lie", "error"), PARTS.values(), ids=PARTS)
def test_a_part_that_is_wrong_is_the_error_of_its_row(
    store: LyingStore, lie: Lie, error: str
) -> None:
    store.lies[:] = [lambda request: request.key == "a.jpg" and lie(request)]
    result, other = read(store, offsets=[0, 0], sizes=(100, 1))
    assert other == b"c"
    assert isinstance(result, ImageError)
    assert result.error == error, result


def test_what_follows_an_answer_is_not_the_next_answer(store: LyingStore) -> None:
    """Whatever a store sends behind an object, the objects asked for next are their own."""

    def smuggle(request: Request) -> bool | None:
        if request.key != "a.jpg":
            return None
        stranger = raw("200 OK", "Content-Length: 1000", f"ETag: {make_etag(BODY[::-1])}")
        request.wfile.write(
            raw("200 OK", "Content-Length: 1000", f"ETag: {ETAG}") + BODY + stranger + BODY
        )
        return True

    store.lies[:] = [smuggle]
    config = StoreConfig(s3_endpoint_url=store.endpoint)
    names = ["a.jpg", "b.jpg"] * 20
    etags = [make_etag(store.objects[name]) for name in names]
    locations = [f"s3://b/{name}" for name in names]
    got = list(read_objects(config, locations, [1000] * 40, etags, LIMITS))
    assert got == [store.objects[name] for name in names]


def test_a_clock_that_is_wrong_ends_the_run_with_the_remedy(store: LyingStore) -> None:
    store.lies[:] = [lambda r: r.answer_error(403, "RequestTimeTooSkewed")]
    with pytest.raises(StorageError, match="set the clock"):
        read(store)
    with pytest.raises(StorageError, match="set the clock"):
        check_bucket(StoreConfig(s3_endpoint_url=store.endpoint), "b", limits=LIMITS)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_to_another_host_is_followed(
    store: LyingStore, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "CANARY-token")
    with run_lying_store() as elsewhere:
        elsewhere.objects = dict(store.objects)
        target = f"{elsewhere.endpoint}/b/a.jpg"
        store.lies[:] = [lambda r: r.answer_error(status, "Redirect", Location=target)]
        result, _ = read(store)
        with pytest.raises(StorageError, match="another host"):
            check_bucket(StoreConfig(s3_endpoint_url=store.endpoint), "b", limits=LIMITS)
        assert elsewhere.seen == []
    assert isinstance(result, ImageError)
    assert result.error == "io_network"


@pytest.mark.parametrize("region", ["evil.example/", "x@evil.example", "eu-west-1", "\xb2" * 99])
def test_a_store_that_always_names_another_region_is_told(store: LyingStore, region: str) -> None:
    answers = iter(range(1000))

    def move(request: Request) -> bool:
        name = f"{region}{next(answers)}"
        return request.answer_error(301, "PermanentRedirect", x_amz_bucket_region=name)

    store.lies[:] = [move]
    limits = replace(LIMITS, deadline_s=60)  # each region is another client
    with pytest.raises(StorageError) as error:
        check_bucket(StoreConfig(s3_endpoint_url=store.endpoint), "b", limits=limits)
    assert "region" in str(error.value)


def list_keys(store: LyingStore, prefix: str = "") -> list[str]:
    config = StoreConfig(s3_endpoint_url=store.endpoint)
    source = S3PrefixSource("b", prefix, config, make_class_names(), limits=LIMITS)
    batches = list(source.list_images().batches)
    return [key for batch in batches for key in batch.column("key").to_pylist()]


def entry(key: str, size: str = "1") -> tuple[str, str, str]:
    return key, size, '"e"'


def answer_page(*entries: tuple[str, str, str], **options: Any) -> Lie:
    return lambda request: request.answer(200, make_xml(list(entries), **options))


class Pages:
    """Answers one page after another, beginning again at their end; never the last one."""

    def __init__(self, *pages: tuple[list[str], str]) -> None:
        self.pages = pages
        self.tokens = ["", *[token for _, token in pages]]

    def __call__(self, request: Request) -> bool:
        place = self.tokens.index(request.query.get("continuation-token", ""))
        keys, token = self.pages[place % len(self.pages)]
        return request.answer(200, make_xml([entry(key) for key in keys], token=token))


def answer_empty_pages(request: Request) -> bool:
    token = int(request.query.get("continuation-token", "0")) + 1
    return request.answer(200, make_xml([], token=str(token)))


NAMES = "abcdefghij"
BOMB = (
    '<!DOCTYPE l [<!ENTITY a "aaaaaaaaaa">'
    + "".join(f'<!ENTITY {NAMES[n + 1]} "{10 * ("&" + NAMES[n] + ";")}">' for n in range(9))
    + "]><ListBucketResult><IsTruncated>false</IsTruncated><Contents><Key>&j;</Key>"
    "<Size>1</Size></Contents></ListBucketResult>"
).encode()
LISTINGS: dict[str, Lie] = {
    "same-page-for-ever": Pages((["a"], "t")),
    "same-token": Pages((["a"], "t"), (["b"], "t")),
    "pages-in-a-circle": Pages((["a"], "s"), (["b"], "t"), (["c"], "u")),
    "same-keys-other-tokens": lambda r: r.answer(
        200, make_xml([entry("a")], token=f"{random.random()}")
    ),
    "no-keys-for-ever": answer_empty_pages,
    "key-twice": answer_page(entry("a"), entry("b"), entry("a")),
    "no-token": answer_page(entry("a"), is_truncated="true"),
    "perhaps-truncated": answer_page(entry("a"), is_truncated="perhaps"),
    "outside": answer_page(entry("elsewhere")),
    "outside-and-long": answer_page(entry("b\n" * 2**20)),
    "no-key": answer_page(entry("")),
    "negative": answer_page(entry("a", "-1")),
    "no-number": answer_page(entry("a", "many")),
    "no-size": answer_page(entry("a", "")),
    "exabytes": answer_page(entry("a", "9" * 40)),
    "float": answer_page(entry("a", "1e3")),
    "truncated": lambda r: r.answer(200, make_xml([entry("a")])[:-9]),
    "garbage-behind": lambda r: r.answer(200, make_xml([entry("a")]) + b"<x/>"),
    "html": lambda r: r.answer(200, b"<!DOCTYPE html><html><body>Sign in<br></body></html>"),
    "xhtml": lambda r: r.answer(200, b"<html><body>Sign in</body></html>"),
    "error-of-200": lambda r: r.answer_error(200, "InternalError"),
    "empty": lambda r: r.answer(200, b""),
    "no-content": lambda r: r.answer(204),
    "bomb": lambda r: r.answer(200, BOMB),
    "unknown-encoding": lambda r: r.answer(200, b"<?xml version='1.0' encoding='x'?><a/>"),
    "utf-7": lambda r: r.answer(200, b"<?xml version='1.0' encoding='utf-7'?><a/>"),
    "too-large": lambda r: r.answer(200, MB * 17),
    "endless": lambda r: r.repeat(raw("200 OK") + b"<ListBucketResult>", MB),
    "deep": lambda r: r.answer(200, b"<a>" * 2**19),
}


@pytest.mark.parametrize("name", LISTINGS)
def test_a_listing_that_is_wrong_is_told(store: LyingStore, name: str) -> None:
    lie = LISTINGS[name]
    # The first page of one key checks that the bucket is there.
    store.lies[:] = [lambda r: r.query.get("max-keys") != "1" and lie(r)]
    started_s = time.monotonic()
    with pytest.raises(StorageError) as error:
        pytest.fail(f"{list_keys(store, 'in/' if 'outside' in name else '')}")
    message = str(error.value)
    assert message.startswith("s3://b/")
    assert message.isprintable()
    assert len(message) < 400
    assert time.monotonic() - started_s < 2 * MAX_S


@settings(max_examples=200, deadline=None)
@given(
    keys=st.lists(st.text("ab/", min_size=1, max_size=4), unique=True, max_size=40), data=st.data()
)
def test_a_listing_in_no_order_is_whole_or_told(keys: list[str], data: st.DataObject) -> None:
    """Pages of a store that knows prefixes, but no order."""
    page_keys = data.draw(st.integers(1, 8))

    def ask(query: Query) -> Any:
        found = [key for key in keys if key.startswith(query["prefix"])]
        after = query.get("continuation-token") or query.get("start-after", "")
        start = found.index(after) + 1 if after in found else 0
        page = found[start : start + int(query["max-keys"])]
        token = page[-1] if start + len(page) < len(found) else None
        return parse_page(make_xml([entry(key) for key in page], token=token))

    listed: list[str] = []
    with suppress(S3Error):  # it says that they are in no order
        for page in KeyLister(ask, num_threads=3, page_keys=page_keys).list_pages([KeyRange("")]):
            listed += page.keys
        assert set(listed) == set(keys)
