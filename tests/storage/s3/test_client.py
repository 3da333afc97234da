"""Fetching from S3: what a store may do to a request, and what becomes of the row."""

from __future__ import annotations

import http.server
import math
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import botocore.session
import pytest
from faults.command import wait_until
from faults.proxy import FaultProxy, run_proxy
from s3_server import S3Server, find_ports

from cifake_ray.config import StoreConfig
from cifake_ray.core.imaging.decode import MAX_IMAGE_BYTES
from cifake_ray.errors import ImageError, StorageError
from cifake_ray.storage.s3.client import connect
from cifake_ray.storage.s3.errors import S3Error
from cifake_ray.storage.s3.limits import DEFAULT_LIMITS, S3Limits
from cifake_ray.storage.s3.location import check_bucket
from cifake_ray.storage.s3.prefetch import StoredObject, fetch_objects, read_objects
from cifake_ray.storage.s3.throttle import Throttle

QUICK = S3Limits(
    max_attempts=4,
    connect_timeout_s=1,
    read_timeout_s=0.4,
    deadline_s=10,
    first_pause_s=0.01,
    max_pause_s=0.05,
)


@pytest.fixture
def proxy(s3_env: S3Server) -> Iterator[FaultProxy]:
    with run_proxy(s3_env.endpoint) as proxy:
        yield proxy


@pytest.fixture
def bucket(s3_env: S3Server) -> str:
    bucket = s3_env.make_bucket()
    s3_env.put(bucket, "img/a.jpg", b"a" * 1000)
    return bucket


def fetch(
    endpoint: str, objects: list[StoredObject], limits: S3Limits = QUICK
) -> list[bytes | ImageError]:
    return list(fetch_objects(StoreConfig(s3_endpoint_url=endpoint), objects, limits))


def fetch_one(endpoint: str, bucket: str, key: str = "img/a.jpg", **options: Any) -> Any:
    limits = options.pop("limits", QUICK)
    (result,) = fetch(endpoint, [StoredObject(bucket, key, **options)], limits)
    return result


def error_of(result: Any) -> str:
    assert isinstance(result, ImageError), result
    return result.error


def test_objects_come_in_order_over_kept_connections(
    s3_env: S3Server, proxy: FaultProxy, bucket: str
) -> None:
    etags = [s3_env.put(bucket, f"many/{n}", b"%d" % n) for n in range(200)]
    locations = [f"s3://{bucket}/many/{n}" for n in range(200)]
    store = StoreConfig(s3_endpoint_url=proxy.endpoint)
    proxy.delay_s = 0.01
    got = list(read_objects(store, locations, [None] * 200, etags))
    assert got == [b"%d" % n for n in range(200)]
    assert len(proxy.seen) == 200  # one request each
    assert {seen.headers["If-Match"] for seen in proxy.seen} == set(etags)
    assert proxy.num_connections <= DEFAULT_LIMITS.max_in_flight
    assert 4 < proxy.most_in_flight <= DEFAULT_LIMITS.max_in_flight


def test_a_part_of_an_object_is_asked_for_alone(s3_env: S3Server, bucket: str) -> None:
    data = os.urandom(5000)
    etag = s3_env.put(bucket, "tar", data)
    parts = [(0, 1), (100, 2000), (4999, 1), (0, 5000), (4000, 2000), (6000, 10)]
    objects = [StoredObject(bucket, "tar", etag, size, offset) for offset, size in parts]
    *results, behind_the_end = fetch(s3_env.endpoint, objects)
    assert results == [data[offset : offset + size] for offset, size in parts[:-1]]
    assert error_of(behind_the_end) == "changed"
    old = StoredObject(bucket, "tar", '"another"', 10, 0)
    assert [error_of(result) for result in fetch(s3_env.endpoint, [old])] == ["changed"]


def test_a_store_that_sends_all_instead_of_a_part_is_told(proxy: FaultProxy, bucket: str) -> None:
    proxy.fail("status", status=200)
    result = fetch_one(proxy.endpoint, bucket, offset=0, size_bytes=10)
    assert error_of(result) == "denied"
    assert "whole objects" in result.detail
    assert len(proxy.seen) == 1


@pytest.mark.parametrize("status", [500, 502, 503, 504, 429])
def test_what_passes_is_tried_again(proxy: FaultProxy, bucket: str, status: int) -> None:
    proxy.fail("status", status=status, times=3)
    assert fetch_one(proxy.endpoint, bucket) == b"a" * 1000
    assert len(proxy.seen) == 4


