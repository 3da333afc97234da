"""S3 inventories: what AWS wrote about a bucket is a list of its images."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from s3_server import S3Server
from source_kinds import describe_object, encode_part, write_inventory

from cifake_ray.config import ConvertConfig
from cifake_ray.core.schema import FAKE, MANIFEST_FIELDS, REAL
from cifake_ray.errors import StorageError
from cifake_ray.storage.s3.location import open_path
from cifake_ray.storage.sources.open_source import open_source
from cifake_ray.storage.sources.s3_inventory import S3InventorySource

FORMATS = ("CSV", "Parquet", "ORC")
ODD_KEYS = [
    "train/REAL/plus+sign.jpg",
    "train/REAL/two  spaces .jpg",
    "train/FAKE/sdxl/per%20cent.jpg",
    "train/FAKE/sdxl/hash#question?.jpg",
    'quote",comma.jpg',
    "new\nline.jpg",
    "caf\u00e9 \U0001f9ff.jpg",
    "s3://looks-like/a-uri.jpg",
]


def open_inventory(uri: str, **options: Any) -> S3InventorySource:
    config = ConvertConfig(src=uri, out="/nowhere", **options)
    source = open_source(config, open_path(uri, config.store), Path("/nowhere"))
    assert isinstance(source, S3InventorySource)
    return source


def list_rows(source: S3InventorySource) -> pa.Table:
    return pa.Table.from_batches(list(source.list_images().batches), pa.schema(MANIFEST_FIELDS))


@pytest.mark.parametrize("file_format", FORMATS)
def test_an_inventory_lists_what_the_bucket_itself_would(
    s3_env: S3Server, file_format: str
) -> None:
    bucket = s3_env.make_bucket()
    etags = {key: s3_env.put(bucket, key, key.encode()) for key in ODD_KEYS}
    rows = [
        describe_object(bucket, key, size=len(key.encode()), e_tag=etag.strip('"'))
        for key, etag in etags.items()
    ]
    uri = write_inventory(s3_env, bucket, [rows[:3], rows[3:]], file_format)
    listed = list_rows(open_inventory(uri)).to_pylist()
    assert [row["key"] for row in listed] == ODD_KEYS
    assert {row["key"]: row["etag"] for row in listed} == etags
    assert [row["size_bytes"] for row in listed] == [len(key.encode()) for key in ODD_KEYS]
    assert [row["location"] for row in listed] == [f"s3://{bucket}/{key}" for key in ODD_KEYS]
    facts = [(row["label"], row["split"], row["source"]) for row in listed[1:4]]
    assert facts == [(REAL, "train", None), (FAKE, "train", "sdxl"), (FAKE, "train", "sdxl")]


@pytest.mark.parametrize("file_format", FORMATS)
def test_old_versions_delete_markers_and_folders_are_counted_not_listed(
    s3_env: S3Server, file_format: str
) -> None:
    rows = [
        describe_object("b", "a.jpg"),
        describe_object("b", "a.jpg", is_latest=False),
        describe_object("b", "b.jpg", is_delete_marker=True, size=None, e_tag=None),
        describe_object("b", "folder/", size=0),
        describe_object("b", "c.png"),
        describe_object("b", "d.jpg", size=None, e_tag=None),
    ]
    uri = write_inventory(s3_env, "b", [rows], file_format)
    source = open_inventory(uri, exclude=("*.png",))
    listing = source.list_images()
    (batch,) = listing.batches
    assert batch.column("key").to_pylist() == ["a.jpg", "d.jpg"]
    assert batch.column("etag").to_pylist() == [f'"{"0" * 32}"', None]
    assert batch.column("size_bytes").to_pylist() == [5, None]
    assert listing.left_out == {
        "old version": 1,
        "delete marker": 1,
        "folder marker": 1,
        "excluded": 1,
    }


def test_the_shortest_inventory_has_bucket_and_key_alone(s3_env: S3Server) -> None:
    uri = write_inventory(s3_env, "b", [], fileSchema="Bucket, Key")
    destination = uri.split("/")[2]
    data = gzip.compress(b'"b","a+b%2B.jpg"\n')
    s3_env.put(destination, "part", data)
    md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
    manifest = json.loads(s3_env.get(destination, uri.split("/", 3)[3]))
    manifest["files"] = [{"key": "part", "size": len(data), "MD5checksum": md5}]
    s3_env.put(destination, "manifest.json", json.dumps(manifest).encode())
    (row,) = list_rows(open_inventory(f"s3://{destination}/manifest.json")).to_pylist()
    assert (row["key"], row["size_bytes"], row["etag"]) == ("a b+.jpg", None, None)


def test_a_copy_of_the_manifest_on_this_disk_will_do(s3_env: S3Server, tmp_path: Path) -> None:
    uri = write_inventory(s3_env, "b", [[describe_object("b", "a.jpg")]])
    path = tmp_path / "manifest.json"
    path.write_bytes(s3_env.get(uri.split("/")[2], uri.split("/", 3)[3]))
    assert list_rows(open_inventory(str(path))).column("key").to_pylist() == ["a.jpg"]


def test_a_part_with_another_checksum_is_refused(s3_env: S3Server) -> None:
    uri = write_inventory(s3_env, "b", [[describe_object("b", "a.jpg")]])
    destination = uri.split("/")[2]
    (part,) = s3_env.list_keys(destination, "reports/b/every day/data/")
    s3_env.put(destination, part, encode_part([describe_object("b", "evil.jpg")], "CSV"))
    with pytest.raises(StorageError, match=r"data/0\.csv: its MD5 is"):
        list_rows(open_inventory(uri))


def test_a_part_that_is_gone_is_named(s3_env: S3Server) -> None:
    uri = write_inventory(s3_env, "b", [[describe_object("b", "a.jpg")]])
    destination = uri.split("/")[2]
    (part,) = s3_env.list_keys(destination, "reports/b/every day/data/")
    s3_env.client().delete_object(Bucket=destination, Key=part)
    with pytest.raises(StorageError, match=r"data/0\.csv"):
        list_rows(open_inventory(uri))


def test_objects_of_another_bucket_are_refused(s3_env: S3Server) -> None:
    uri = write_inventory(
        s3_env, "b", [[describe_object("b", "a.jpg"), describe_object("other", "b.jpg")]]
    )
    with pytest.raises(StorageError, match=r"'other'.*'b'"):
        list_rows(open_inventory(uri))


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_part_that_is_nonsense_is_named(s3_env: S3Server, file_format: str) -> None:
    uri = write_inventory(s3_env, "b", [[describe_object("b", "a.jpg")]], file_format)
    destination, path = uri.split("/", 3)[2:]
    manifest = json.loads(s3_env.get(destination, path))
    nonsense = [b"nonsense", gzip.compress(b'"b"\n'), gzip.compress(b'"b","k","' + b"x" * 99)[:-20]]
    nonsense += [gzip.compress(b'"b","\xff","v","true","false","1","",""\n')]
    for data in nonsense:
        s3_env.put(destination, "part", data)
        md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
        manifest["files"] = [{"key": "part", "size": len(data), "MD5checksum": md5}]
        s3_env.put(destination, path, json.dumps(manifest).encode())
        with pytest.raises(StorageError, match=r"/part: not readable as a part of an inventory"):
            list_rows(open_inventory(uri))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", "no manifest of an S3 Inventory"),
        ('{"sourceBucket": 5, "files": [1]}', "no manifest of an S3 Inventory"),
        ("[1]", "no JSON object"),
        ("nonsense", "not valid JSON"),
    ],
)
def test_a_json_that_is_no_inventory_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(StorageError, match=words):
        list_rows(open_inventory(str(tmp_path / "manifest.json")))


def test_an_unknown_format_is_refused_with_those_that_are_read(s3_env: S3Server) -> None:
    uri = write_inventory(s3_env, "b", [], fileFormat="Avro")
    with pytest.raises(StorageError, match=r"'Avro'.*CSV, Parquet, ORC"):
        list_rows(open_inventory(uri))
