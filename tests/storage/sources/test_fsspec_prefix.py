"""Sources in a store that is neither local nor S3, told by fsspec's own store in memory."""

from __future__ import annotations

import io
import pickle
import secrets
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from upath import UPath

from cifake_ray.config import ConvertConfig
from cifake_ray.core.imaging.decode import MAX_IMAGE_BYTES
from cifake_ray.core.schema import IMAGE_ERRORS, MANIFEST_FIELDS
from cifake_ray.errors import ImageError, NothingToDo, StorageError
from cifake_ray.storage.io.paths import resolve_path
from cifake_ray.storage.sources import fsspec_prefix as stores
from cifake_ray.storage.sources.open_source import open_source
from cifake_ray.storage.sources.parquet import ParquetSource
from cifake_ray.storage.sources.source import Source


@pytest.fixture
def root() -> UPath:
    """A bucket of its own for each test."""
    return UPath(f"memory://bucket-{secrets.token_hex(4)}")


def put(place: UPath, data: bytes = b"bytes") -> None:
    place.fs.pipe_file(place.path, data)


def open_images(src: UPath | str, out: str = "/nowhere", **options: Any) -> Source:
    config = ConvertConfig(src=str(src), out=out, **options)
    return open_source(config, resolve_path(str(src)), resolve_path(out))


def list_rows(source: Source) -> pa.Table:
    return pa.Table.from_batches(list(source.list_images().batches), pa.schema(MANIFEST_FIELDS))


def read_all(src: UPath | str, **options: Any) -> dict[str, bytes | ImageError]:
    source = open_images(src, **options)
    rows = pa.Table.from_batches(list(source.list_images().batches))
    images = pickle.loads(pickle.dumps(source)).read_images(rows)  # as a worker gets it
    return dict(zip(rows.column("key").to_pylist(), images, strict=True))


def error_of(image: bytes | ImageError) -> str:
    assert isinstance(image, ImageError)
    assert image.error in IMAGE_ERRORS
    return image.error


def test_every_file_reads_its_own_bytes_in_the_order_of_the_rows(root: UPath) -> None:
    for number in range(100):  # more than are fetched at once
        put(root / "images" / f"{number}.jpg", f"{number}".encode())
    expected = {f"{number}.jpg": f"{number}".encode() for number in range(100)}
    assert read_all(root / "images") == expected
    assert read_all(f"{root}/images/") == expected
    assert read_all(root) == {f"images/{key}": data for key, data in expected.items()}


def test_a_file_that_became_a_folder_is_not_found(root: UPath) -> None:
    put(root / "images" / "a", b"12345")
    source = open_images(root / "images")
    rows = list_rows(source)
    (root / "images" / "a").unlink()
    put(root / "images" / "a" / "x")
    (image,) = source.read_images(rows)
    assert error_of(image) == "not_found"


class FailingStore(MemoryFileSystem):
    """Fails as stores do, by the name of the file."""

    protocol = "memory"
    cachable = False
    read: ClassVar[list[str]] = []

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        info = dict(super().info(path, **kwargs))
        if path.endswith("huge"):
            info["size"] = MAX_IMAGE_BYTES + 1
        return info

    def cat_file(self, path: str, *args: Any, **kwargs: Any) -> bytes:
        self.read.append(path.rpartition("/")[2])
        if path.endswith("denied"):
            raise PermissionError(13, "Forbidden")
        if path.endswith("broken"):
            raise TimeoutError("no answer")
        data: bytes = super().cat_file(path, *args, **kwargs)
        return data[:-1] if path.endswith("short") else data


def test_what_a_store_raises_becomes_the_error_of_its_row_alone(root: UPath) -> None:
    names = ["denied", "broken", "short", "huge", "fine", "missing"]
    for name in names[:-1]:
        put(root / name, b"12345")
    system = FailingStore()
    system.read.clear()
    path = root.path
    images = [
        stores.read_fsspec_file(system, f"memory:/{path}/{name}", None, None) for name in names
    ]
    assert images.pop(4) == b"12345"
    assert [error_of(image) for image in images] == [
        "denied",
        "io_network",
        "changed",
        "too_large",
        "not_found",
    ]
    assert "huge" not in system.read