@pytest.mark.parametrize("kind", ["hang", "reset", "short"])
def test_a_broken_connection_is_tried_again(proxy: FaultProxy, bucket: str, kind: Any) -> None:
    proxy.fail(kind, times=2)
    assert fetch_one(proxy.endpoint, bucket) == b"a" * 1000
    assert len(proxy.seen) == 3


@pytest.mark.parametrize(
    ("kind", "status", "error"),
    [
        ("status", 503, "io_throttled"),
        ("status", 429, "io_throttled"),
        ("status", 500, "io_network"),
        ("status", 403, "denied"),
        ("hang", 0, "io_network"),
        ("reset", 0, "io_network"),
        ("short", 0, "io_network"),
    ],
)
def test_what_stays_broken_is_the_error_of_the_row(
    proxy: FaultProxy, bucket: str, kind: Any, status: int, error: str
) -> None:
    proxy.fail(kind, status=status, times=float("inf"))
    assert error_of(fetch_one(proxy.endpoint, bucket)) == error
    assert len(proxy.seen) == (1 if status == 403 else QUICK.max_attempts)


def test_a_slow_drip_ends_at_the_deadline(proxy: FaultProxy, bucket: str) -> None:
    proxy.fail("drip", times=float("inf"))  # 1000 bytes, 50 ms apart: 50 seconds
    started_s = time.monotonic()
    limits = replace(QUICK, deadline_s=1.0)
    result = fetch_one(proxy.endpoint, bucket, limits=limits)
    assert error_of(result) == "io_network"
    assert time.monotonic() - started_s < 10


def test_pauses_grow_and_the_store_may_ask_for_more(proxy: FaultProxy, bucket: str) -> None:
    proxy.fail("status", status=503, times=1, headers={"Retry-After": "1"})
    limits = replace(QUICK, max_pause_s=5)
    assert fetch_one(proxy.endpoint, bucket, limits=limits) == b"a" * 1000
    first, second = proxy.seen
    assert second.at_s - first.at_s >= 0.95


@dataclass
class Clock:
    """A time that goes on when it is told to."""

    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s


def send(throttle: Throttle, clock: Clock, for_s: float) -> int:
    """Send as many requests as are let through, all answered at once; return how many."""
    end_s, sent = clock.now_s + for_s, 0
    while clock.now_s < end_s:
        clock.now_s += (pause_s := throttle.try_start())
        if not pause_s:
            sent += 1
            throttle.end()
            throttle.speed_up()
    return sent


