"""Every kind of source behind one interface: put images, open the source, change the store."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import secrets
import tarfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote_plus

import pyarrow as pa
import pyarrow.orc as orc
import pyarrow.parquet as pq
from fsspec.implementations.memory import MemoryFileSystem
from s3_server import S3Server

from cifake_ray.config import ConvertConfig
from cifake_ray.core.schema import SHARD_FIELDS
from cifake_ray.storage.s3.client import S3Client
from cifake_ray.storage.s3.location import open_path
from cifake_ray.storage.sources import image_table
from cifake_ray.storage.sources.fsspec_prefix import stamp_entry
from cifake_ray.storage.sources.open_source import open_source
from cifake_ray.storage.sources.source import Source


@dataclass
class Image:
    """An image that a test put into a source; the columns are for kinds that have columns."""

    name: str
    data: bytes
    label: str | None = None
    split: str | None = None
    source: str | None = None
    etag: str = ""  # set by the store


class LocalStore:
    """Files below a folder."""

    byte_reader: ClassVar[tuple[Any, str]] = (os, "read")

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        (folder.parent / f"{folder.name}-other.jpg").write_bytes(b"not below the folder")

    @property
    def uri(self) -> str:
        return str(self.folder)

    def write(self, name: str, data: bytes) -> str:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return ""

    def remove(self, name: str) -> None:
        (self.folder / name).unlink()


class S3Store:
    """Objects below a prefix of a new bucket on a real server."""

    byte_reader: ClassVar[tuple[Any, str]] = (S3Client, "get_object")

    def __init__(self, server: S3Server, prefix: str) -> None:
        self.server, self.prefix, self.bucket = server, prefix, server.make_bucket()
        if prefix:
            server.put(self.bucket, f"{prefix.rstrip('/')}-other.jpg", b"not below the prefix")

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def write(self, name: str, data: bytes) -> str:
        return self.server.put(self.bucket, self.prefix + name, data)

    def remove(self, name: str) -> None:
        self.server.client().delete_object(Bucket=self.bucket, Key=self.prefix + name)


class MemoryStore:
    """Files of fsspec's store in memory, below a folder of its own."""

    byte_reader: ClassVar[tuple[Any, str]] = (MemoryFileSystem, "cat_file")

    def __init__(self) -> None:
        self.system = MemoryFileSystem()
        self.folder = f"/bucket-{secrets.token_hex(4)}/set"
        self.system.pipe_file(f"{self.folder}-other.jpg", b"not below the folder")

    @property
    def uri(self) -> str:
        return f"memory:/{self.folder}"

    def write(self, name: str, data: bytes) -> str:
        self.system.pipe_file(f"{self.folder}/{name}", data)
        return stamp_entry(self.system.info(f"{self.folder}/{name}")) or ""

    def remove(self, name: str) -> None:
        self.system.rm_file(f"{self.folder}/{name}")


Store = LocalStore | S3Store | MemoryStore


class SourceKind:
    """A folder of some store as the source: keys and labels come from the path below it."""

    cannot: ClassVar[dict[str, str]] = {
        "duplicates": "a store has each key once",
    }
    unstorable: ClassVar[tuple[str, ...]] = ()

    def __init__(self, store: Store, work: Path) -> None:
        self.store, self.work = store, work
        self.images: list[Image] = []
        self.byte_reader = store.byte_reader  # what gets the bytes of one image

    def put(self, *images: Image) -> None:
        with ThreadPoolExecutor(8) as threads:
            etags = threads.map(lambda image: self.store.write(image.name, image.data), images)
            for image, etag in zip(images, etags, strict=True):
                image.etag = etag
        self.images += images

    def key_of(self, name: str) -> str:
        return name

    def open(self, **options: Any) -> Source:
        """The source of what was put so far."""
        out = self.work / "out"
        config = ConvertConfig(src=self.write_index(), out=str(out), **options)
        return open_source(config, open_path(config.src, config.store), out)

    def write_index(self) -> str:
        """What names the images; a folder needs nothing written."""
        return self.store.uri


class S3PrefixKind(SourceKind):
    unstorable = ("back\\slash.jpg",)  # SeaweedFS takes it for a slash


class FsspecPrefixKind(SourceKind):
    cannot: ClassVar[dict[str, str]] = SourceKind.cannot | {
        "another process": "what memory:// holds is in the memory of this process",
    }


class ListKind(SourceKind):
    """A CSV list of images in some store; it tells size and etag of what is not local."""

    cannot: ClassVar[dict[str, str]] = {"clutter": "a list names each image"}

    def key_of(self, name: str) -> str:
        is_local = isinstance(self.store, LocalStore)
        return f"set/{name}" if is_local else f"{self.store.uri}/{name}"

    def open(self, **options: Any) -> Source:
        allowed = () if isinstance(self.store, LocalStore) else (self.store.uri,)
        return super().open(allow_prefix=allowed, **options)

    def write_index(self) -> str:
        path = self.work / "list.csv"
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("path", "label", "split", "source", "size_bytes", "etag"))
            for image in self.images:
                facts = (image.label, image.split, image.source)
                stamp = (len(image.data), image.etag)
                writer.writerow((self.key_of(image.name), *facts, *stamp))
        return str(path)


class S3ListKind(ListKind):
    unstorable = S3PrefixKind.unstorable


class FsspecListKind(ListKind):
    cannot: ClassVar[dict[str, str]] = ListKind.cannot | {
        "another process": FsspecPrefixKind.cannot["another process"]
    }