def test_a_folder_that_cannot_be_listed_is_an_error_and_not_left_out(
    root: UPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(root / "images" / "a.jpg")
    put(root / "images" / "closed" / "b.jpg")
    source = open_images(root / "images")
    list_folder = MemoryFileSystem.ls

    def refuse_closed(system: MemoryFileSystem, path: str, *args: Any, **kwargs: Any) -> Any:
        if path.endswith("closed"):
            raise PermissionError(13, "Forbidden")
        return list_folder(system, path, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "ls", refuse_closed)
    with pytest.raises(StorageError, match="credentials"):
        list_rows(source)


def test_nothing_there_is_told_with_bucket_and_prefix(root: UPath) -> None:
    put(root / "images" / "a.jpg")
    for src in (f"{root}/image", f"{root}-other", f"{root}/images/a.jpg/"):
        with pytest.raises(NothingToDo, match=r"bucket-.* holds nothing below"):
            open_images(src)


def test_output_inside_the_source_is_refused(root: UPath) -> None:
    put(root / "images" / "a.jpg")
    for out in (f"{root}/images", f"{root}/images/out", f"{root}/images/"):
        with pytest.raises(ValueError, match="lies inside the source"):
            open_images(root / "images", out)
    for out in (f"{root}/images-out", str(root), f"{root}/other"):
        open_images(root / "images", out)


def test_a_file_of_another_kind_is_no_source(root: UPath) -> None:
    put(root / "images.zip")
    with pytest.raises(ValueError, match=r"images\.zip is one file, neither"):
        open_images(root / "images.zip")
    with pytest.raises(ValueError, match="needs a folder"):
        open_images(root / "images.zip", source_kind="folder")


def test_a_scheme_whose_package_is_missing_is_told() -> None:
    with pytest.raises(ValueError, match=r"az:// needs a package that is not installed"):
        open_images("az://container/images")


# --- lists and tables in a store -----------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["csv", "txt", "parquet"])
def test_a_list_in_a_store_names_files_beside_it(root: UPath, suffix: str) -> None:
    keys = ["set/a b.jpg", f"{root}/lists/set/c#d.jpg"]
    put(root / "lists" / "set" / "a b.jpg", b"ab")
    put(root / "lists" / "set" / "c#d.jpg", b"cd")
    sink = io.BytesIO()
    pq.write_table(pa.table({"path": keys}), sink)
    text = "\n".join(([] if suffix == "txt" else ["path"]) + keys).encode()
    put(root / "lists" / f"list.{suffix}", sink.getvalue() if suffix == "parquet" else text)
    images = read_all(root / "lists" / f"list.{suffix}")
    assert images == {keys[0]: b"ab", keys[1]: b"cd"}


def test_a_list_in_a_store_is_fenced(root: UPath, tmp_path: Path) -> None:
    put(root / "other" / "a.jpg", b"a")
    local = tmp_path / "b.jpg"
    local.write_bytes(b"b")
    rows = [f"{root}/other/a.jpg", str(local)]
    for row in rows:
        put(root / "lists" / "list.txt", row.encode())
        with pytest.raises(ValueError, match=r"line 1: .*--allow-prefix"):
            read_all(root / "lists" / "list.txt")
    put(root / "lists" / "list.txt", "\n".join(rows).encode())
    images = read_all(root / "lists" / "list.txt", allow_prefix=(f"{root}/other", str(tmp_path)))
    assert images == {rows[0]: b"a", rows[1]: b"b"}


def test_a_local_list_mixes_local_files_and_files_in_a_store(root: UPath, tmp_path: Path) -> None:
    rows = []
    for number in range(40):
        if number % 3:
            put(root / f"{number}", f"{number}".encode())
            rows.append(f"{root}/{number}")
        else:
            (tmp_path / f"{number}").write_bytes(f"{number}".encode())
            rows.append(f"{number}")
    put(root / "told", b"12345")
    rows += [f"{root}/missing", "missing"]
    (tmp_path / "list.txt").write_text("\n".join(rows))
    images = read_all(str(tmp_path / "list.txt"), allow_prefix=(str(root),))
    assert error_of(images.pop("missing")) == "not_found"
    assert error_of(images.pop(f"{root}/missing")) == "not_found"
    assert images == {row: row.rpartition("/")[2].encode() for row in rows[:-2]}


def test_sizes_that_a_list_tells_are_checked(root: UPath, tmp_path: Path) -> None:
    put(root / "a", b"12345")
    path = tmp_path / "list.csv"
    path.write_text(f"path,size_bytes,etag\n{root}/a,6,\n")
    assert error_of(read_all(str(path), allow_prefix=(str(root),))[f"{root}/a"]) == "changed"
    path.write_text(f"path,size_bytes,etag\n{root}/a,5,\n")
    assert read_all(str(path), allow_prefix=(str(root),)) == {f"{root}/a": b"12345"}
    path.write_text(f"path,size_bytes\n{root}/a,5 kB\n")
    with pytest.raises(ValueError, match="line 2: size_bytes '5 kB'"):
        read_all(str(path), allow_prefix=(str(root),))


def test_tables_in_a_store_are_found_and_read(root: UPath) -> None:
    for name, numbers in (("train-0.parquet", range(3)), ("deep/test-0.parquet", range(3, 5))):
        images = [{"bytes": f"{n}".encode(), "path": None} for n in numbers]
        sink = io.BytesIO()
        pq.write_table(pa.table({"image": images}), sink, row_group_size=2)
        put(root / "data" / name, sink.getvalue())
    put(root / "data" / "_hidden.parquet", b"")
    source = open_images(root / "data")
    assert isinstance(source, ParquetSource)
    assert read_all(root / "data") == {
        "deep/test-0.parquet#0": b"3",
        "deep/test-0.parquet#1": b"4",
        "train-0.parquet#0": b"0",
        "train-0.parquet#1": b"1",
        "train-0.parquet#2": b"2",
    }
    assert len(read_all(root / "data" / "train-0.parquet")) == 3


def test_a_damaged_table_in_a_store_is_named(root: UPath) -> None:
    put(root / "x.parquet", b"PAR1 nonsense")
    with pytest.raises(StorageError, match=r"x\.parquet"):
        open_images(root / "x.parquet")
