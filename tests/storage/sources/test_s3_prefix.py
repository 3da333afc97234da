"""A bucket as a source: every object a row, whatever its name and wherever the listing divides."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import pyarrow as pa
import pytest
from faults.proxy import run_proxy
from s3_server import S3Server

from cifake_ray.config import StoreConfig
from cifake_ray.core.labels import make_class_names
from cifake_ray.core.schema import MANIFEST_FIELDS
from cifake_ray.errors import StorageError
from cifake_ray.storage.s3.client import connect
from cifake_ray.storage.s3.limits import S3Limits
from cifake_ray.storage.s3.listing import KeyLister, KeyRange, Query
from cifake_ray.storage.s3.prefetch import read_objects
from cifake_ray.storage.sources import s3_prefix
from cifake_ray.storage.sources.s3_prefix import S3PrefixSource
from cifake_ray.storage.sources.source import KeyFilter, Part

QUICK = S3Limits(max_attempts=3, read_timeout_s=2, deadline_s=5, first_pause_s=0.01)


def make_source(bucket: str, prefix: str = "", **options: Any) -> S3PrefixSource:
    return S3PrefixSource(bucket, prefix, StoreConfig(), make_class_names(), **options)


def list_table(source: S3PrefixSource) -> pa.Table:
    listing = source.list_images()
    return pa.Table.from_batches(listing.batches, schema=pa.schema(MANIFEST_FIELDS))


def put_many(server: S3Server, bucket: str, keys: list[str]) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: server.put(bucket, key, key.encode()), keys))


def test_a_key_may_have_1024_bytes(s3_env: S3Server) -> None:
    bucket = s3_env.make_bucket()
    key = "/".join(["d" * 250] * 4) + "/" + "f" * 18
    s3_env.put(bucket, f"p/{key}", b"long")
    source = make_source(bucket, "p/")
    table = list_table(source)
    assert table["key"].to_pylist() == [key]
    assert list(source.read_images(table)) == [b"long"]


def test_a_row_says_where_size_etag_and_what_the_folders_mean(s3_env: S3Server) -> None:
    bucket = s3_env.make_bucket()
    etag = s3_env.put(bucket, "in/train/FAKE/sd/1.jpg", b"123")
    s3_env.put(bucket, "in/2.jpg", b"12")
    s3_env.put(bucket, "inside", b"not below the prefix")
    rows = {row["key"]: row for row in list_table(make_source(bucket, "in/")).to_pylist()}
    assert set(rows) == {"train/FAKE/sd/1.jpg", "2.jpg"}
    row = rows["train/FAKE/sd/1.jpg"]
    assert row == {
        "key": "train/FAKE/sd/1.jpg",
        "location": f"s3://{bucket}/in/train/FAKE/sd/1.jpg",
        "row": None,
        "size_bytes": 3,
        "mtime_ns": None,
        "etag": etag,
        "label": 1,
        "split": "train",
        "source": "sd",
        "error": None,
    }
    assert rows["2.jpg"]["label"] is None


def test_folder_markers_and_excluded_keys_are_counted(s3_env: S3Server) -> None:
    bucket = s3_env.make_bucket()
    s3_env.put(bucket, "in/", b"")
    s3_env.put(bucket, "in/folder/", b"")
    put_many(s3_env, bucket, ["in/folder/a.jpg", "in/folder/b.txt"])
    key_filter = KeyFilter(include=("*.jpg",))
    listing = make_source(bucket, "in/", key_filter=key_filter).list_images()
    table = pa.Table.from_batches(listing.batches)
    assert table["key"].to_pylist() == ["folder/a.jpg"]
    assert listing.left_out["excluded"] == 1
    assert listing.left_out["folder marker"] in (1, 2)  # SeaweedFS does not list them all


def test_a_missing_bucket_is_told_before_anything_else(s3_env: S3Server) -> None:
    with pytest.raises(StorageError, match="s3://no-such-bucket/in/: no such bucket"):
        make_source("no-such-bucket", "in/", limits=QUICK).list_images()


def test_a_row_without_location_is_a_bad_key(s3_env: S3Server) -> None:
    bucket = s3_env.make_bucket()
    s3_env.put(bucket, "a", b"a")
    results = list(
        read_objects(StoreConfig(), [None, f"s3://{bucket}/a", None], [1, 1, 1], [None] * 3)
    )
    assert [getattr(result, "error", result) for result in results] == ["bad_key", b"a", "bad_key"]


@pytest.fixture(scope="module")
def big_bucket(s3_server: S3Server) -> tuple[str, list[str]]:
    """5,000 keys in one folder, 600 in a tree, and names that sort around the slash."""
    bucket = s3_server.make_bucket()
    keys = [f"flat/img_{number:05d}.jpg" for number in range(5_000)]
    keys += [
        f"tree/{split}/{label}/{number:03d}.jpg"
        for split in ("train", "test", "val")
        for label in ("REAL", "FAKE")
        for number in range(100)
    ]
    keys += [f"tree/{name}" for name in ("train-notes", "train.csv", "train0", "test!")]
    keys += ["flat.txt", "flatter/x"]
    put_many(s3_server, bucket, keys)
    return bucket, keys


@pytest.mark.parametrize(("prefix", "page_keys"), [("flat/", 100), ("tree/", 20), ("", 100)])
def test_a_divided_listing_is_the_plain_one(
    s3_env: S3Server, big_bucket: tuple[str, list[str]], prefix: str, page_keys: int
) -> None:
    bucket, keys = big_bucket
    client = connect(StoreConfig())
    queries: list[Query] = []

    def ask(query: Query) -> Any:
        queries.append(query)
        return client.list_page(bucket, query)

    lister = KeyLister(ask, num_threads=8, page_keys=page_keys)
    listed = [key for page in lister.list_pages([KeyRange(prefix)]) for key in page.keys]
    assert sorted(listed) == sorted(key for key in keys if key.startswith(prefix))
    divided = {query["prefix"] for query in queries if query["max-keys"] != "1"}
    assert len(divided) > 3


def test_a_bucket_is_listed_part_by_part(
    s3_env: S3Server, big_bucket: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, keys = big_bucket
    monkeypatch.setattr(s3_prefix, "KeyLister", partial(KeyLister, page_keys=100))
    source = make_source(bucket)
    listed: list[str] = []
    left: list[Part] | None = None
    num_listings = 0
    while left is None or left:
        listing = source.list_images(left, max_rows=700)
        for batch in listing.batches:
            listed += batch.column("key").to_pylist()
        listed += ["flat.txt"] * listing.left_out["sidecar"]
        left = json.loads(json.dumps(listing.left))
        num_listings += 1
    assert sorted(listed) == sorted(keys)
    assert 2 < num_listings < 10


def test_a_part_of_another_place_is_refused(s3_env: S3Server) -> None:
    bucket = s3_env.make_bucket()
    with pytest.raises(StorageError, match=f"s3://{bucket}/in/: 'elsewhere/' is not below it"):
        make_source(bucket, "in/").list_images([("elsewhere/", "")])


def test_an_error_in_the_middle_of_a_listing_names_the_bucket(
    s3_env: S3Server, big_bucket: tuple[str, list[str]]
) -> None:
    bucket, _ = big_bucket
    with run_proxy(s3_env.endpoint) as proxy:
        source = replace(
            make_source(bucket, "flat/", limits=QUICK),
            store=StoreConfig(s3_endpoint_url=proxy.endpoint),
        )
        listing = source.list_images()
        proxy.fail("status", status=403, path="continuation-token", times=float("inf"))
        with pytest.raises(StorageError, match=f"s3://{bucket}/flat/: access denied"):
            list(listing.batches)
