"""Many objects of S3 at once, handed over in order.

Every object becomes its bytes or the ImageError of its row; only what would fail
for all of them alike (no credentials) ends the run.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, repeat
from typing import NamedTuple

from botocore.exceptions import BotoCoreError

from cifake_ray.config import StoreConfig
from cifake_ray.core.imaging.containers import explain_large
from cifake_ray.core.imaging.decode import MAX_IMAGE_BYTES
from cifake_ray.errors import ImageError
from cifake_ray.storage.io.read_ahead import read_ahead
from cifake_ray.storage.s3.client import S3Client, open_client
from cifake_ray.storage.s3.errors import S3Error, TooLarge, explain_s3_error
from cifake_ray.storage.s3.limits import DEFAULT_LIMITS, S3Limits
from cifake_ray.storage.s3.location import split_location

MAX_AHEAD = 512  # objects asked for before their turn: two batches of score


class StoredObject(NamedTuple):
    """An object as it was listed, or `size_bytes` of it from `offset` on.

    Without etag or size it is whatever is there now.
    """

    bucket: str
    key: str
    etag: str | None = None
    size_bytes: int | None = None
    offset: int | None = None


def fetch_objects(
    store: StoreConfig, objects: Iterable[StoredObject], limits: S3Limits = DEFAULT_LIMITS
) -> Iterator[bytes | ImageError]:
    """Yield the bytes of each object, or the error of its row, in order; see `read_ahead`.

    At most `max_in_flight` requests are sent at once for all callers of this process.
    StorageError when there are no credentials to ask with.
    """
    objects = iter(objects)
    first = next(objects, None)
    if first is None:
        return
    client = open_client(store, limits, first.bucket)
    stop = threading.Event()

    def fetch(stored: StoredObject) -> bytes | ImageError:
        try:
            return _fetch(client, stored, stop)
        except BotoCoreError as error:
            raise explain_s3_error(error, f"s3://{stored.bucket}") from error

    items = ((stored, stored.size_bytes) for stored in chain([first], objects))
    ahead_bytes = limits.max_ahead_bytes
    try:
        yield from read_ahead(
            fetch, items, client.threads, max_ahead=MAX_AHEAD, max_ahead_bytes=ahead_bytes
        )
    finally:
        stop.set()


def _fetch(client: S3Client, stored: StoredObject, stop: threading.Event) -> bytes | ImageError:
    bucket, key, etag, size_bytes, offset = stored
    if offset is None and size_bytes is not None and size_bytes > MAX_IMAGE_BYTES:
        return explain_large(key, size_bytes, MAX_IMAGE_BYTES)
    max_bytes = MAX_IMAGE_BYTES if size_bytes is None else size_bytes  # the caller limits parts
    try:
        return client.get_object(bucket, key, etag, max_bytes, stop, offset)
    except TooLarge as error:
        if size_bytes is None:
            return ImageError("too_large", str(error))
        return ImageError("changed", f"{error}; the list says {size_bytes}")
    except S3Error as error:
        if error.code == "RequestTimeTooSkewed":  # of this machine, for all objects alike
            raise explain_s3_error(error, f"s3://{bucket}") from error
        return explain_object(error)


def explain_object(error: S3Error) -> ImageError:
    """Return the error of one object's row."""
    if error.status in (412, 416):  # 416: it ends before the part that was asked for
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
    offsets: Sequence[int | None] | None = None,
) -> Iterator[bytes | ImageError]:
    """Yield one result for each location of the form s3://BUCKET/KEY, in order.

    With an offset it is that part of the object that has `size` bytes from there on.

    A row without a location is one whose key is not valid UTF-8. An object of another etag, or of
    another size where no etag is known, is `changed`. StorageError when there are no credentials to
    ask with.
    """
    objects = (
        StoredObject(*split_location(location), etag, size_bytes, offset)
        for location, size_bytes, etag, offset in zip(
            locations, sizes, etags, offsets or repeat(None, len(sizes)), strict=True
        )
        if location is not None
    )
    results = fetch_objects(store, objects, limits)
    for location, size_bytes in zip(locations, sizes, strict=True):
        if location is None:
            yield ImageError("bad_key", "the key is not valid UTF-8; rename the object")
            continue
        result = next(results)
        if isinstance(result, bytes) and size_bytes not in (None, len(result)):
            result = ImageError("changed", f"{len(result)} bytes; the list says {size_bytes}")
        yield result
