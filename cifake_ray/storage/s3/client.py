"""Requests to S3: signed, retried with back-off, and explained when they fail for good.

botocore knows the credentials and the endpoints (`store_session.py`) and how to sign; the requests
go over urllib3 itself, which costs a third of the CPU time of a botocore client. Clients are made
where they are used, one per process, and never travel: what travels is the `StoreConfig`.
"""

from __future__ import annotations

import hashlib
import os
import random
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TypeVar
from urllib.parse import quote

import urllib3
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.exceptions import BotoCoreError

from cifake_ray.config import StoreConfig
from cifake_ray.storage.s3.answers import check_answer, parse_count, read_body, set_deadline
from cifake_ray.storage.s3.errors import (
    MOVED,
    CredentialsError,
    S3Error,
    TooLarge,
    describe_break,
    explain_s3_error,
    parse_error_body,
)
from cifake_ray.storage.s3.limits import DEFAULT_LIMITS, S3Limits
from cifake_ray.storage.s3.page import Page, parse_page
from cifake_ray.storage.s3.store_session import Address, StoreSession
from cifake_ray.storage.s3.throttle import Throttle, count_sharers

T = TypeVar("T")

MAX_ANSWER_BYTES = 2**23  # a page of 1,000 keys of 1,024 bytes, escaped, is smaller
REDIRECTS = (301, 302, 303, 307, 308)


@dataclass(frozen=True)
class _Request:
    """A GET of an object or, without a key, of a page of the listing."""

    bucket: str
    key: str | None
    query: Mapping[str, str]
    headers: Mapping[str, str]
    max_bytes: int

    def make_target(self, address: Address) -> str:
        if self.key is not None:
            # Every byte as it is: SigV4 for S3 takes `//`, `.` and `..` for parts of the key, and
            # so does urllib3 as long as it is given a target, not a URL.
            return address.key_path + quote(self.key, safe="/~")
        words = sorted(f"{name}={quote(value, safe='')}" for name, value in self.query.items())
        return f"{address.list_path}?{'&'.join(words)}"


