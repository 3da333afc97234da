"""Sources in S3: what is found at an address, lists that lie there, and what is refused."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3_server import S3Server
from s3fs.core import S3File

from cifake_ray.config import ConvertConfig
from cifake_ray.errors import CifakeError, ImageError, NothingToDo, StorageError
from cifake_ray.storage.io.paths import resolve_path
from cifake_ray.storage.s3.location import open_path
from cifake_ray.storage.sources import glance
from cifake_ray.storage.sources.list_file import ListFileSource
from cifake_ray.storage.sources.open_source import open_source
from cifake_ray.storage.sources.parquet import ParquetSource
from cifake_ray.storage.sources.s3_prefix import S3PrefixSource
from cifake_ray.storage.sources.source import Source

ODD_NAMES = ["a b.jpg", "c%20d.jpg", "e#f.jpg", "g?h.jpg", "i+j.jpg", "k&l=m.jpg", "\u00e9.jpg"]


def open_images(src: str, out: str = "/nowhere", **options: Any) -> Source:
    config = ConvertConfig(src=src, out=out, **options)
    return open_source(config, open_path(src, config.store), resolve_path(out))


def list_table(source: Source) -> pa.Table:
    return pa.Table.from_batches(list(source.list_images().batches))


def read_all(src: str, **options: Any) -> dict[str, bytes | ImageError]:
    source = open_images(src, **options)
    rows = list_table(source)
    images = pickle.loads(pickle.dumps(source)).read_images(rows)  # as a worker gets it
    return dict(zip(rows.column("key").to_pylist(), images, strict=True))


def error_of(image: bytes | ImageError) -> str:
    assert isinstance(image, ImageError)
    return image.error


def encode_table(numbers: range, **columns: Any) -> bytes:
    sink = io.BytesIO()
    images = [{"bytes": f"image {n}".encode(), "path": None} for n in numbers]
    pq.write_table(
        pa.table({"image": images, **columns}), sink, row_group_size=2, write_page_checksum=True
    )
    return sink.getvalue()


@pytest.fixture
def bucket(s3_env: S3Server) -> str:
    return s3_env.make_bucket()


# --- what is there -------------------------------------------------------------------------------


def test_a_prefix_is_a_folder_byte_for_byte(s3_env: S3Server, bucket: str) -> None:
    prefix = "set #1?/50%20of them"
    for name in ODD_NAMES:
        s3_env.put(bucket, f"{prefix}/FAKE/{name}", name.encode())
    s3_env.put(bucket, f"{prefix}-other/x.jpg", b"x")
    expected = {f"FAKE/{name}": name.encode() for name in ODD_NAMES}
    for src in (f"s3://{bucket}/{prefix}", f"s3://{bucket}/{prefix}/"):
        assert isinstance(open_images(src), S3PrefixSource)
        assert read_all(src) == expected


@pytest.mark.parametrize(
    ("uri", "prefix"),
    [
        ("s3://b", ""),
        ("s3://b/", ""),
        ("s3://b/x", "x/"),
        ("s3://b/x/", "x/"),
        ("s3://b//x//y//", "/x//y//"),
        ("s3://b/a?b#c%20d/../e", "a?b#c%20d/../e/"),
    ],
)
def test_a_prefix_is_taken_byte_for_byte(uri: str, prefix: str) -> None:
    assert glance.split_prefix(uri) == ("b", prefix)


def test_a_bucket_is_a_folder(s3_env: S3Server, bucket: str) -> None:
    s3_env.put(bucket, "a.jpg", b"a")
    s3_env.put(bucket, "deep/b.parquet", b"no table, just a name")
    for src in (f"s3://{bucket}", f"s3://{bucket}/"):
        assert read_all(src) == {"a.jpg": b"a", "deep/b.parquet": b"no table, just a name"}


def test_tables_directly_below_are_shards(s3_env: S3Server, bucket: str) -> None:
    s3_env.put(bucket, "hub/README.md", b"")
    s3_env.put(bucket, "hub/train-0.parquet", encode_table(range(2)))
    assert isinstance(open_images(f"s3://{bucket}/hub"), ParquetSource)
    assert isinstance(open_images(f"s3://{bucket}/hub/train-0.parquet"), ParquetSource)
    assert isinstance(open_images(f"s3://{bucket}/hub", source_kind="folder"), S3PrefixSource)


def test_the_output_of_convert_is_shards_however_many_keys_come_first(
    s3_env: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("A", "B", "C", "_run.json"):
        s3_env.put(bucket, f"run/{name}", b"{}")
    s3_env.put(bucket, "run/shards/part-00000.parquet", encode_table(range(2)))
    monkeypatch.setattr(glance, "GLANCE_KEYS", 2)
    assert isinstance(open_images(f"s3://{bucket}/run"), ParquetSource)


def test_no_more_than_the_first_keys_are_looked_at(
    s3_env: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.jpg", "b.jpg", "z.parquet"):
        s3_env.put(bucket, f"images/{name}", b"")
    monkeypatch.setattr(glance, "GLANCE_KEYS", 2)
    assert isinstance(open_images(f"s3://{bucket}/images"), S3PrefixSource)


def test_a_folder_named_like_a_list_is_a_folder(s3_env: S3Server, bucket: str) -> None:
    s3_env.put(bucket, "set.csv/a.jpg", b"a")
    assert read_all(f"s3://{bucket}/set.csv") == {"a.jpg": b"a"}


# --- what is refused -----------------------------------------------------------------------------


def test_nothing_there_is_told_with_bucket_and_prefix(s3_env: S3Server, bucket: str) -> None:
    s3_env.put(bucket, "images/a.jpg", b"a")
    for prefix in ("image", "images/a.jpg/", "list.csv", "IMAGES"):
        with pytest.raises(NothingToDo, match=rf"'{bucket}' holds nothing below '{prefix}"):
            open_images(f"s3://{bucket}/{prefix}")
    with pytest.raises(NothingToDo, match="holds nothing below"):
        open_images(f"s3://{bucket}/nowhere", source_kind="list")


def test_a_bucket_that_is_missing_is_told(s3_env: S3Server) -> None:
    for src in ("s3://no-such-bucket", "s3://no-such-bucket/images"):
        with pytest.raises(StorageError, match=r"no-such-bucket.*bucket") as caught:
            open_images(src)
        assert "\n" not in str(caught.value)


def test_wrong_credentials_are_told_and_never_shown(
    s3_env: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_env.put(bucket, "images/a.jpg", b"a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "CANARY-wrong")
    for src in (f"s3://{bucket}", f"s3://{bucket}/images", f"s3://{bucket}/list.csv"):
        with pytest.raises(StorageError, match=bucket) as caught:
            open_images(src)
        assert "CANARY" not in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_bucket_that_is_not_ours_is_told(
    s3_env: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_env.put(bucket, "images/a.jpg", b"a")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_env.outsider_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_env.outsider_secret)
    with pytest.raises(StorageError, match=rf"{bucket}/images.*credentials"):
        open_images(f"s3://{bucket}/images")


@pytest.mark.parametrize(
    ("src", "words"),
    [
        ("http://example.org/images", "http:// is not supported"),
        ("gopher://host/x", "gopher://"),
        ("s3://AKIA:hush@bucket/images", "credentials"),
        ("s3://", "empty"),
        ("s3:///images", "no bucket"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused(src: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        open_images(src)
    assert "hush" not in str(caught.value)


def test_output_inside_the_source_is_refused(s3_env: S3Server, bucket: str) -> None:
    s3_env.put(bucket, "images/a.jpg", b"a")
    src = f"s3://{bucket}/images"
    for out in (src, f"{src}/", f"{src}/out"):
        for source in (src, f"{src}/", f"s3://{bucket}"):
            with pytest.raises(ValueError, match="lies inside the source"):
                open_images(source, out)
    for out in (f"{src}-out", f"s3://{bucket}", f"s3://{bucket}-2/images/out", "/images/out"):
        open_images(src, out)


def test_a_file_of_another_kind_is_no_source(s3_env: S3Server, bucket: str) -> None:
    s3_env.put(bucket, "images.zip", b"PK")
    with pytest.raises(ValueError, match=r"images\.zip is one file, neither"):
        open_images(f"s3://{bucket}/images.zip")
    with pytest.raises(ValueError, match="needs a folder"):
        open_images(f"s3://{bucket}/images.zip", source_kind="folder")


# --- lists ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["csv", "txt", "parquet"])
def test_a_list_in_a_bucket_names_objects_beside_it(
    s3_env: S3Server, bucket: str, suffix: str
) -> None:
    keys = [name if n % 2 else f"s3://{bucket}/my lists/{name}" for n, name in enumerate(ODD_NAMES)]
    for name in ODD_NAMES:
        s3_env.put(bucket, f"my lists/{name}", name.encode())
    sink = io.BytesIO()
    pq.write_table(pa.table({"path": keys}), sink)
    text = "\n".join(([] if suffix == "txt" else ["path"]) + keys).encode()
    data = sink.getvalue() if suffix == "parquet" else text
    s3_env.put(bucket, f"my lists/list.{suffix}", data)
    src = f"s3://{bucket}/my lists/list.{suffix}"
    assert isinstance(open_images(src), ListFileSource)
    assert read_all(src) == {key: name.encode() for key, name in zip(keys, ODD_NAMES, strict=True)}


def test_a_list_in_a_bucket_is_fenced(s3_env: S3Server, bucket: str, tmp_path: Path) -> None:
    other = s3_env.make_bucket()
    s3_env.put(other, "a.jpg", b"a")
    s3_env.put(bucket, "lists-2/b.jpg", b"b")
    (tmp_path / "c.jpg").write_bytes(b"c")
    rows = [f"s3://{other}/a.jpg", f"s3://{bucket}/lists-2/b.jpg", str(tmp_path / "c.jpg")]
    for row in (*rows, "../lists-2/b.jpg"):
        s3_env.put(bucket, "lists/list.txt", row.encode())
        with pytest.raises(ValueError, match=r"list\.txt, line 1: .*(--allow-prefix|'\.\.')"):
            list_table(open_images(f"s3://{bucket}/lists/list.txt"))
    s3_env.put(bucket, "lists/list.txt", "\n".join(rows).encode())
    allowed = (f"s3://{other}", f"s3://{bucket}/lists-2", str(tmp_path))
    images = read_all(f"s3://{bucket}/lists/list.txt", allow_prefix=allowed)
    assert images == dict(zip(rows, (b"a", b"b", b"c"), strict=True))


def test_rows_of_all_kinds_come_back_in_the_order_of_the_list(
    s3_env: S3Server, bucket: str, tmp_path: Path
) -> None:
    rows = []
    for number in range(150):
        data = f"image {number}".encode()
        if number % 3:
            s3_env.put(bucket, f"{number}.jpg", data)
            rows.append(f"s3://{bucket}/{number}.jpg")
        else:
            (tmp_path / f"{number}.jpg").write_bytes(data)
            rows.append(f"{number}.jpg")
    rows[10:10] = [f"s3://{bucket}/missing.jpg", "missing.jpg"]
    (tmp_path / "list.txt").write_text("\n".join(rows))
    images = read_all(str(tmp_path / "list.txt"), allow_prefix=(f"s3://{bucket}",))
    assert list(images) == rows
    assert error_of(images.pop(f"s3://{bucket}/missing.jpg")) == "not_found"
    assert error_of(images.pop("missing.jpg")) == "not_found"
    assert list(images.values()) == [f"image {n}".encode() for n in range(150)]


def test_size_and_etag_of_a_list_are_checked(s3_env: S3Server, bucket: str, tmp_path: Path) -> None:
    etags = [s3_env.put(bucket, name, b"12345") for name in ("a", "b", "c", "d")]
    lines = [
        "path,size_bytes,etag",
        f"s3://{bucket}/a,5,{etags[0].strip(chr(34))}",
        f"s3://{bucket}/b,,{'0' * 32}",
        f"s3://{bucket}/c,6,",
        f"s3://{bucket}/d,,",
    ]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    source = open_images(str(tmp_path / "list.csv"), allow_prefix=(f"s3://{bucket}",))
    rows = list_table(source)
    assert rows.column("etag").to_pylist() == [etags[0], f'"{"0" * 32}"', None, None]
    assert rows.column("size_bytes").to_pylist() == [5, None, 6, None]
    first, second, third, fourth = source.read_images(rows)
    assert (first, fourth) == (b"12345", b"12345")
    assert [error_of(second), error_of(third)] == ["changed", "changed"]


def test_a_bucket_that_may_not_be_read_gives_errors_row_by_row(
    s3_env: S3Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_env.put(bucket, "a.jpg", b"a")
    (tmp_path / "here.jpg").write_bytes(b"here")
    (tmp_path / "list.txt").write_text(f"s3://{bucket}/a.jpg\nhere.jpg")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_env.outsider_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_env.outsider_secret)
    images = read_all(str(tmp_path / "list.txt"), allow_prefix=(f"s3://{bucket}",))
    assert images.pop("here.jpg") == b"here"
    assert [error_of(image) for image in images.values()] == ["denied"]


# --- tables --------------------------------------------------------------------------------------


def test_tables_in_a_bucket_are_read_as_local_ones_are(
    s3_env: S3Server, bucket: str, tmp_path: Path
) -> None:
    for name, numbers in (("train-0.parquet", range(3)), ("more #1/test-0.parquet", range(3, 8))):
        data = encode_table(numbers, key=[f"key {n}" for n in numbers])
        s3_env.put(bucket, f"data set/{name}", data)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    s3_env.put(bucket, "data set/_hidden.parquet", b"")
    local, remote = open_images(str(tmp_path)), open_images(f"s3://{bucket}/data set")
    assert list_table(remote).drop_columns("etag") == list_table(local).drop_columns("etag")
    assert read_all(f"s3://{bucket}/data set", shard_size=2) == {
        f"key {n}": f"image {n}".encode() for n in range(8)
    }


def test_of_a_large_table_only_what_is_read_is_fetched(s3_env: S3Server, bucket: str) -> None:
    images = [{"bytes": bytes([n]) * 2**20, "path": None} for n in range(16)]
    sink = io.BytesIO()
    table = pa.table({"image": images, "label": [0, 1] * 8})
    pq.write_table(table, sink, row_group_size=4, compression="none")
    s3_env.put(bucket, "big.parquet", sink.getvalue())
    source = open_images(f"s3://{bucket}/big.parquet")
    assert isinstance(source, ParquetSource)
    fetched = []
    fetch_range = S3File._fetch_range

    def count(file: S3File, start: int, end: int) -> bytes:
        fetched.append(end - start)
        data: bytes = fetch_range(file, start, end)
        return data

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(S3File, "_fetch_range", count)
        rows = list_table(source)
        assert 0 < sum(fetched) < 2**18
        fetched.clear()
        (image,) = source.read_images(rows.slice(9, 1))
        assert image == bytes([9]) * 2**20
        assert 4 * 2**20 <= sum(fetched) < 5 * 2**20


def test_a_table_that_is_damaged_or_gone_is_named(s3_env: S3Server, bucket: str) -> None:
    data = encode_table(range(8))
    s3_env.put(bucket, "x.parquet", data)
    source = open_images(f"s3://{bucket}/x.parquet")
    rows = list_table(source)
    broken = bytearray(data)
    broken[40] ^= 255
    s3_env.put(bucket, "x.parquet", bytes(broken))
    assert {getattr(image, "error", None) for image in source.read_images(rows)} == {"changed"}
    with pytest.raises(CifakeError, match=r"x\.parquet"):
        list(source.read_images(list_table(source)))
    s3_env.client().delete_object(Bucket=bucket, Key="x.parquet")
    with pytest.raises(StorageError, match=r"x\.parquet"):
        list_table(source)
