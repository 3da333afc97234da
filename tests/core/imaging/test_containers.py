"""Files that hold images or stand for them are named, with what to do."""

from __future__ import annotations

import io
import struct
import tarfile
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cifake_ray.core.imaging.containers import explain_large, name_container
from cifake_ray.core.imaging.decode import decode_image
from cifake_ray.errors import ImageError


def make_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.jpg", b"image")
    return buffer.getvalue()


def make_tar(mode: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        archive.addfile(tarfile.TarInfo("a.jpg"))
    return buffer.getvalue()


def make_arrow(kind: str) -> bytes:
    buffer = io.BytesIO()
    table = pa.table({"image": [b"image"]})
    if kind == "parquet":
        pq.write_table(table, buffer)
    else:
        open_writer = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
        with open_writer(buffer, table.schema) as writer:
            writer.write_table(table)
    return buffer.getvalue()


def make_npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((2, 3)))
    return buffer.getvalue()


# The masked CRC-32C of the length 5, as TensorFlow's TFRecordWriter writes it before b"hello".
TFRECORD = struct.pack("<QI", 5, 0x3E04B2EA) + b"hello" + bytes(4)
LMDB = bytes(8) + struct.pack("<HHI", 0, 8, 0) + struct.pack("<II", 0xBEEFC0DE, 1) + bytes(4072)
FILES = {
    "git lfs pull": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7\nsize 12345\n",
    "git annex get": b"/annex/objects/MD5E-s1234--abc.jpg\n",
    "ZIP": make_zip(),
    "tar archive": make_tar("w"),
    "gzip": make_tar("w:gz"),
    "bzip2": make_tar("w:bz2"),
    "xz": make_tar("w:xz"),
    "Parquet": make_arrow("parquet"),
    "Arrow file": make_arrow("file"),
    "load_from_disk": make_arrow("stream"),
    "LMDB": LMDB,
    "TFRecord": TFRECORD,
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(100),
    "NumPy": make_npy(),
    "resource fork": b"\0\5\x16\7\0\2\0\0Mac OS X        ",
}


@pytest.mark.parametrize("name", FILES)
def test_a_container_is_named_in_its_row(name: str) -> None:
    with pytest.raises(ImageError) as info:
        decode_image(FILES[name])
    assert info.value.error == "not_an_image"
    assert name in info.value.detail


@pytest.mark.parametrize("data", [b"", b"\0" * 600, b"\xff" * 600, b"text " * 200])
def test_other_bytes_have_no_name(data: bytes) -> None:
    assert name_container(data) is None


@pytest.mark.parametrize("name", ["a/b.zip", "data.MDB", "x.tfrecord-00000-of-00010", "x.tar.gz"])
def test_one_that_is_too_large_to_read_is_named_by_its_suffix(name: str) -> None:
    assert "holds many images" in explain_large(name, 11, 10).detail
    assert explain_large("a.jpg", 11, 10).detail == "11 bytes; the limit is 10"
