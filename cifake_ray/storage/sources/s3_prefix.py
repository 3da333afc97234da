"""The images of a bucket on S3: every object below a prefix, whatever its name.

Floor: storage.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
from botocore.exceptions import BotoCoreError

from cifake_ray.config import StoreConfig
from cifake_ray.core.labels import PathFacts, read_path
from cifake_ray.core.schema import MANIFEST_FIELDS
from cifake_ray.errors import ImageError
from cifake_ray.storage.io.paths import Place, resolve_path
from cifake_ray.storage.s3.client import DEFAULT_LIMITS, S3Limits
from cifake_ray.storage.s3.errors import S3Error, explain_refusal
from cifake_ray.storage.s3.listing import KeyLister, Query
from cifake_ray.storage.s3.prefetch import StoredObject, fetch_objects, open_client
from cifake_ray.storage.sources.folder import escape_key
from cifake_ray.storage.sources.source import (
    KEEP_ALL,
    LISTING_BATCH_ROWS,
    KeyFilter,
    Listing,
    RowBuffer,
)

SCHEME = "s3://"
LISTING_THREADS = 16  # a page costs CPU time, so more of them only stand in each other's way
CHECK_ATTEMPTS = 3  # a wrong endpoint should be told in seconds


@dataclass(frozen=True)
class BucketSource:
    """Every object below a prefix, which is empty or ends with `/`."""

    bucket: str
    prefix: str
    store: StoreConfig
    class_names: dict[str, int]
    key_filter: KeyFilter = KEEP_ALL
    limits: S3Limits = DEFAULT_LIMITS

    @property
    def uri(self) -> str:
        return f"{SCHEME}{self.bucket}/{self.prefix}"

    def list_images(self) -> Listing:
        """StorageError at once when the bucket cannot be listed."""
        check_bucket(self.store, self.bucket, self.prefix, self.limits)
        left_out: Counter[str] = Counter()
        return Listing(self._list_batches(left_out), left_out)

    def _list_batches(self, left_out: Counter[str]) -> Iterator[pa.RecordBatch]:
        client = open_client(self.store, self.limits, self.bucket)

        def ask(query: Query) -> ET.Element:
            return client.list_page(self.bucket, query, lister.stop)

        lister = KeyLister(ask, min(LISTING_THREADS, self.limits.max_in_flight))
        rows = RowBuffer(pa.schema(MANIFEST_FIELDS))
        location = f"{SCHEME}{self.bucket}/"
        known_folder, facts = "", PathFacts(None, None, None)
        try:
            for page in lister.list_entries(self.prefix):
                for full_key, size_bytes, etag in page:
                    key = full_key.removeprefix(self.prefix)
                    if not key or (key[-1] == "/" and not size_bytes):
                        left_out["folder marker"] += 1
                        continue
                    if not self.key_filter.keeps(key):
                        left_out["excluded"] += 1
                        continue
                    folder = key[: key.rfind("/") + 1]
                    if folder != known_folder:
                        folders = [name for name in folder.split("/") if name]
                        known_folder, facts = folder, read_path(folders, self.class_names)
                    escaped = escape_key(key)
                    if escaped is None:
                        place = (key, location + full_key, None, size_bytes, None, etag)
                        rows.append(*place, *facts, None)
                    else:
                        known = (None, None, size_bytes, None, etag, facts.label, None, None)
                        rows.append(escaped, *known, "bad_key")
                if len(rows) >= LISTING_BATCH_ROWS:
                    yield rows.drain()
            if len(rows):
                yield rows.drain()
        except (S3Error, BotoCoreError) as error:
            raise explain_refusal(error, self.uri) from error

    def read_images(self, rows: pa.Table) -> Iterator[bytes | ImageError]:
        names = ("location", "size_bytes", "etag")
        locations, sizes, etags = (rows.column(name).to_pylist() for name in names)
        return read_objects(self.store, locations, sizes, etags, self.limits)


def open_place(uri: str, store: StoreConfig) -> Place:
    """The place a URI names; one in S3 is asked for first, which tells in seconds what is wrong.

    ValueError for what cannot be a place, StorageError when the bucket cannot be reached.
    """
    place = resolve_path(uri, store)
    if uri.startswith(SCHEME):
        check_bucket(store, *split_location(uri))
    return place


def check_bucket(
    store: StoreConfig, bucket: str, prefix: str = "", limits: S3Limits = DEFAULT_LIMITS
) -> None:
    """StorageError, naming the remedy, when a bucket cannot be listed with these credentials."""
    limits = replace(limits, max_attempts=min(CHECK_ATTEMPTS, limits.max_attempts))
    try:
        query = {"prefix": prefix, "max-keys": "1"}
        open_client(store, limits, bucket).list_page(bucket, query)
    except (S3Error, BotoCoreError) as error:
        raise explain_refusal(error, f"{SCHEME}{bucket}/{prefix}") from error


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


def split_location(location: str) -> tuple[str, str]:
    """Bucket and key of s3://BUCKET/KEY, every character of the key as it is."""
    bucket, _, key = location.removeprefix(SCHEME).partition("/")
    return bucket, key
