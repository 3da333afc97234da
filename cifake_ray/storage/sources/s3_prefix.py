"""The images of a bucket on S3: every object below a prefix, whatever its name."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
from botocore.exceptions import BotoCoreError

from cifake_ray.config import StoreConfig
from cifake_ray.core.labels import PathLabels, read_path
from cifake_ray.core.schema import MANIFEST_FIELDS
from cifake_ray.errors import ImageError
from cifake_ray.storage.s3.client import DEFAULT_LIMITS, S3Limits, open_client
from cifake_ray.storage.s3.errors import S3Error, explain_s3_error
from cifake_ray.storage.s3.listing import KeyLister, Query
from cifake_ray.storage.s3.location import SCHEME, check_bucket
from cifake_ray.storage.s3.prefetch import read_objects
from cifake_ray.storage.sources.source import (
    KEEP_ALL,
    LISTING_BATCH_ROWS,
    KeyFilter,
    Listing,
    RowBuffer,
    escape_key,
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
        known_folder, labels = "", PathLabels(None, None, None)
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
                        known_folder, labels = folder, read_path(folders, self.class_names)
                    escaped = escape_key(key)
                    if escaped is None:
                        place = (key, location + full_key, None, size_bytes, None, etag)
                        rows.append(*place, *labels, None)
                    else:
                        known = (None, None, size_bytes, None, etag, labels.label, None, None)
                        rows.append(escaped, *known, "bad_key")
                if len(rows) >= LISTING_BATCH_ROWS:
                    yield rows.drain()
            if len(rows):
                yield rows.drain()
        except (S3Error, BotoCoreError) as error:
            raise explain_s3_error(error, self.uri) from error

    def read_images(self, rows: pa.Table) -> Iterator[bytes | ImageError]:
        names = ("location", "size_bytes", "etag")
        locations, sizes, etags = (rows.column(name).to_pylist() for name in names)
        return read_objects(self.store, locations, sizes, etags, self.limits)
