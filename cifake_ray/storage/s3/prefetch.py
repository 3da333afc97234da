"""Many objects of S3 at once, handed over in order.

Every object becomes its bytes or the ImageError of its row; only what would fail
for all of them alike (no credentials) ends the run.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple

from botocore.exceptions import BotoCoreError

from cifake_ray.config import StoreConfig
from cifake_ray.core.imaging.decode import MAX_IMAGE_BYTES
from cifake_ray.errors import ImageError
from cifake_ray.storage.s3.client import DEFAULT_LIMITS, S3Client, S3Limits, open_client
from cifake_ray.storage.s3.errors import S3Error, TooLarge, explain_s3_error
from cifake_ray.storage.s3.location import split_location

MAX_AHEAD = 512  # objects asked for before their turn: two batches of score
ASSUMED_BYTES = 16 * 2**20  # of an object of unknown size, until the first has come


class StoredObject(NamedTuple):
    """An object as it was listed; without etag or size, whatever is there now."""

    bucket: str
    key: str
    etag: str | None = None
    size_bytes: int | None = None


@dataclass
class _PendingObject:
    """An object that has been asked for."""

    stored: StoredObject
    size_bytes: int  # that it is taken to hold of the memory, until it is there


class _PrefetchBudget:
    """Bytes beyond what the consumer took: there already, or on their way."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # those who fetch correct what was assumed
        self.size_bytes = 0
        self.largest: int | None = None  # of all that have come

    def ask(self, stored: StoredObject) -> _PendingObject:
        """An object whose size is not known may be as large as any before it."""
        guess = ASSUMED_BYTES if self.largest is None else self.largest
        size_bytes = guess if stored.size_bytes is None else stored.size_bytes
        return _PendingObject(stored, min(size_bytes, MAX_IMAGE_BYTES))

    def add(self, size_bytes: int) -> None:
        with self.lock:
            self.size_bytes += size_bytes

    def correct(self, asked: _PendingObject, result: bytes | ImageError) -> None:
        """It is there."""
        size_bytes = len(result) if isinstance(result, bytes) else 0
        with self.lock:
            self.size_bytes += size_bytes - asked.size_bytes
            asked.size_bytes = size_bytes
            self.largest = max(self.largest or 0, size_bytes)


def fetch_objects(
    store: StoreConfig, objects: Iterable[StoredObject], limits: S3Limits = DEFAULT_LIMITS
) -> Iterator[bytes | ImageError]:
    """The bytes of each object, or the error of its row, in order.

    At most `max_in_flight` requests at once for all callers of this process, and at most
    `max_ahead_bytes` beyond what the caller took (an object alone may be larger; where sizes are
    not known, those on their way are taken to be no larger than any before them).
    StorageError when there are no credentials to ask with.
    """
    objects = iter(objects)
    waiting = next(objects, None)
    if waiting is None:
        return
    pending: deque[tuple[_PendingObject, Future[bytes | ImageError]]] = deque()
    ahead = _PrefetchBudget()
    stop = threading.Event()
    client = open_client(store, limits, waiting.bucket)

    def fetch(asked: _PendingObject) -> bytes | ImageError:
        result = _fetch(client, asked.stored, stop)
        ahead.correct(asked, result)
        return result

    try:
        while waiting is not None or pending:
            while waiting is not None and len(pending) < MAX_AHEAD:
                asked = ahead.ask(waiting)
                if pending and ahead.size_bytes + asked.size_bytes > limits.max_ahead_bytes:
                    break
                ahead.add(asked.size_bytes)
                pending.append((asked, client.threads.submit(fetch, asked)))
                waiting = next(objects, None)
            due, future = pending.popleft()
            try:
                result = future.result()
            except BotoCoreError as error:
                raise explain_s3_error(error, f"s3://{due.stored.bucket}") from error
            ahead.add(-due.size_bytes)
            yield result
    finally:
        stop.set()
        for _, future in pending:
            future.cancel()


def _fetch(client: S3Client, stored: StoredObject, stop: threading.Event) -> bytes | ImageError:
    if stored.size_bytes is not None and stored.size_bytes > MAX_IMAGE_BYTES:
        return ImageError("too_large", f"{stored.size_bytes} bytes; the limit is {MAX_IMAGE_BYTES}")
    try:
        return client.get_object(stored.bucket, stored.key, stored.etag, MAX_IMAGE_BYTES, stop)
    except TooLarge as error:
        return ImageError("too_large", str(error))
    except S3Error as error:
        return explain_object(error)


def explain_object(error: S3Error) -> ImageError:
    """The error of one object's row."""
    if error.status == 412:
        return ImageError("changed", "the object changed after it was listed")
    if error.status == 404:
        gone = "the bucket is gone" if error.code == "NoSuchBucket" else "the object is gone"
        return ImageError("not_found", gone)
    if error.code == "InvalidObjectState":
        return ImageError("denied", "the object is archived; restore it, then retry")
    if error.is_throttled:
        return ImageError("io_throttled", f"{error}")
    if error.is_transient or 300 <= error.status < 400:
        return ImageError("io_network", f"{error}")
    return ImageError("denied", f"{error}")


def read_objects(
    store: StoreConfig,
    locations: Sequence[str | None],
    sizes: Sequence[int | None],
    etags: Sequence[str | None],
    limits: S3Limits = DEFAULT_LIMITS,
) -> Iterator[bytes | ImageError]:
    """One result for each location of the form s3://BUCKET/KEY, in order.

    A row without a location is one whose key is not valid UTF-8. StorageError when there are no
    credentials to ask with.
    """
    objects = (
        StoredObject(*split_location(location), etag, size_bytes)
        for location, size_bytes, etag in zip(locations, sizes, etags, strict=True)
        if location is not None
    )
    results = fetch_objects(store, objects, limits)
    for location in locations:
        if location is None:
            yield ImageError("bad_key", "the key is not valid UTF-8; rename the object")
        else:
            yield next(results)
