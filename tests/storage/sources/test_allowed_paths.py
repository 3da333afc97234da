"""What a list may point at, and what a person is told when it points elsewhere."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cifake_ray.config import ConvertConfig
from cifake_ray.errors import ImageError, UsageError
from cifake_ray.storage.sources.allowed_paths import make_allowed_paths
from cifake_ray.storage.sources.open_source import open_source


def put(path: Path, data: bytes = b"bytes") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def read_list(path: Path, **options: Any) -> dict[str, bytes | ImageError]:
    config = ConvertConfig(src=str(path), out="/nowhere", **options)
    source = open_source(config, path, Path("/nowhere"))
    rows = pa.Table.from_batches(list(source.list_images().batches))
    images = list(source.read_images(rows))
    return dict(zip(rows.column("key").to_pylist(), images, strict=True))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A list's folder, and a file beside it that is nobody's business."""
    put(tmp_path / "secret.jpg", b"secret")
    put(tmp_path / "lists-other" / "x.jpg", b"x")
    put(tmp_path / "lists" / "in" / "a.jpg", b"a")
    return tmp_path / "lists"


def write_rows(folder: Path, *rows: str) -> Path:
    return put(folder / "list.csv", "\n".join(("path", *rows)).encode())


@pytest.mark.parametrize(
    "row",
    [
        "../secret.jpg",
        "in/../../secret.jpg",
        "{up}/secret.jpg",
        "file://{up}/secret.jpg",
        "{up}/lists-other/x.jpg",  # shares the beginning of the name, not the folder
        "/etc/hostname",
    ],
)
def test_a_row_outside_the_folder_of_the_list_is_refused(folder: Path, row: str) -> None:
    path = write_rows(folder, "in/a.jpg", row.format(up=folder.parent))
    with pytest.raises(ValueError, match=r"list\.csv, line 3: .*outside.*--allow-prefix /"):
        read_list(path)


@pytest.mark.parametrize("row", ["in/a.jpg", "./in/a.jpg", "in/../in/a.jpg", "{here}/in/a.jpg"])
def test_a_row_inside_the_folder_needs_no_flag(folder: Path, row: str) -> None:
    row = row.format(here=folder)
    assert read_list(write_rows(folder, row)) == {row: b"a"}


def test_a_link_out_of_the_folder_is_refused_and_named_with_its_target(folder: Path) -> None:
    (folder / "link.jpg").symlink_to(folder.parent / "secret.jpg")
    with pytest.raises(ValueError, match=r"link\.jpg \(that is .*secret\.jpg\)"):
        read_list(write_rows(folder, "link.jpg"))


def test_a_linked_folder_that_leads_out_is_refused(folder: Path) -> None:
    (folder / "away").symlink_to(folder.parent)
    for row in ("away/secret.jpg", "in/../away/secret.jpg"):
        with pytest.raises(ValueError, match="outside"):
            read_list(write_rows(folder, row))


def test_links_inside_the_folder_are_followed(folder: Path) -> None:
    (folder / "link.jpg").symlink_to("in/a.jpg")
    assert read_list(write_rows(folder, "link.jpg")) == {"link.jpg": b"a"}


def test_a_list_below_a_linked_folder_is_inside_it(folder: Path) -> None:
    link = folder.parent / "link"
    link.symlink_to(folder)
    write_rows(folder, "in/a.jpg", f"{folder}/in/a.jpg")
    assert set(read_list(link / "list.csv").values()) == {b"a"}


@pytest.mark.parametrize("allowed", ["{up}", "{up}/", "file://{up}", "/", "{up}/lists/.."])
def test_allow_prefix_opens_a_folder(folder: Path, allowed: str) -> None:
    path = write_rows(folder, "in/a.jpg", "../secret.jpg")
    images = read_list(path, allow_prefix=(allowed.format(up=folder.parent),))
    assert images == {"in/a.jpg": b"a", "../secret.jpg": b"secret"}


