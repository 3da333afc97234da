"""The objects that an S3 Inventory names: AWS has listed the bucket already.

An inventory is a `manifest.json` and its parts: CSV (gzip, no header, keys
URL-encoded, a space as `+`), Parquet or ORC. Described at
https://docs.aws.amazon.com/AmazonS3/latest/userguide/storage-inventory-location.html
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import IO, Any, NamedTuple
from urllib.parse import unquote_plus

import pyarrow as pa
import pyarrow.orc as orc
import pyarrow.parquet as pq

from cifake_ray.config import StoreConfig
from cifake_ray.core.schema import MANIFEST_FIELDS
from cifake_ray.errors import ImageError, StorageError
from cifake_ray.storage.io.files import open_file, read_json
from cifake_ray.storage.io.paths import AnyPath, explain_errors, resolve_path
from cifake_ray.storage.s3.prefetch import read_objects
from cifake_ray.storage.sources.list_file import quote_etag
from cifake_ray.storage.sources.source import (
    KEEP_ALL,
    LISTING_BATCH_ROWS,
    KeyFilter,
    Listing,
    Part,
    batch_rows,
    check_locations,
    make_label_reader,
)
from cifake_ray.storage.sources.table_stamps import explain_change

INVENTORY_NAME = "manifest.json"
FORMATS = ("CSV", "Parquet", "ORC")
COPY_BYTES = 8 * 2**20
UNREADABLE = (OSError, EOFError, zlib.error, csv.Error, ValueError, pa.ArrowException)
_COLUMNS = ("bucket", "key", "size", "etag", "islatest", "isdeletemarker")


class InventoryFile(NamedTuple):
    """One file of an inventory."""

    uri: str
    md5: str


class Inventory(NamedTuple):
    """The contents of a manifest.json."""

    bucket: str  # whose objects are listed
    format: str
    columns: list[str]  # of CSV parts
    parts: list[InventoryFile]


def read_inventory(place: AnyPath) -> Inventory:
    """Read the manifest of an inventory. StorageError when it is none."""
    manifest = read_json(place)
    try:
        destination = manifest["destinationBucket"].rpartition(":")[2]  # arn:aws:s3:::BUCKET
        inventory = Inventory(
            manifest["sourceBucket"],
            manifest["fileFormat"],
            [_plain(name) for name in manifest["fileSchema"].split(",")],
            [
                InventoryFile(f"s3://{destination}/{p['key']}", p["MD5checksum"])
                for p in manifest["files"]
            ],
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise StorageError(
            f"{place}: no manifest of an S3 Inventory ({error!r}); give the manifest.json that AWS"
            " wrote"
        ) from error
    if inventory.format not in FORMATS:
        raise StorageError(
            f"{place}: parts in the format {inventory.format!r}; set the inventory to one of"
            f" {', '.join(FORMATS)}"
        )
    return inventory


def _plain(name: str) -> str:
    """Return one spelling: CSV has ETag and IsLatest, Parquet e_tag and is_latest."""
    return name.strip().lower().replace("_", "")


@dataclass(frozen=True)
class S3InventorySource:
    """The current objects of an inventory; the key is the object's, and one bucket has them all."""

    place: AnyPath
    class_names: dict[str, int]
    store: StoreConfig
    key_filter: KeyFilter = KEEP_ALL

    def list_images(
        self, parts: Sequence[Part] | None = None, max_rows: int | None = None
    ) -> Listing:
        """List the objects that the inventory names, or those of its files in `parts`."""
        listing = Listing(iter(()))
        rows = self._list_rows(listing, parts, max_rows)
        listing.batches = batch_rows(rows, pa.schema(MANIFEST_FIELDS))
        return listing

    def _list_rows(
        self, listing: Listing, parts: Sequence[Part] | None, max_rows: int | None
    ) -> Iterator[Sequence[Any]]:
        inventory = read_inventory(self.place)
        read_labels = make_label_reader(self.class_names)
        num_rows, chosen = 0, inventory.parts
        if parts is not None:
            chosen = [part for part in inventory.parts if part.uri in parts]
            if len(chosen) != len(parts):
                raise explain_change(self.place)
        for part in chosen:
            if max_rows is not None and num_rows >= max_rows:
                listing.left.append(part.uri)
                continue
            for bucket, key, size, etag, is_latest, is_deleted in self._read_part(inventory, part):
                if bucket != inventory.bucket:
                    raise StorageError(
                        f"{part.uri}: names an object of the bucket {bucket!r} in an inventory of"
                        f" {inventory.bucket!r}; was it edited?"
                    )
                reason = None
                if str(is_deleted).lower() == "true":
                    reason = "delete marker"
                elif str(is_latest).lower() == "false":
                    reason = "old version"
                elif key.endswith("/") and not size:
                    reason = "folder marker"
                else:
                    reason = self.key_filter.find_reason(key)
                if reason:
                    listing.leave_out(key, reason)
                    continue
                location = f"s3://{bucket}/{key}"
                labels = read_labels(key.rpartition("/")[0])
                num_rows += 1
                yield key, location, None, size, None, quote_etag(etag), *labels, None

    def _read_part(self, inventory: Inventory, part: InventoryFile) -> Iterator[Sequence[Any]]:
        """Yield the values of `_COLUMNS` for each object; None for a missing column."""
        readers = {"CSV": _read_csv, "Parquet": _read_parquet, "ORC": _read_orc}
        with self._fetch_part(part) as file:
            try:
                yield from readers[inventory.format](file, inventory.columns)
            except UNREADABLE as error:
                raise StorageError(
                    f"{part.uri}: not readable as a part of an inventory ({error}); give another"
                    " day's manifest.json"
                ) from error

    @contextmanager
    def _fetch_part(self, part: InventoryFile) -> Iterator[IO[bytes]]:
        """Copy a part to an unnamed local file, to verify its checksum before it is parsed."""
        place = resolve_path(part.uri, self.store)
        digest = hashlib.md5(usedforsecurity=False)
        with tempfile.TemporaryFile() as copy:
            with open_file(place) as file, explain_errors(place):
                while data := file.read(COPY_BYTES):
                    digest.update(data)
                    copy.write(data)
            if digest.hexdigest() != part.md5.lower():
                raise StorageError(
                    f"{part.uri}: its MD5 is {digest.hexdigest()}, the manifest says {part.md5};"
                    " give another day's manifest.json"
                )
            copy.seek(0)
            yield copy

    def read_images(self, rows: pa.Table) -> Iterator[bytes | ImageError]:
        root = f"s3://{_find_bucket(self.place)}/"
        check_locations(rows, lambda uri: uri.startswith(root))
        columns = (rows.column(name).to_pylist() for name in ("location", "size_bytes", "etag"))
        return read_objects(self.store, *columns)