class InventoryKind(SourceKind):
    """An S3 Inventory of the bucket."""

    cannot: ClassVar[dict[str, str]] = {}
    unstorable = S3PrefixKind.unstorable

    def write_index(self) -> str:
        assert isinstance(self.store, S3Store)
        rows = [
            describe_object(self.store.bucket, image.name, size=len(image.data), e_tag=image.etag)
            for image in self.images
        ]
        parts = [rows[:3], rows[3:]] if rows else []
        return write_inventory(self.store.server, self.store.bucket, parts)


class ParquetKind(SourceKind):
    """Two Parquet files with the bytes inside, row groups of two."""

    cannot: ClassVar[dict[str, str]] = {
        "clutter": "a table holds images only",
        "changes": "the bytes are in the file that is listed; nothing is known of a row to compare",
        "sizes": "a row's size is known when its row group is read",
        "unread": "a row group is read as a whole",
    }

    def __init__(self, store: Store, work: Path) -> None:
        super().__init__(store, work)
        self.byte_reader = (image_table, "read_pieces")

    def write_index(self) -> str:
        folder = self.work / "hub"
        folder.mkdir(exist_ok=True)
        half = (len(self.images) + 1) // 2
        for name, images in (("a", self.images[:half]), ("b", self.images[half:])):
            columns = {
                "key": pa.array([image.name for image in images], pa.string()),
                "image": pa.array(
                    [{"bytes": image.data, "path": None} for image in images], SHARD_FIELDS[1].type
                ),
                "label": pa.array(
                    [image.label and ("REAL", "FAKE").index(image.label) for image in images],
                    pa.int64(),
                ),
                "split": pa.array([image.split for image in images], pa.string()),
                "source": pa.array([image.source for image in images], pa.string()),
            }
            pq.write_table(pa.table(columns), folder / f"{name}.parquet", row_group_size=2)
        return str(folder)


class TarKind(SourceKind):
    """A tar in a folder of some store."""

    cannot: ClassVar[dict[str, str]] = {
        "changes": "a tar that changed is changed as a whole: tests of its own",
        "clutter": "what is no image in a tar has rules and tests of its own",
    }

    def key_of(self, name: str) -> str:
        return f"shards.tar/{name}"

    def put(self, *images: Image) -> None:
        self.images += images

    def write_index(self) -> str:
        self.store.write("shards.tar", make_tar(self.images))
        return self.store.uri


class FsspecTarKind(TarKind):
    cannot: ClassVar[dict[str, str]] = TarKind.cannot | {
        "another process": FsspecPrefixKind.cannot["another process"]
    }


def make_tar(images: Iterable[Image], **options: Any) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", **options) as tar:
        for image in images:
            member = tarfile.TarInfo(image.name)
            member.size = len(image.data)
            tar.addfile(member, io.BytesIO(image.data))
    return data.getvalue()


# --- inventories as AWS writes them --------------------------------------------------------------

Row = dict[str, Any]
CSV_SCHEMA = "Bucket, Key, VersionId, IsLatest, IsDeleteMarker, Size, LastModifiedDate, ETag"
COLUMNS = pa.schema(
    [
        ("bucket", pa.string()),
        ("key", pa.string()),
        ("version_id", pa.string()),
        ("is_latest", pa.bool_()),
        ("is_delete_marker", pa.bool_()),
        ("size", pa.int64()),
        ("last_modified_date", pa.timestamp("ms", "UTC")),
        ("e_tag", pa.string()),
    ]
)


def encode_part(rows: list[Row], file_format: str) -> bytes:
    """One part as AWS writes it."""
    if file_format == "CSV":
        text = io.StringIO()
        writer = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n")
        for row in rows:
            values = {**row, "key": quote_plus(row["key"], safe="/")}
            flags = (str(values[name]).lower() for name in ("is_latest", "is_delete_marker"))
            size = "" if values["size"] is None else values["size"]
            writer.writerow(
                [values["bucket"], values["key"], "v", *flags, size, "", values["e_tag"] or ""]
            )
        return gzip.compress(text.getvalue().encode())
    table = pa.Table.from_pylist(rows, COLUMNS)
    sink = io.BytesIO()
    if file_format == "ORC":
        orc.write_table(table, sink)
    else:
        pq.write_table(table, sink)
    return sink.getvalue()


def describe_object(bucket: str, key: str, **facts: Any) -> Row:
    row: Row = dict.fromkeys(COLUMNS.names) | {"bucket": bucket, "key": key, "size": 5}
    return row | {"is_latest": True, "is_delete_marker": False, "e_tag": "0" * 32} | facts


def write_inventory(
    server: S3Server,
    bucket: str,
    parts: Iterable[list[Row]],
    file_format: str = "CSV",
    **changes: Any,
) -> str:
    """An inventory of `bucket`, published in another bucket; the URI of its manifest."""
    destination = server.make_bucket()
    files = []
    for number, rows in enumerate(parts):
        data = encode_part(rows, file_format)
        key = f"reports/{bucket}/every day/data/{number}.{file_format.lower()}"
        server.put(destination, key, data)
        md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
        files.append({"key": key, "size": len(data), "MD5checksum": md5})
    manifest = {
        "sourceBucket": bucket,
        "destinationBucket": f"arn:aws:s3:::{destination}",
        "version": "2016-11-30",
        "creationTimestamp": "1514944800000",
        "fileFormat": file_format,
        "fileSchema": CSV_SCHEMA if file_format == "CSV" else "message s3.inventory { ... }",
        "files": files,
    } | changes
    path = f"reports/{bucket}/every day/2026-01-01T00-00Z/manifest.json"
    server.put(destination, path, json.dumps(manifest).encode())
    return f"s3://{destination}/{path}"
