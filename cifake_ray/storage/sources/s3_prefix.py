"""The images of a bucket on S3: every object below a prefix that is no clutter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from botocore.exceptions import BotoCoreError

from cifake_ray.config import StoreConfig
from cifake_ray.core.schema import MANIFEST_FIELDS
from cifake_ray.errors import ImageError
from cifake_ray.storage.s3.errors import S3Error, explain_s3_error
from cifake_ray.storage.s3.limits import DEFAULT_LIMITS, S3Limits
from cifake_ray.storage.s3.listing import KeyLister, Page, Query
from cifake_ray.storage.s3.location import SCHEME, check_bucket
from cifake_ray.storage.s3.prefetch import read_objects
from cifake_ray.storage.sources.source import (
    KEEP_ALL,
    KeyFilter,
    Listing,
    Part,
    batch_rows,
    check_locations,
    escape_key,
    make_label_reader,
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
        """Raise StorageError at once when the bucket cannot be listed."""
        check_bucket(self.store, self.bucket, self.prefix, self.limits)
        listing = Listing(iter(()))
        listing.batches = batch_rows(self._list_rows(listing), pa.schema(MANIFEST_FIELDS))
        return listing

    def _list_rows(self, listing: Listing) -> Iterator[Sequence[Any]]:
        from cifake_ray.storage.s3.client import open_client  # with botocore, see `check_bucket`

        client = open_client(self.store, self.limits, self.bucket)

        def ask(query: Query) -> Page:
            return client.list_page(self.bucket, query, lister.stop)

        lister = KeyLister(ask, min(LISTING_THREADS, self.limits.max_in_flight))
        location = f"{SCHEME}{self.bucket}/"
        read_labels = make_label_reader(self.class_names)
        try:
            for page in lister.list_entries(self.prefix):
                for full_key, size_bytes, etag in page:
                    key = full_key.removeprefix(self.prefix)
                    if not key or (key[-1] == "/" and not size_bytes):
                        listing.left_out["folder marker"] += 1
                        continue
                    if reason := self.key_filter.find_reason(key):
                        listing.leave_out(key, reason)
                        continue
                    labels = read_labels(key.rpartition("/")[0])
                    escaped = escape_key(key)
                    if escaped is None:
                        path = location + full_key
                        yield key, path, None, size_bytes, None, etag, *labels, None
                    else:
                        known = (None, None, size_bytes, None, etag, labels.label, None, None)
                        yield escaped, *known, "bad_key"
        except (S3Error, BotoCoreError) as error:
            raise explain_s3_error(error, self.uri) from error

    def read_images(self, rows: pa.Table) -> Iterator[bytes | ImageError]:
        check_locations(rows, lambda uri: f"{uri}/" == self.uri or uri.startswith(self.uri))
        names = ("location", "size_bytes", "etag", "row")
        locations, sizes, etags, offsets = (rows.column(name).to_pylist() for name in names)
        return read_objects(self.store, locations, sizes, etags, self.limits, offsets)