@lru_cache(maxsize=4)  # a worker asks for each shard
def _find_bucket(place: AnyPath) -> str:
    return read_inventory(place).bucket


def _check_columns(names: Sequence[str]) -> None:
    if missing := [name for name in ("bucket", "key") if name not in names]:
        raise ValueError(f"no column {missing[0]}")


def _read_csv(file: IO[bytes], names: list[str]) -> Iterator[Sequence[Any]]:
    _check_columns(names)
    positions = [names.index(name) if name in names else None for name in _COLUMNS]
    key_place = names.index("key")
    with gzip.open(file) as data, io.TextIOWrapper(data, "utf-8", newline="") as text:
        for values in csv.reader(text, strict=True):
            if len(values) != len(names):
                raise ValueError(f"{len(values)} values for {len(names)} columns")
            values[key_place] = unquote_plus(values[key_place], errors="strict")
            bucket, key, size, *others = (None if p is None else values[p] for p in positions)
            yield bucket, key, int(size) if size else None, *others


def _read_parquet(file: IO[bytes], _: list[str]) -> Iterator[Sequence[Any]]:
    table = pq.ParquetFile(file)
    names = [name for name in table.schema_arrow.names if _plain(name) in _COLUMNS]
    for batch in table.iter_batches(LISTING_BATCH_ROWS, columns=names):
        yield from _iterate_batch(batch)


def _read_orc(file: IO[bytes], _: list[str]) -> Iterator[Sequence[Any]]:
    table = orc.ORCFile(file)
    names = [name for name in table.schema.names if _plain(name) in _COLUMNS]
    for stripe in range(table.nstripes):
        yield from _iterate_batch(table.read_stripe(stripe, columns=names))


def _iterate_batch(batch: pa.RecordBatch) -> Iterator[Sequence[Any]]:
    names = [_plain(name) for name in batch.schema.names]
    _check_columns(names)
    nothing = [None] * batch.num_rows
    columns = [
        batch.column(names.index(name)).to_pylist() if name in names else nothing
        for name in _COLUMNS
    ]
    return zip(*columns, strict=True)