def test_a_run_starts_with_what_a_prefix_gives_and_doubles_until_it_is_asked_to_slow_down(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cifake_ray.storage.s3.throttle._num_processes", 1000)
    throttle = Throttle(64, clock=(clock := Clock()))
    rates = [send(throttle, clock, 1.0) for _ in range(6)]
    assert rates[0] == pytest.approx(8, abs=2)
    assert all(1.8 <= fast / slow <= 2.2 for slow, fast in pairwise(rates))
    throttle.slow_down()
    throttle.slow_down()  # what was sent before the halving says nothing new
    assert send(throttle, clock, 1.0) == pytest.approx(rates[-1] * 0.6, rel=0.3)
    before = throttle.per_s
    send(throttle, clock, 35.0)
    assert throttle.per_s == pytest.approx(2 * before, rel=0.1)


def test_a_rate_that_was_never_used_is_not_what_is_halved() -> None:
    throttle = Throttle(64, clock=(clock := Clock()))
    for _ in range(100):
        throttle.try_start()
        throttle.end()
        clock.now_s += 0.02
    throttle.slow_down()
    assert throttle.per_s == pytest.approx(25, rel=0.1)


def test_the_limit_of_the_user_is_shared_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cifake_ray.storage.s3.throttle._num_processes", 4)
    throttle = Throttle(64, 40.0, clock=(clock := Clock()))
    assert send(throttle, clock, 10.0) == pytest.approx(100, abs=2)


def test_no_more_requests_are_in_flight_than_allowed() -> None:
    throttle = Throttle(3, clock=(clock := Clock()))
    for _ in range(3):
        clock.now_s += 1
        assert throttle.try_start() == 0
    clock.now_s += 1
    assert throttle.try_start() == math.inf
    throttle.end()
    assert throttle.try_start() == 0


def test_threads_keep_the_rate_together() -> None:
    throttle = Throttle(64, 200.0)

    def send_some() -> None:
        for _ in range(10):
            with throttle.take_turn(threading.Event()) as waited_s:
                assert waited_s is not None

    started_s = time.monotonic()
    threads = [threading.Thread(target=send_some) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert throttle.in_flight == 0
    assert 0.25 < time.monotonic() - started_s < 10  # 80 at 200 a second, less 50 ms to catch up


def test_a_burst_of_slow_down_loses_nothing(
    s3_env: S3Server, proxy: FaultProxy, bucket: str
) -> None:
    for n in range(100):
        s3_env.put(bucket, f"many/{n}", b"%d" % n)
    proxy.fail("status", status=503, times=40)
    objects = [StoredObject(bucket, f"many/{n}") for n in range(100)]
    limits = replace(QUICK, max_attempts=12, deadline_s=30)
    assert fetch(proxy.endpoint, objects, limits) == [b"%d" % n for n in range(100)]
    client = connect(StoreConfig(s3_endpoint_url=proxy.endpoint), limits)
    assert client.throttle.slowed_at_s > 0


def test_an_object_that_changed_or_went_away_is_told(s3_env: S3Server, bucket: str) -> None:
    etag = s3_env.put(bucket, "b", b"old")
    s3_env.put(bucket, "b", b"new")
    assert error_of(fetch_one(s3_env.endpoint, bucket, "b", etag=etag)) == "changed"
    assert fetch_one(s3_env.endpoint, bucket, "b") == b"new"
    assert error_of(fetch_one(s3_env.endpoint, bucket, "gone", etag=etag)) == "not_found"
    assert error_of(fetch_one(s3_env.endpoint, "no-such-bucket", "b")) == "not_found"


def test_an_empty_object_is_no_bytes(s3_env: S3Server, bucket: str) -> None:
    etag = s3_env.put(bucket, "empty", b"")
    assert fetch_one(s3_env.endpoint, bucket, "empty", etag=etag, size_bytes=0) == b""


def test_too_large_an_object_is_not_read(s3_env: S3Server, proxy: FaultProxy, bucket: str) -> None:
    listed = fetch_one(proxy.endpoint, bucket, size_bytes=MAX_IMAGE_BYTES + 1)
    assert error_of(listed) == "too_large"
    assert proxy.seen == []
    s3_env.put(bucket, "large", bytes(MAX_IMAGE_BYTES + 1))
    limits = replace(QUICK, read_timeout_s=20, deadline_s=60)
    assert error_of(fetch_one(s3_env.endpoint, bucket, "large", limits=limits)) == "too_large"
    assert fetch_one(s3_env.endpoint, bucket, limits=limits) == b"a" * 1000  # the client is well


def test_an_archived_object_is_denied_and_says_why(proxy: FaultProxy, bucket: str) -> None:
    proxy.fail("status", status=403, code="InvalidObjectState")
    result = fetch_one(proxy.endpoint, bucket)
    assert error_of(result) == "denied"
    assert "archived" in result.detail


def test_a_redirect_to_another_host_is_not_followed(proxy: FaultProxy, bucket: str) -> None:
    with run_recorder() as (elsewhere, paths):
        proxy.fail("status", status=307, headers={"Location": f"{elsewhere}/x"})
        result = fetch_one(proxy.endpoint, bucket)
    assert error_of(result) == "io_network"
    assert "another host" in result.detail
    assert paths == []


def test_a_bucket_in_another_region_is_asked_there(proxy: FaultProxy, bucket: str) -> None:
    headers = {"x-amz-bucket-region": "eu-west-1"}
    proxy.fail("status", status=301, code="PermanentRedirect", headers=headers)
    assert fetch_one(proxy.endpoint, bucket) == b"a" * 1000
    scopes = [seen.headers["Authorization"].split("/")[2] for seen in proxy.seen]
    assert scopes == ["us-east-1", "eu-west-1"]


@contextmanager
def run_recorder() -> Iterator[tuple[str, list[str]]]:
    """A server that answers every GET with nothing, and the raw targets it was asked for."""
    targets: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            targets.append(self.requestline.split(" ")[1])
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", targets
        server.shutdown()


@pytest.mark.parametrize(
    "key",
    [
        *[
            "/",
            "//",
            "/a",
            "a/",
            "a/../b",
            "../b",
            "./x",
            "a/./b",
            "a//b",
            "%20",
            "+?#&=;",
            "~!*()",
            "s3://x/y?z",
        ],
        *("é", "e\u0301", "a b", "'\"", "\\", "n\nl\r\t\x01", "q" * 1024),
    ],
)
def test_every_key_is_asked_for_as_botocore_would(
    s3_env: S3Server, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with run_recorder() as (endpoint, targets):
        assert fetch_one(endpoint, "some-bucket", key) == b""
        client = botocore.session.Session().create_client("s3", endpoint_url=endpoint)
        client.get_object(Bucket="some-bucket", Key=key)
    ours, theirs = targets
    assert ours == theirs.partition("?")[0]


@pytest.mark.parametrize(("size_bytes", "num_taken", "num_asked"), [(2**20, 1, 3), (None, 2, 4)])
def test_memory_ahead_of_a_slow_consumer_is_bounded(
    s3_env: S3Server,
    proxy: FaultProxy,
    bucket: str,
    size_bytes: int | None,
    num_taken: int,
    num_asked: int,
) -> None:
    """An object of unknown size is asked for alone first, then taken to be as large as that."""
    for n in range(12):
        s3_env.put(bucket, f"mb/{n}", bytes(2**20))
    objects = [StoredObject(bucket, f"mb/{n}", size_bytes=size_bytes) for n in range(12)]
    limits = replace(QUICK, read_timeout_s=10, deadline_s=30, max_ahead_bytes=3 * 2**20)
    results = fetch_objects(StoreConfig(s3_endpoint_url=proxy.endpoint), objects, limits)
    for _ in range(num_taken):
        assert len(next(results)) == 2**20  # type: ignore[arg-type]
    time.sleep(0.5)
    assert len(proxy.seen) == num_asked
    assert [len(r) for r in results] == [2**20] * (12 - num_taken)  # type: ignore[arg-type]


@pytest.mark.parametrize("size_bytes", [4, None])
def test_objects_come_while_the_consumer_is_busy(
    s3_env: S3Server, proxy: FaultProxy, bucket: str, size_bytes: int | None
) -> None:
    """Whether or not their sizes are known: more than can be in flight at once."""
    for n in range(30):
        s3_env.put(bucket, f"busy/{n}", b"abcd")
    objects = [StoredObject(bucket, f"busy/{n}", size_bytes=size_bytes) for n in range(30)]
    limits = replace(QUICK, read_timeout_s=10, deadline_s=30, max_in_flight=4)
    results = fetch_objects(StoreConfig(s3_endpoint_url=proxy.endpoint), objects, limits)
    assert [next(results), next(results)] == [b"abcd"] * 2  # after the first its size is known
    wait_until(lambda: len(proxy.seen) == 30, timeout_s=30)
    assert list(results) == [b"abcd"] * 28


def test_whoever_stops_early_leaves_no_requests_behind(proxy: FaultProxy, bucket: str) -> None:
    proxy.fail("status", status=503, times=float("inf"), path="/x/")
    objects = [StoredObject(bucket, f"x/{n}") for n in range(50)]
    limits = replace(QUICK, max_attempts=100, deadline_s=60)
    store = StoreConfig(s3_endpoint_url=proxy.endpoint)
    results = fetch_objects(store, [StoredObject(bucket, "y"), *objects], limits)
    next(results)
    results.close()  # type: ignore[attr-defined]
    counts = [-1, len(proxy.seen)]
    while counts[-1] != counts[-2]:  # requests on their way arrive; no others follow
        assert len(counts) < 10
        time.sleep(0.5)
        counts.append(len(proxy.seen))


def test_whoever_still_waits_for_its_turn_sends_nothing(proxy: FaultProxy, bucket: str) -> None:
    store = StoreConfig(s3_endpoint_url=proxy.endpoint)
    client = connect(store, replace(QUICK, max_in_flight=1))
    stop = threading.Event()
    with ThreadPoolExecutor(1) as threads:
        with client.throttle.take_turn(threading.Event()):
            future = threads.submit(client.get_object, bucket, "y", None, 100, stop)
            stop.set()
        with pytest.raises(S3Error, match="not asked for any more"):
            future.result()
    assert not [seen for seen in proxy.seen if seen.target.endswith("/y")]


def test_threads_that_wait_for_a_slow_rate_end_when_the_consumer_does(
    proxy: FaultProxy, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cifake_ray.storage.s3.throttle._num_processes", 1000)
    store = StoreConfig(s3_endpoint_url=proxy.endpoint, s3_max_requests_per_s=1)
    results = fetch_objects(store, [StoredObject(bucket, f"slow/{n}") for n in range(50)], QUICK)
    next(results)
    results.close()  # type: ignore[attr-defined]
    threads = connect(store, QUICK).threads
    end = threading.Thread(target=threads.shutdown, daemon=True)  # it joins them
    end.start()
    end.join(10)
    assert not end.is_alive()
    assert len(proxy.seen) == 1


def refuse(bucket: str, store: StoreConfig | None = None, **options: Any) -> str:
    with pytest.raises(StorageError) as caught:
        check_bucket(store or StoreConfig(), bucket, "images/", replace(QUICK, **options))
    message = str(caught.value)
    assert message.startswith(f"s3://{bucket}/images/: ")
    assert "\n" not in message
    assert os.environ.get("AWS_SECRET_ACCESS_KEY", "CANARY") not in message
    return message


def test_a_wrong_secret_is_told(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "CANARY-wrong")
    assert "does not accept the credentials (SignatureDoesNotMatch)" in refuse(bucket)


def test_an_unknown_key_is_told(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    assert "does not accept the credentials (InvalidAccessKeyId)" in refuse(bucket)


def test_a_missing_bucket_is_told(s3_env: S3Server) -> None:
    assert "no such bucket; check its name" in refuse("no-such-bucket")


def test_an_invalid_name_of_a_bucket_is_told(s3_env: S3Server) -> None:
    assert "not a valid name of a bucket" in refuse("no bucket!")


def test_denied_access_is_told(
    s3_env: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_env.outsider_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_env.outsider_secret)
    assert "access denied (AccessDenied); the credentials need s3:ListBucket" in refuse(bucket)
    assert error_of(fetch_one(s3_env.endpoint, bucket)) == "denied"


def test_who_may_only_read_may_read(
    s3_env: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_env.reader_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_env.reader_secret)
    check_bucket(StoreConfig(), bucket)
    assert fetch_one(s3_env.endpoint, bucket) == b"a" * 1000


def test_a_dead_endpoint_is_told_in_seconds(s3_env: S3Server) -> None:
    (port,) = find_ports(1)
    started_s = time.monotonic()
    message = refuse("some-bucket", StoreConfig(s3_endpoint_url=f"http://127.0.0.1:{port}"))
    assert "(no connection); check --s3-endpoint-url" in message
    assert time.monotonic() - started_s < 10


def test_a_server_that_is_no_s3_is_told(s3_env: S3Server) -> None:
    with run_recorder() as (endpoint, _):
        message = refuse("some-bucket", StoreConfig(s3_endpoint_url=endpoint))
    assert "not the XML of a listing" in message


def test_no_credentials_are_told(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    assert "no AWS credentials found" in refuse(bucket)
    with pytest.raises(StorageError, match=f"s3://{bucket}: no AWS credentials found"):
        list(read_objects(StoreConfig(), [f"s3://{bucket}/img/a.jpg"], [None], [None]))


def test_an_unknown_profile_is_told(bucket: str) -> None:
    assert "check --s3-profile" in refuse(bucket, StoreConfig(s3_profile="nobody"))


def test_a_public_bucket_needs_no_credentials(
    s3_env: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_env.put(s3_env.public_bucket, "x y.jpg", b"public")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    store = StoreConfig(s3_anonymous=True)
    check_bucket(store, s3_env.public_bucket)
    location = f"s3://{s3_env.public_bucket}/x y.jpg"
    assert list(read_objects(store, [location], [None], [None])) == [b"public"]
    assert "access denied" in refuse(bucket, store)


@pytest.mark.parametrize("kind", ["hang", "reset", "short", "status"])
def test_a_listing_survives_what_passes(proxy: FaultProxy, bucket: str, kind: Any) -> None:
    proxy.fail(kind, times=2, path="list-type")
    check_bucket(StoreConfig(s3_endpoint_url=proxy.endpoint), bucket, limits=QUICK)
    assert len(proxy.seen) == 3
