"""Places: what a URI names, bytes in and out of a bucket, and what is said when a store refuses."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import s3fs
from s3_server import S3Server, find_ports
from upath import UPath

from cifake_ray.config import StoreConfig
from cifake_ray.errors import ImageError, StorageError
from cifake_ray.storage.io.digest import stamp_file
from cifake_ray.storage.io.files import (
    check_writable,
    create_bytes,
    exists,
    find_files,
    list_folder,
    move,
    open_file,
    read_bytes,
    read_if_exists,
    remove,
    write_bytes,
)
from cifake_ray.storage.io.paths import (
    STORE_ERRORS,
    AnyPath,
    explain_errors,
    is_inside,
    resolve_local,
    resolve_path,
)
from cifake_ray.storage.sources.fsspec_prefix import read_fsspec_file

ODD_NAMES = ["a b.txt", "ä%20+.txt", "q?x=1#y.txt", "[x]{y}*.txt", "'\"<&>.txt", "e\u0301.txt"]


@pytest.fixture
def folder(s3_env: S3Server) -> AnyPath:
    return resolve_path(f"s3://{s3_env.make_bucket()}/some/out")


# --- what a URI names ----------------------------------------------------------------------------


def test_a_local_path_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_path("x/../y z") == tmp_path / "y z"
    assert resolve_path("file:///a/b") == Path("/a/b")
    assert resolve_path("~/x") == Path(os.path.expanduser("~/x"))


@pytest.mark.parametrize("uri", ["s3://bucket/a b/ä%20?x#y", "s3://bucket", "memory://a/b"])
def test_a_uri_is_told_as_it_was_given(uri: str) -> None:
    assert str(resolve_path(uri)).rstrip("/") == uri


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("", "empty path"),
        ("s3://", "empty path"),
        ("s3:///key", "names no bucket"),
        ("http://host/x", "http:// is not supported"),
        ("https://host/x", "https:// is not supported"),
        ("ftp://host/x", "ftp:// is not supported"),
        ("gs://bucket/x", "needs a package that is not installed"),
    ],
)
def test_what_cannot_be_opened_is_refused(uri: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        resolve_path(uri)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIA1:CANARY@bucket/x",
        "s3://bucket/x?access_key=CANARY",
        "s3://bucket/x?secret_key=CANARY",
        "https://bucket.s3.amazonaws.com/x?X-Amz-Signature=CANARY",
    ],
)
def test_credentials_in_a_uri_are_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(ValueError, match="holds credentials") as caught:
        resolve_path(uri)
    assert "CANARY" not in str(caught.value)


def test_an_endpoint_with_credentials_is_refused_and_not_repeated() -> None:
    with pytest.raises(ValueError, match="never from a URL") as caught:
        StoreConfig(s3_endpoint_url="http://me:CANARY@host:1")
    assert "CANARY" not in str(caught.value)


def test_inside_means_whole_components() -> None:
    for root in ("/tmp/a", "s3://bucket/a", "memory://bucket/a"):
        folder = resolve_path(root)
        assert is_inside(resolve_path(f"{root}/b"), folder)
        assert is_inside(folder, folder)
        assert not is_inside(resolve_path(f"{root}b"), folder)
    assert not is_inside(resolve_path("/tmp/a/b"), resolve_path("s3://tmp/a"))
    assert is_inside(resolve_path("s3://bucket/a"), resolve_path("s3://bucket"))
    assert not is_inside(resolve_path("s3://bucket2/a"), resolve_path("s3://bucket"))


def test_what_must_be_local_is_refused_elsewhere() -> None:
    with pytest.raises(ValueError, match="the sample must be a local folder"):
        resolve_local("s3://bucket/x", "the sample")


# --- bytes in and out of a bucket ----------------------------------------------------------------


def test_bytes_come_back_under_their_own_name(folder: AnyPath) -> None:
    for number, name in enumerate(ODD_NAMES):
        write_bytes(folder / name, b"%d" % number)
    assert [place.name for place in list_folder(folder)] == sorted(ODD_NAMES)
    assert find_files(folder) == sorted(ODD_NAMES)
    for number, name in enumerate(ODD_NAMES):
        assert read_bytes(folder / name) == b"%d" % number
        with open_file(folder / name) as file:
            assert file.read() == b"%d" % number


def test_what_is_not_there_is_none(folder: AnyPath) -> None:
    assert not exists(folder / "x")
    assert read_if_exists(folder / "x") is None
    assert list_folder(folder) == []
    remove(folder / "x")
    with pytest.raises(StorageError, match=r"some/out/x: .*check the bucket and the path"):
        read_bytes(folder / "x")


def test_a_write_replaces_and_a_remove_removes(folder: AnyPath) -> None:
    write_bytes(folder / "x", b"1")
    first = stamp_file(folder / "x")
    write_bytes(folder / "x", b"2")
    assert read_bytes(folder / "x") == b"2"
    assert stamp_file(folder / "x") != first
    move(folder / "x", folder / "y")
    assert not exists(folder / "x")
    assert read_bytes(folder / "y") == b"2"
    remove(folder / "y")
    assert not exists(folder / "y")


def test_a_large_object_is_written_by_one_request(folder: AnyPath, s3_env: S3Server) -> None:
    data = os.urandom(2**20) * 60  # s3fs would cut it into parts from 50 MiB on
    write_bytes(folder / "x", data)
    assert read_bytes(folder / "x") == data
    head = s3_env.client().head_object(
        Bucket=str(folder).split("/")[2], Key="some/out/x", PartNumber=1
    )
    assert "-" not in head["ETag"].strip('"'), "written in parts"


def test_one_of_many_creates(folder: AnyPath) -> None:
    results: list[bool] = []
    threads = [
        threading.Thread(target=lambda n=n: results.append(create_bytes(folder / "x", b"%d" % n)))
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [False] * 7 + [True]
    before = read_bytes(folder / "x")
    assert not create_bytes(folder / "x", b"late")
    assert read_bytes(folder / "x") == before


def test_other_stores_than_s3_work_alike() -> None:
    folder = resolve_path("memory://places/out")
    assert create_bytes(folder / "a", b"1")
    assert not create_bytes(folder / "a", b"2")
    write_bytes(folder / "b", b"3")
    assert [place.name for place in list_folder(folder)] == ["a", "b"]
    assert read_bytes(folder / "a") == b"1"
    assert read_if_exists(folder / "c") is None
    remove(folder / "a")
    assert find_files(folder) == ["b"]


# --- a store that refuses ------------------------------------------------------------------------


def test_a_missing_bucket_is_named(s3_env: S3Server) -> None:
    # Reading: SeaweedFS makes the bucket when its administrator writes into it.
    with pytest.raises(StorageError, match=r"^s3://no-such-bucket/x: .*bucket does not exist"):
        read_bytes(resolve_path("s3://no-such-bucket/x"))


def test_who_may_only_read_is_told_so(s3_env: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = s3_env.make_bucket()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_env.reader_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_env.reader_secret)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StorageError, match="check the credentials") as caught:
        check_writable(resolve_path(f"s3://{bucket}/x"))
    assert "CANARY" not in str(caught.value)


def test_a_wrong_secret_is_told_and_not_repeated(
    s3_env: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "CANARY-wrong")
    with pytest.raises(StorageError, match="check the credentials") as caught:
        exists(resolve_path(f"s3://{s3_env.make_bucket()}/x"))
    assert "CANARY" not in str(caught.value)


def test_no_credentials_at_all_is_told(s3_env: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    with pytest.raises(StorageError, match=r"no AWS credentials found.*--s3-anonymous"):
        read_bytes(resolve_path("s3://bucket/x"))


def test_an_unknown_profile_is_told(s3_env: S3Server) -> None:
    with pytest.raises(StorageError, match=r"nobody.*check --s3-profile"):
        read_bytes(resolve_path("s3://bucket/x", StoreConfig(s3_profile="nobody")))


def test_an_endpoint_where_nobody_listens_is_told(s3_env: S3Server) -> None:
    store = StoreConfig(s3_endpoint_url=f"http://127.0.0.1:{find_ports(1)[0]}")
    with pytest.raises(StorageError, match="check --s3-endpoint-url and the network"):
        read_bytes(resolve_path("s3://bucket/x", store))


def test_a_public_bucket_is_read_by_nobody(
    s3_env: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_env.put(s3_env.public_bucket, "places/x", b"1")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    place = resolve_path(f"s3://{s3_env.public_bucket}/places/x", StoreConfig(s3_anonymous=True))
    assert read_bytes(place) == b"1"


@pytest.mark.parametrize(("module", "name"), STORE_ERRORS)
def test_what_a_library_of_a_store_raises_is_one_line(
    monkeypatch: pytest.MonkeyPatch, module: str, name: str
) -> None:
    class Failure(Exception):
        pass

    monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{name: Failure}))
    path = resolve_path("memory://a/b")
    with (
        pytest.raises(StorageError, match=r"^memory://a/b: no\s+name; check the network"),
        explain_errors(path),
    ):
        raise Failure("no\n name")
    assert isinstance(path, UPath)
    monkeypatch.setattr(path.fs, "info", lambda path: raise_it(Failure("gone")))
    row = read_fsspec_file(path.fs, str(path), None, None)
    assert isinstance(row, ImageError)
    assert row.error == "io_network"


def raise_it(error: Exception) -> None:
    raise error
