"""The images of a bucket on S3: every object below a prefix that is no clutter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
from botocore.exceptions import BotoCoreError

from cifake_ray.config import StoreConfig
from cifake_ray.errors import ImageError, StorageError
from cifake_ray.storage.s3.errors import S3Error, explain_s3_error
from cifake_ray.storage.s3.limits import DEFAULT_LIMITS, S3Limits
from cifake_ray.storage.s3.listing import KeyLister, KeyRange, Query
from cifake_ray.storage.s3.location import SCHEME, check_bucket
from cifake_ray.storage.s3.page import Page
from cifake_ray.storage.s3.prefetch import read_objects
from cifake_ray.storage.sources.key_batches import KeyBatches
from cifake_ray.storage.sources.source import (
    KEEP_ALL,
    KeyFilter,
    Listing,
    Part,
    check_locations,
)

LISTING_THREADS = 16  # a page costs CPU time, so more of them only stand in each other's way


@dataclass(frozen=True)
class S3PrefixSource:
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

    def list_images(
        self, parts: Sequence[Part] | None = None, max_rows: int | None = None
    ) -> Listing:
        """List the keys below the prefix, or those of KeyRanges (in JSON, `[prefix, after]`).

        StorageError at once when the bucket cannot be listed. `max_rows` counts what is left out,
        too; of each range that is being listed a page of keys may be more.
        """
        check_bucket(self.store, self.bucket, self.prefix, self.limits)
        ranges = [KeyRange(*part) for part in ([(self.prefix,)] if parts is None else parts)]
        for each in ranges:
            if not each.prefix.startswith(self.prefix):
                raise StorageError(f"{self.uri}: {each.prefix!r} is not below it")
        listing = Listing(iter(()))
        listing.batches = self._list_batches(listing, ranges, max_rows)
        return listing

    def _list_batches(
        self, listing: Listing, ranges: list[KeyRange], max_rows: int | None
    ) -> Iterator[pa.RecordBatch]:
        from cifake_ray.storage.s3.client import open_client  # with botocore, see `check_bucket`

        client = open_client(self.store, self.limits, self.bucket)

        def ask(query: Query) -> Page:
            return client.list_page(self.bucket, query, lister.stop)

        num_threads = min(LISTING_THREADS, self.limits.max_in_flight)
        lister = KeyLister(ask, num_threads, max_keys=max_rows)
        place = f"{SCHEME}{self.bucket}/"
        rows = KeyBatches(place, self.prefix, self.class_names, self.key_filter, listing)
        try:
            yield from rows.make_batches(lister.list_pages(ranges))
        except (S3Error, BotoCoreError) as error:
            raise explain_s3_error(error, self.uri) from error
        listing.left += lister.left

    def read_images(self, rows: pa.Table) -> Iterator[bytes | ImageError]:
        check_locations(rows, lambda uri: f"{uri}/" == self.uri or uri.startswith(self.uri))
        names = ("location", "size_bytes", "etag", "row")
        locations, sizes, etags, offsets = (rows.column(name).to_pylist() for name in names)
        return read_objects(self.store, locations, sizes, etags, self.limits, offsets)