class S3Client:
    """The connections of one process to one store. Safe to use from several threads."""

    def __init__(self, store: StoreConfig, limits: S3Limits) -> None:
        self.store = store
        self.limits = limits
        self.throttle = Throttle(limits.max_in_flight, store.s3_max_requests_per_s)
        self._session = StoreSession(store, limits.max_in_flight)

    @cached_property
    def threads(self) -> ThreadPoolExecutor:
        """Return the threads that fetch; they start when they are needed."""
        return ThreadPoolExecutor(self.limits.max_in_flight, "s3")

    def list_page(
        self, bucket: str, query: Mapping[str, str], stop: threading.Event | None = None
    ) -> Page:
        """Return one page of ListObjectsV2. S3Error when it fails for good."""
        request = _Request(bucket, None, {"list-type": "2", **query}, {}, MAX_ANSWER_BYTES)
        return self._retry(request, parse_page, stop)

    def get_object(
        self,
        bucket: str,
        key: str,
        etag: str | None,
        max_bytes: int,
        stop: threading.Event | None = None,
        offset: int | None = None,
    ) -> bytes:
        """Return an object's bytes if it still has this etag. S3Error, or TooLarge.

        With an `offset`, only the `max_bytes` from there on; fewer if the object ends before.
        """
        headers = {"If-Match": etag} if etag else {}
        if offset is not None:
            headers["Range"] = f"bytes={offset}-{offset + max_bytes - 1}"
        request = _Request(bucket, key, {}, headers, max_bytes)
        return self._retry(request, bytes, stop)

    def _retry(
        self, request: _Request, parse: Callable[[bytes], T], stop: threading.Event | None
    ) -> T:
        """Return the answer, retrying what is transient; `stop` ends the attempts early."""
        limits = self.limits
        stop = stop or threading.Event()
        deadline_s = time.monotonic() + limits.deadline_s
        longest_s = limits.first_pause_s
        attempt = 0
        while True:
            attempt += 1
            pause_s = 0.0
            try:
                with self.throttle.take_turn(stop) as waited_s:
                    if waited_s is None:
                        raise S3Error(0, "", "not asked for any more")
                    deadline_s += waited_s  # of which the store knows nothing
                    answer = self._try(request, parse, deadline_s)
                self.throttle.speed_up()
                return answer
            except (S3Error, CredentialsError) as error:
                if error.is_throttled:
                    self.throttle.slow_down()
                if error.is_transient:
                    pause_s = max(random.uniform(0, longest_s), error.pause_s)
                    longest_s = min(2 * longest_s, limits.max_pause_s)
                elif error.code != MOVED:
                    raise
                if attempt >= limits.max_attempts or time.monotonic() + pause_s > deadline_s:
                    raise
                if stop.wait(pause_s):
                    raise

    def _try(self, request: _Request, parse: Callable[[bytes], T], deadline_s: float) -> T:
        """Send one request and return its parsed answer. S3Error when that fails."""
        address = self._session.find_address(request.bucket)
        target = request.make_target(address)
        headers = dict(request.headers)
        if self.store.s3_requester_pays:
            headers["x-amz-request-payer"] = "requester"
        signed = AWSRequest("GET", address.origin + target, headers=headers)
        if (frozen := self._session.find_credentials()) is not None:
            S3SigV4Auth(frozen, "s3", address.region).add_auth(signed)
        left_s = max(deadline_s - time.monotonic(), 0.001)
        timeout = urllib3.Timeout(
            connect=min(self.limits.connect_timeout_s, left_s),
            read=min(self.limits.read_timeout_s, left_s),
        )
        set_deadline(deadline_s)
        try:
            response = address.pool.urlopen(
                "GET",
                target,
                headers=dict(signed.headers.items()),
                timeout=timeout,
                retries=False,
                redirect=False,
                preload_content=False,
                decode_content=False,
            )
            wanted = 206 if "Range" in request.headers else 200
            max_bytes = request.max_bytes if response.status == wanted else MAX_ANSWER_BYTES
            with ExitStack() as stack:
                stack.callback(response.close)  # else its rest would be read as the next answer
                if response.status == 200 != wanted:
                    raise S3Error(501, "", "the store sends whole objects when asked for a part")
                data = read_body(response, max_bytes)
                stack.pop_all()
            response.release_conn()
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise S3Error(0, "", describe_break(error)) from error
        except TooLarge as error:
            if response.status == wanted and request.key is not None:
                raise
            status = 0 if response.status == wanted else response.status
            raise S3Error(status, "", f"an answer of {error}") from error
        if response.status != wanted:
            raise self._explain_answer(request.bucket, address, response, data)
        check_answer(request.headers, response.headers, len(data))
        try:
            return parse(data)
        except ValueError as error:
            raise S3Error(0, "", f"the answer is not the XML of a listing: {error}") from error

    def _explain_answer(
        self, bucket: str, address: Address, response: urllib3.BaseHTTPResponse, data: bytes
    ) -> S3Error:
        words = parse_error_body(data)
        status, code = response.status, words.get("Code", "")
        region = response.headers.get("x-amz-bucket-region") or words.get("Region")
        if region and region != address.region and status in (*REDIRECTS, 400):
            self._session.find_address(bucket, region)
            return S3Error(status, MOVED, f"the bucket is in the region {region}")
        if status in REDIRECTS:
            return S3Error(status, code, "the store points to another host, which is not followed")
        after_s = parse_count(response.headers.get("retry-after", "")) or 0
        pause_s = min(float(after_s), self.limits.max_pause_s)
        return S3Error(status, code, words.get("Message") or str(response.reason), pause_s)


def open_client(store: StoreConfig, limits: S3Limits, bucket: str) -> S3Client:
    """Return this process's client. StorageError when the profile does not exist."""
    try:
        return connect(store, limits)
    except BotoCoreError as error:
        raise explain_s3_error(error, f"s3://{bucket}") from error


def connect(store: StoreConfig, limits: S3Limits = DEFAULT_LIMITS) -> S3Client:
    """Return this process's client for a store, created at the first call."""
    # Other credentials in the environment are another client; only their hash is kept.
    settings = sorted(item for item in os.environ.items() if item[0].startswith("AWS_"))
    environment = hashlib.sha256(repr(settings).encode()).digest()
    return _connect(store.store, limits, os.getpid(), environment, count_sharers())


@lru_cache(maxsize=8)
def _connect(
    store: StoreConfig, limits: S3Limits, pid: int, environment: bytes, num_sharers: int
) -> S3Client:
    # A forked process must not share connections, and a throttle has its share from the start.
    del pid, environment, num_sharers
    return S3Client(store, limits)
