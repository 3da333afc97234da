"""Sources that are no regular files, or hold such: never waited for, never read without end."""

from __future__ import annotations

import gzip
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from test_sources import gather
from wrong_values import WRONG_KINDS

from cifake_ray.config import ScoreConfig
from cifake_ray.errors import CifakeError, ImageError, UsageError
from cifake_ray.storage.sources.open_source import open_source
from cifake_ray.storage.sources.source import Source
from cifake_ray.storage.sources.text_table import MAX_FIELD_CHARS

NAMES = ["a.csv", "a.txt", "a.jsonl", "a.csv.gz", "a.parquet", "a.tar", "manifest.json", "a.png"]


def open_images(src: Path, **options: Any) -> Source:
    config = ScoreConfig(src=str(src), out="/nowhere/out", **options)
    return open_source(config, src, Path("/nowhere/out"))


@pytest.mark.parametrize("kind", WRONG_KINDS.values(), ids=WRONG_KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_given_as_a_source_may_be_no_file(
    tmp_path: Path, name: str, kind: Callable[[Path], Any]
) -> None:
    src = tmp_path / name
    kind(src)
    started_s = time.monotonic()
    try:
        source = open_images(src)
        for batch in source.list_images().batches:
            list(source.read_images(pa.Table.from_batches([batch])))
    except CifakeError:
        return
    # An empty folder, or a tar of zeros.
    assert src.is_dir() or name == "a.tar"
    assert time.monotonic() - started_s < 60


@pytest.mark.parametrize("line", [b"x", b'"', b"\0", b'{"path": "', b'{"a": [', b"["])
@pytest.mark.parametrize("name", ["a.csv", "a.txt", "a.jsonl", "a.csv.gz", "a.jsonl.gz"])
def test_a_line_without_end_ends_the_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, line: bytes
) -> None:
    """A few kilobytes of gzip are gigabytes of one line."""
    limit = "cifake_ray.storage.sources.text_table.MAX_FIELD_CHARS"
    monkeypatch.setattr(limit, MAX_FIELD_CHARS // 64)
    data = b"path\n" + line * (MAX_FIELD_CHARS // 32 // len(line))
    (tmp_path / name).write_bytes(gzip.compress(data, 1) if name.endswith("gz") else data)
    with pytest.raises(UsageError, match=f"{name}"):
        gather(open_images(tmp_path / name).list_images())


@pytest.mark.parametrize("follows", [False, True])
def test_a_folder_may_hold_anything(tmp_path: Path, follows: bool) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "good.png").write_bytes(b"image")
    os.mkfifo(folder / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "socket.png"))
    (folder / "device.png").symlink_to("/dev/zero")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "itself").symlink_to(".")
    (folder / "huge.png").touch()
    os.truncate(folder / "huge.png", 10 * 2**40)
    source = open_images(folder, follow_symlinks=follows)
    listing = source.list_images()
    rows = gather(listing)
    images = dict(zip(rows.column("key").to_pylist(), source.read_images(rows), strict=True))
    errors = {key: getattr(image, "error", None) for key, image in images.items()}
    assert errors == {"good.png": None, "huge.png": "too_large", "loop.png": "not_found"}
    assert listing.left_out["not a regular file"] == 3
    assert sum(listing.left_out.values()) == 4


@pytest.mark.parametrize("target", ["/dev/zero", "/proc/self/mem", "/proc/kmsg", "pipe"])
def test_a_list_may_name_anything(tmp_path: Path, target: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a.jsonl").write_text(json.dumps({"path": target}) + "\n")
    source = open_images(tmp_path / "a.jsonl", allow_prefix=("/dev", "/proc"))
    rows = gather(source.list_images())
    (image,) = source.read_images(rows)
    assert isinstance(image, ImageError) or image == b""


@pytest.mark.parametrize("grows", [True, False])
def test_a_file_that_changes_while_it_is_read_is_told(tmp_path: Path, grows: bool) -> None:
    (tmp_path / "a.png").write_bytes(b"image")
    source = open_images(tmp_path)
    rows = gather(source.list_images())
    status = (tmp_path / "a.png").stat()
    (tmp_path / "a.png").write_bytes(b"image and more" if grows else b"i")
    os.utime(tmp_path / "a.png", ns=(status.st_atime_ns, status.st_mtime_ns))
    (image,) = source.read_images(rows)
    assert isinstance(image, ImageError)
    assert image.error == "changed"
