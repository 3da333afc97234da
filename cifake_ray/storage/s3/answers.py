"""Read answers that may have no end, be cut off, or answer something else than was asked."""

from __future__ import annotations

import http.client
import io
import re
import threading
import time
from collections.abc import Mapping
from typing import Any

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection

from cifake_ray.storage.s3.errors import S3Error, TooLarge

CHUNK_BYTES = 2**18
_request = threading.local()  # of each thread, `deadline_s` of what it asks


class _TimedStream(io.RawIOBase):
    """What comes over a connection until the deadline: also statuses, headers and trailers.

    The timeout of a socket starts anew with each byte.
    """

    def __init__(self, stream: io.RawIOBase, deadline_s: float) -> None:
        self.stream = stream
        self.deadline_s = deadline_s

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if time.monotonic() > self.deadline_s:
            raise TimeoutError("the answer had not ended at the deadline")
        return self.stream.readinto(buffer)

    def close(self) -> None:
        self.stream.close()
        super().close()


class _TimedResponse(http.client.HTTPResponse):
    def __init__(self, sock: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(_TimedStream(self.fp.detach(), _request.deadline_s))


class _TimedConnection(HTTPConnection):
    response_class = _TimedResponse


class _TimedSecureConnection(HTTPSConnection):
    response_class = _TimedResponse


def limit_answers(pool: urllib3.HTTPConnectionPool) -> None:
    """Let `set_deadline` end the answers that come over the connections of a pool."""
    is_secure = isinstance(pool, urllib3.HTTPSConnectionPool)
    pool.ConnectionCls = _TimedSecureConnection if is_secure else _TimedConnection


def set_deadline(deadline_s: float) -> None:
    """Set until when, in `time.monotonic`, this thread waits for the next answer."""
    _request.deadline_s = deadline_s


def parse_count(text: str) -> int | None:
    """Return the number of a header, None when it is none."""
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else None


def read_body(response: urllib3.BaseHTTPResponse, max_bytes: int) -> bytes:
    """Read the body. TooLarge before too much of it is read, HTTPError when it ends early."""
    expected = parse_count(response.headers.get("content-length", ""))
    if expected is not None and expected > max_bytes:
        raise TooLarge(f"{expected} bytes; the limit is {max_bytes}")
    chunks, num_bytes = [], 0
    while num_bytes != expected and (chunk := response.read1(CHUNK_BYTES)):
        chunks.append(chunk)
        num_bytes += len(chunk)
        if num_bytes > max_bytes:
            raise TooLarge(f"more than {max_bytes} bytes")
    if expected is not None and num_bytes != expected:
        raise urllib3.exceptions.IncompleteRead(num_bytes, expected - num_bytes)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def check_answer(asked: Mapping[str, str], got: Mapping[str, str], num_bytes: int) -> None:
    """Raise S3Error when an answer has another etag, or is another part, than was asked for."""
    etags = (asked.get("If-Match"), got.get("etag"))
    if len({etag.removeprefix("W/").strip('"') for etag in etags if etag}) > 1:
        raise S3Error(412, "", "the store sends another version than was asked for")
    if "content-range" not in got:
        return
    range_asked = re.fullmatch("bytes=([0-9]+)-([0-9]+)", asked.get("Range", ""))
    range_got = re.fullmatch("bytes ([0-9]+)-([0-9]+)/([0-9]+|[*])", got["content-range"])
    if range_asked and range_got:
        first, last = map(int, range_asked.groups())
        got_first, got_last = map(int, range_got.groups()[:2])
        is_end = got_last == last or range_got[3] in ("*", str(got_last + 1))
        if got_first == first and got_last - first + 1 == num_bytes and is_end:
            return
    raise S3Error(0, "", "the store sends another part than was asked for")