def test_allow_prefix_may_be_a_link_or_relative_or_given_twice(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    (folder.parent / "other").symlink_to("lists-other")
    path = write_rows(folder, f"{folder.parent}/lists-other/x.jpg", "../secret.jpg")
    images = read_list(path, allow_prefix=("other", "secret.jpg"))
    assert sorted(images.values(), key=repr) == [b"secret", b"x"]


def test_allow_prefix_opens_no_more_than_its_folder(folder: Path) -> None:
    path = write_rows(folder, "../secret.jpg")
    with pytest.raises(ValueError, match="outside"):
        read_list(path, allow_prefix=(str(folder.parent / "sec"), "s3://bucket"))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("http://example.org/", "--allow-prefix: http://.* never fetched"),
        ("gopher://x/", "--allow-prefix: gopher://"),
        ("s3://", "--allow-prefix: .*no bucket"),
        ("s3://key:hush@bucket/x", "--allow-prefix: .*credentials"),
        ("", "--allow-prefix: an empty path"),
    ],
)
def test_a_prefix_that_cannot_be_allowed_is_refused(folder: Path, value: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        read_list(write_rows(folder, "in/a.jpg"), allow_prefix=(value,))
    assert "hush" not in str(caught.value)


def test_rows_with_http_are_refused_even_when_everything_is_allowed(folder: Path) -> None:
    path = write_rows(folder, "https://example.org/a.jpg")
    with pytest.raises(ValueError, match="line 2: https:// is never fetched"):
        read_list(path, allow_prefix=("/", "s3://bucket"))


@pytest.mark.parametrize(
    "row",
    [
        "s3://AKIA:hush@bucket/a.jpg",
        "s3://bucket/a.jpg?X-Amz-Signature=hush",
        "gs://bucket/a?access_key=hush",
    ],
)
def test_credentials_in_a_row_are_refused_and_not_shown(folder: Path, row: str) -> None:
    with pytest.raises(ValueError, match=r"line 2: .*credentials") as caught:
        read_list(write_rows(folder, row), allow_prefix=("s3://bucket", "gs://bucket"))
    assert "hush" not in str(caught.value)
    assert "AKIA" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("s3://bucket/a.jpg", "outside .* --allow-prefix s3://bucket$"),
        ("s3://bucket", "names no file"),
        ("s3:///a.jpg", "outside"),
        ("s3://allowed/../bucket/a.jpg", r"'\.\.'"),
        ("s3://allowed-too/a.jpg", "outside"),
        ("S3://allowed/a.jpg", "not supported"),
        ("ftp://host/a.jpg", "ftp:// is not supported"),
    ],
)
def test_uris_are_confined_by_whole_components(folder: Path, row: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_list(write_rows(folder, row), allow_prefix=("s3://allowed",))


def test_a_relative_row_stays_relative_to_a_list_whose_name_is_a_link(tmp_path: Path) -> None:
    real = put(tmp_path / "real" / "list.csv", b"path\na.jpg\n")
    put(tmp_path / "real" / "a.jpg", b"far")
    put(tmp_path / "near" / "a.jpg", b"near")
    (tmp_path / "near" / "list.csv").symlink_to(real)
    assert read_list(tmp_path / "near" / "list.csv") == {"a.jpg": b"near"}


def test_a_link_that_moved_between_two_listings_is_seen(folder: Path) -> None:
    inside = folder / "door"
    inside.symlink_to("in")
    path = write_rows(folder, "door/a.jpg")
    assert read_list(path) == {"door/a.jpg": b"a"}
    inside.unlink()
    inside.symlink_to(folder.parent / "lists-other")
    path = write_rows(folder, "door/x.jpg")
    with pytest.raises(ValueError, match="outside"):
        read_list(path)


def test_rows_with_odd_bytes_do_not_break_the_fence(folder: Path) -> None:
    loop = folder / "loop"
    os.symlink("loop", loop)
    image = read_list(write_rows(folder, "loop/a.jpg"))["loop/a.jpg"]
    assert isinstance(image, ImageError)
    assert image.error == "not_found"


@pytest.mark.parametrize("scheme", ["s3", "s3a", "s3n"])
def test_s3_may_be_called_as_hadoop_calls_it(folder: Path, scheme: str) -> None:
    allowed = make_allowed_paths(folder / "list.csv", [f"{scheme}://bucket/in/"])
    assert allowed.locate(f"{scheme}://bucket/in/s3a://a.jpg") == "s3://bucket/in/s3a://a.jpg"
    with pytest.raises(UsageError, match="outside"):
        allowed.locate(f"{scheme}://bucket/inside/a.jpg")
