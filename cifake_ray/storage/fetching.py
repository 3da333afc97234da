"""Many objects of S3 at once, handed over in order.

Floor: storage. Every object becomes its bytes or the ImageError of its row; only what would fail
for all of them alike (no credentials) ends the run.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple

from botocore.exceptions import BotoCoreError

from cifake_ray.config import StoreConfig
from cifake_ray.core.images import MAX_IMAGE_BYTES
from cifake_ray.errors import ImageError
from cifake_ray.storage.refusals import S3Error, TooLarge, explain_refusal
from cifake_ray.storage.s3 import DEFAULT_LIMITS, S3Client, S3Limits, connect

MAX_AHEAD = 512  # objects asked for before their turn: two batches of score
ASSUMED_BYTES = 4 * 2**20  # of an object whose size is not known, until it is there


class StoredObject(NamedTuple):
    """An object as it was listed; without etag or size, whatever is there now."""

    bucket: str
    key: str
    etag: str | None = None
    size_bytes: int | None = None


@dataclass
class _Asked:
    """An object that has been asked for."""

    stored: StoredObject
    future: Future[bytes | ImageError]
    size_bytes: int  # that it is taken to hold of the memory

    def measure(self) -> int:
        """What it does take, once it is there."""
        if self.future.done() and not self.future.exception():
            result = self.future.result()
            self.size_bytes = len(result) if isinstance(result, bytes) else 0
        return self.size_bytes


def fetch_objects(
    store: StoreConfig, objects: Iterable[StoredObject], limits: S3Limits = DEFAULT_LIMITS
) -> Iterator[bytes | ImageError]:
    """The bytes of each object, or the error of its row, in order.

    At most `max_in_flight` requests at once for all callers of this process, and at most
    `max_ahead_bytes` beyond what the caller took (an object alone may be larger).
    StorageError when there are no credentials to ask with.
    """
    objects = iter(objects)
    waiting = next(objects, None)
    if waiting is None:
        return
    pending: deque[_Asked] = deque()
    ahead_bytes = 0
    stop = threading.Event()
    client = open_client(store, limits, waiting.bucket)
    try:
        while waiting is not None or pending:
            while waiting is not None and len(pending) < MAX_AHEAD:
                size_bytes = _assume_size(waiting)
                is_full = ahead_bytes + size_bytes > limits.max_ahead_bytes
                if is_full or waiting.size_bytes is None:  # what has come may have another size
                    ahead_bytes = sum(asked.measure() for asked in pending)
                if pending and ahead_bytes + size_bytes > limits.max_ahead_bytes:
                    break
                ahead_bytes += size_bytes
                future = client.threads.submit(_fetch, client, waiting, stop)
                pending.append(_Asked(waiting, future, size_bytes))
                waiting = next(objects, None)
            due = pending.popleft()
            ahead_bytes -= due.size_bytes
            try:
                result = due.future.result()
            except BotoCoreError as error:
                raise explain_refusal(error, f"s3://{due.stored.bucket}") from error
            yield result
    finally:
        stop.set()
        for asked in pending:
            asked.future.cancel()


def open_client(store: StoreConfig, limits: S3Limits, bucket: str) -> S3Client:
    """This process's client. StorageError when the profile does not exist."""
    try:
        return connect(store, limits)
    except BotoCoreError as error:
        raise explain_refusal(error, f"s3://{bucket}") from error


def _assume_size(stored: StoredObject) -> int:
    """What an object may take of the memory."""
    return ASSUMED_BYTES if stored.size_bytes is None else min(stored.size_bytes, MAX_IMAGE_BYTES)


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
