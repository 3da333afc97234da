"""Sources: what is an image, what its place says of it, and what reading it gives."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from write_manifest import write_manifest

from cifake_ray.config import ConvertConfig
from cifake_ray.core.processing.convert import ConvertProcessor
from cifake_ray.core.schema import FAKE, IMAGE_ERRORS, REAL, SHARD_FIELDS
from cifake_ray.errors import ImageError, StorageError, UsageError
from cifake_ray.storage.runs.manifest import read_manifest_shard
from cifake_ray.storage.runs.run_plan import RunPlan
from cifake_ray.storage.runs.shards import commit_shard
from cifake_ray.storage.sources import folder as folder_module
from cifake_ray.storage.sources import image_table, parquet
from cifake_ray.storage.sources.folder import read_local_file, read_local_files
from cifake_ray.storage.sources.open_source import open_source
from cifake_ray.storage.sources.source import Listing, Source

Row = dict[str, Any]


def open_images(src: Path, out: Path | None = None, **options: Any) -> Source:
    out = out or src.parent / "out"
    return open_source(ConvertConfig(src=str(src), out=str(out), **options), src, out)


def gather(listing: Listing) -> pa.Table:
    batches = list(listing.batches)
    return pa.Table.from_batches(batches)


def list_rows(src: Path, **options: Any) -> dict[str, Row]:
    rows = gather(open_images(src, **options).list_images()).to_pylist()
    by_key = {row["key"]: row for row in rows}
    assert len(by_key) == len(rows)
    return by_key


def read_all(src: Path, **options: Any) -> dict[str, bytes | ImageError]:
    source = open_images(src, **options)
    rows = gather(source.list_images())
    images = list(source.read_images(rows))
    return dict(zip(rows.column("key").to_pylist(), images, strict=True))


def error_of(image: bytes | ImageError) -> str:
    assert isinstance(image, ImageError)
    assert image.error in IMAGE_ERRORS
    return image.error


def put(path: Path, data: bytes = b"bytes") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def make_png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


# --- folders: names ------------------------------------------------------------------------------


def test_a_row_says_where_how_large_and_from_when(tmp_path: Path) -> None:
    path = put(tmp_path / "images" / "a.jpg", b"12345")
    os.utime(path, ns=(1, 1_700_000_000_123_456_789))
    (row,) = list_rows(tmp_path / "images").values()
    assert row["size_bytes"] == 5
    assert row["mtime_ns"] == 1_700_000_000_123_456_789
    assert row["location"] == "a.jpg"


def test_a_name_that_is_not_utf8_becomes_a_row_of_its_own(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path / "images" / "train" / "REAL")
    os.makedirs(folder)
    for name in (b"caf\xe9.jpg", b"caf\xe8.jpg", b"good.jpg"):
        with open(os.path.join(folder, name), "wb") as file:
            file.write(b"bytes")
    rows = list_rows(tmp_path / "images")
    bad = {key for key, row in rows.items() if row["error"] == "bad_key"}
    assert bad == {"train/REAL/caf\\xe9.jpg", "train/REAL/caf\\xe8.jpg"}
    assert {row["label"] for row in rows.values()} == {REAL}
    images = read_all(tmp_path / "images")
    assert {error_of(images[key]) for key in bad} == {"bad_key"}
    assert images["train/REAL/good.jpg"] == b"bytes"


def test_files_below_a_folder_that_is_not_utf8_become_rows(tmp_path: Path) -> None:
    folder = os.path.join(os.fsencode(tmp_path / "images"), b"FAKE", b"g\xff")
    os.makedirs(folder)
    with open(os.path.join(folder, b"a.jpg"), "wb") as file:
        file.write(b"bytes")
    assert [(k, r["error"], r["label"]) for k, r in list_rows(tmp_path / "images").items()] == [
        ("FAKE/g\\xff/a.jpg", "bad_key", FAKE)
    ]


# --- folders: what is no regular file ------------------------------------------------------------


def test_a_dangling_link_is_listed_and_not_found(tmp_path: Path) -> None:
    put(tmp_path / "images" / "a.jpg")
    (tmp_path / "images" / "link.jpg").symlink_to("nowhere")
    images = read_all(tmp_path / "images")
    assert set(images) == {"a.jpg", "link.jpg"}
    assert error_of(images["link.jpg"]) == "not_found"


def test_a_link_that_leads_to_itself_is_listed_and_not_found(tmp_path: Path) -> None:
    put(tmp_path / "images" / "a.jpg")
    (tmp_path / "images" / "loop.jpg").symlink_to("loop.jpg")
    assert error_of(read_all(tmp_path / "images")["loop.jpg"]) == "not_found"


def test_a_link_to_a_file_of_the_folder_is_an_image(tmp_path: Path) -> None:
    put(tmp_path / "images" / "real" / "a.jpg", b"linked")
    (tmp_path / "images" / "link.jpg").symlink_to("real/a.jpg")
    (tmp_path / "images" / "absolute.jpg").symlink_to(tmp_path / "images" / "real" / "a.jpg")
    assert read_all(tmp_path / "images") == {
        "real/a.jpg": b"linked",
        "link.jpg": b"linked",
        "absolute.jpg": b"linked",
    }


def test_a_link_out_of_the_folder_is_counted_and_not_followed(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    put(folder / "a.jpg")
    (folder / "absolute.jpg").symlink_to(put(tmp_path / "secret"))
    (folder / "relative.jpg").symlink_to("../images-beside/b.jpg")
    put(tmp_path / "images-beside" / "b.jpg")  # the folder's name is the beginning of this one
    (tmp_path / "hop").symlink_to(folder / "a.jpg")
    (folder / "out-and-in.jpg").symlink_to("../hop")
    listing = open_images(folder).list_images()
    assert set(gather(listing).column("key").to_pylist()) == {"a.jpg", "out-and-in.jpg"}
    assert listing.left_out == {"link out of the folder": 2}


def test_a_link_to_a_folder_is_counted_and_not_followed(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    put(folder / "real" / "a.jpg")
    (folder / "real" / "again").symlink_to(folder)
    (folder / "out").symlink_to(put(tmp_path / "outside" / "b.jpg").parent)
    listing = open_images(folder).list_images()
    assert gather(listing).column("key").to_pylist() == ["real/a.jpg"]
    assert listing.left_out == {"link to a folder": 2}


def test_links_are_followed_when_asked_and_loops_end(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    put(folder / "real" / "a.jpg", b"a")
    put(tmp_path / "outside" / "deep" / "b.jpg", b"b")
    (folder / "fake").symlink_to(tmp_path / "outside")
    (folder / "real" / "up").symlink_to("..")
    (tmp_path / "outside" / "deep" / "self").symlink_to(".")
    (folder / "file.jpg").symlink_to(tmp_path / "outside" / "deep" / "b.jpg")
    (folder / "gone.jpg").symlink_to("nowhere")
    listing = open_images(folder, follow_symlinks=True).list_images()
    keys = ["fake/deep/b.jpg", "file.jpg", "gone.jpg", "real/a.jpg"]
    assert sorted(gather(listing).column("key").to_pylist()) == keys
    assert listing.left_out == {"link to a folder above it": 2}
    images = read_all(folder, follow_symlinks=True)
    assert error_of(images.pop("gone.jpg")) == "not_found"
    assert images == {"fake/deep/b.jpg": b"b", "file.jpg": b"b", "real/a.jpg": b"a"}
    assert list_rows(folder, follow_symlinks=True)["fake/deep/b.jpg"]["label"] == FAKE


def list_apart(source: Source) -> tuple[pa.Table, Counter[str]]:
    """List a folder by a listing for each of the folders below it."""
    todo, batches, left_out = list[Any]([None]), list[pa.RecordBatch](), Counter[str]()
    while todo:
        listing = source.list_images(todo.pop(), max_rows=1)
        batches += listing.batches
        left_out += listing.left_out
        todo += [[part] for part in json.loads(json.dumps(listing.left))]
    return pa.Table.from_batches(batches), left_out


def test_loops_of_links_end_when_folders_are_listed_apart(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    put(folder / "a" / "1.jpg")
    put(folder / "a" / "deep" / "2.jpg")
    (folder / "a" / "deep" / "up").symlink_to("../..")
    (folder / "a" / "deep" / "self").symlink_to(".")
    rows, left_out = list_apart(open_images(folder, follow_symlinks=True))
    assert sorted(rows.column("key").to_pylist()) == ["a/1.jpg", "a/deep/2.jpg"]
    assert left_out == {"link to a folder above it": 2}


def test_metadata_above_a_folder_that_is_listed_apart(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    keys = ["0.jpg", "x/1.jpg", "x/y/2.jpg", "x/y/z/3.jpg", "w/4.jpg"]
    for key in keys:
        put(folder / key)
    top = [f"{key},{'real' if number % 2 else 'fake'}" for number, key in enumerate(keys)]
    (folder / "metadata.csv").write_text("\n".join(["file_name,label", *top]))
    (folder / "x" / "y" / "metadata.csv").write_text("file_name,label\nz/3.jpg,fake\n")
    source = open_images(folder)
    whole = gather(source.list_images())
    assert whole.column("label").null_count == 1  # x/y/2.jpg, which the nearest does not name
    rows, _ = list_apart(source)
    assert rows.sort_by("key").equals(whole.sort_by("key"))


def test_two_links_to_one_folder_are_two_sets_of_keys(tmp_path: Path) -> None:
    put(tmp_path / "outside" / "a.jpg", b"a")
    (tmp_path / "images").mkdir()
    for name in ("one", "two"):
        (tmp_path / "images" / name).symlink_to(tmp_path / "outside")
    images = read_all(tmp_path / "images", follow_symlinks=True)
    assert images == {"one/a.jpg": b"a", "two/a.jpg": b"a"}


@pytest.mark.parametrize("swapped", ["file", "folder", "link"])
def test_what_became_a_link_out_after_the_listing_is_denied(tmp_path: Path, swapped: str) -> None:
    secret = put(tmp_path / "secret" / "a.jpg", b"12345")
    path = put(tmp_path / "images" / "set" / "a.jpg", b"12345")
    if swapped == "link":
        os.rename(path, tmp_path / "images" / "b.jpg")
        path.symlink_to("../b.jpg")
    source = open_images(tmp_path / "images", include=("set/*",))
    rows = gather(source.list_images())
    for column in (path, secret):
        os.utime(column, ns=(7, 7))
    status = os.stat(secret)  # as like as the one that was listed
    rows = rows.set_column(
        rows.schema.get_field_index("mtime_ns"), "mtime_ns", pa.array([status.st_mtime_ns])
    )
    (image,) = source.read_images(rows)
    assert image == b"12345"
    path.unlink()
    if swapped == "folder":
        path.parent.rmdir()
        path.parent.symlink_to(secret.parent)
    else:
        path.symlink_to(secret)
    (image,) = source.read_images(rows)
    assert error_of(image) == "denied"
    (image,) = open_images(tmp_path / "images", follow_symlinks=True).read_images(rows)
    assert image == b"12345"


def test_a_folder_that_is_named_by_a_link_is_a_folder(tmp_path: Path) -> None:
    put(tmp_path / "images" / "a.jpg", b"a")
    (tmp_path / "link").symlink_to("images")
    assert read_all(tmp_path / "link") == {"a.jpg": b"a"}


def test_a_pipe_is_counted_and_never_opened(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    put(folder / "a.jpg")
    os.mkfifo(folder / "pipe.jpg")
    listing = open_images(folder).list_images()
    assert gather(listing).column("key").to_pylist() == ["a.jpg"]
    assert listing.left_out == {"not a regular file": 1}


def test_a_file_that_turned_into_a_pipe_does_not_block_reading(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    path = put(folder / "a.jpg")
    source = open_images(folder)
    rows = gather(source.list_images())
    path.unlink()
    os.mkfifo(path)
    (image,) = source.read_images(rows)
    assert error_of(image) in {"changed", "not_an_image"}


# --- folders: what real disks hold ---------------------------------------------------------------


def list_folder(src: Path, **options: Any) -> tuple[set[str], dict[str, int], list[str]]:
    """Keys, what was left out, and notes."""
    listing = open_images(src, **options).list_images()
    keys = {key for batch in listing.batches for key in batch.column("key").to_pylist()}
    return keys, dict(+listing.left_out), listing.notes


def test_folders_of_the_system_are_not_entered(tmp_path: Path) -> None:
    put(tmp_path / "disk" / "REAL" / "a.jpg")
    for name in ("lost+found", "REAL/@eaDir/a.jpg", ".Trash-1000", "REAL/.ipynb_checkpoints"):
        put(tmp_path / "disk" / name / "b.jpg").parent.chmod(0)
    assert list_folder(tmp_path / "disk") == ({"REAL/a.jpg"}, {"system folder": 4}, [])


@pytest.mark.parametrize(
    "options",
    [
        {"exclude": ("a/*", "*closed*")},
        {"exclude": ("a",)},
        {"exclude": ("a/",)},
        {"include": ("b/*", "bb.jpg")},
        {"include": ("b",)},
    ],
)
def test_excluded_folders_are_not_entered(
    tmp_path: Path, options: dict[str, tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "disk" / "a" / "deep" / "1.jpg")
    put(tmp_path / "disk" / "b" / "2.jpg")
    entered = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: entered.append(str(path)) or scandir(path))
    keys, left_out, _ = list_folder(tmp_path / "disk", source_kind="folder", **options)
    assert (keys, left_out) == ({"b/2.jpg"}, {"excluded folder": 1})
    assert entered == [str(tmp_path / "disk"), str(tmp_path / "disk" / "b")]


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOENT])
def test_a_folder_that_cannot_be_listed_is_counted_and_named_and_not_the_end(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("closed" * 20, "open"):
        put(tmp_path / "disk" / name / "a.jpg")
    refuse_scandir(monkeypatch, "closed", code)
    keys, left_out, notes = list_folder(tmp_path / "disk")
    assert (keys, left_out) == ({"open/a.jpg"}, {"unreadable folder": 1})
    (note,) = notes
    assert "closedclosed" in note
    assert os.strerror(code) in note
    assert len(note) < 160


@pytest.mark.parametrize(("name", "code"), [("disk", errno.EACCES), ("closed", errno.EIO)])
def test_a_root_that_cannot_be_listed_or_a_broken_disk_is_the_end(
    tmp_path: Path, name: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "disk" / "closed" / "a.jpg")
    put(tmp_path / "disk" / "a.jpg")
    refuse_scandir(monkeypatch, name, code)
    with pytest.raises(StorageError, match=os.strerror(code)):
        list_folder(tmp_path / "disk")


def refuse_scandir(monkeypatch: pytest.MonkeyPatch, name: str, code: int) -> None:
    scandir = os.scandir

    def scan(path: Path) -> Any:
        if Path(path).name.startswith(name):
            raise OSError(code, os.strerror(code))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)


# --- folders: reading ----------------------------------------------------------------------------


def test_a_file_of_another_time_or_kind_than_listed_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for name in ("touched", "replaced-by-folder"):
        put(folder / name, b"12345")
    source = open_images(folder)
    rows = gather(source.list_images())
    os.utime(folder / "touched", ns=(1, 1))
    (folder / "replaced-by-folder").unlink()
    (folder / "replaced-by-folder").mkdir()
    images = dict(zip(rows.column("key").to_pylist(), source.read_images(rows), strict=True))
    errors = {key: error_of(image) for key, image in images.items()}
    assert errors.pop("replaced-by-folder") in {"changed", "not_an_image"}
    assert errors == {"touched": "changed"}


def test_a_file_whose_folder_was_replaced_by_a_file_is_not_found(tmp_path: Path) -> None:
    path = put(tmp_path / "images" / "set" / "a.jpg")
    source = open_images(tmp_path / "images")
    rows = gather(source.list_images())
    path.unlink()
    path.parent.rmdir()
    put(path.parent)
    (image,) = source.read_images(rows)
    assert error_of(image) == "not_found"


# Runs as somebody whom permissions bind, which root is not.
READ_AS_NOBODY = """
import os, sys
from cifake_ray.storage.sources.folder import read_local_file
if os.getuid() == 0:
    os.setgid(65534); os.setuid(65534)
print(read_local_file("open.jpg"), read_local_file("closed.jpg").error)
"""


@pytest.mark.parametrize("num_slow", [3, 4])
def test_files_of_a_slow_disk_are_read_ahead_and_some_slow_reads_are_chance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_slow: int
) -> None:
    names = [f"{folder}/{number:02d}.jpg" for folder in "ab" for number in range(20)]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "a" / "05.jpg").unlink()
    (tmp_path / "b" / "07.jpg").unlink()
    (tmp_path / "b" / "07.jpg").symlink_to("08.jpg")
    readers, clock = [], iter(range(10**6))

    def read(path: str, *facts: Any) -> bytes | ImageError:
        readers.append(threading.current_thread() is threading.main_thread())
        return read_local_file(path, *facts)

    def tell_s() -> float:
        reads, is_end = divmod(next(clock), 2)
        return float(bool(is_end) and reads < num_slow)

    monkeypatch.setattr(folder_module, "read_local_file", read)
    monkeypatch.setattr(folder_module, "time", SimpleNamespace(perf_counter=tell_s))
    monkeypatch.setattr(folder_module, "SLOW_ROWS", 20)
    unknown = [None] * len(names)
    images = list(read_local_files(names, unknown, unknown, tmp_path, tmp_path))
    expected: list[Any] = [name.encode() for name in names]
    expected[5], expected[27] = "not_found", b"b/08.jpg"
    assert [i.error if isinstance(i, ImageError) else i for i in images] == expected
    assert readers.count(False) == (20 if num_slow == folder_module.MAX_SLOW_READS else 0)


def test_a_file_without_permission_is_denied(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    put(tmp_path / "open.jpg").chmod(0o644)
    put(tmp_path / "closed.jpg").chmod(0)
    process = subprocess.run(
        [sys.executable, "-c", READ_AS_NOBODY],
        cwd=tmp_path,  # the folders above it are closed to others, so paths start here
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert process.stdout.strip() == "b'bytes' denied", process.stderr


# --- folders: labels -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "label", "split", "source"),
    [
        ("ReAl/a.jpg", REAL, None, None),
        ("Training/extra/1_FAKE/a.jpg", FAKE, "train", "extra"),
        ("test/fake/SDXL 1.0/deep/a.jpg", FAKE, "test", "SDXL 1.0"),
        ("train/a.jpg", None, "train", None),
        ("surreal/a.jpg", None, None, None),
        ("REAL", None, None, None),  # a file of that name lies in no class folder
        ("a.jpg", None, None, None),
    ],
)
def test_folders_give_label_split_and_source(
    tmp_path: Path, key: str, label: int | None, split: str | None, source: str | None
) -> None:
    put(tmp_path / "images" / key)
    row = list_rows(tmp_path / "images")[key]
    assert (row["label"], row["split"], row["source"]) == (label, split, source)


def test_the_root_itself_is_no_class_folder(tmp_path: Path) -> None:
    put(tmp_path / "real" / "a.jpg")
    assert list_rows(tmp_path / "real")["a.jpg"]["label"] is None


def test_other_class_names_are_given_by_flag_in_any_case(tmp_path: Path) -> None:
    for key in ("nature/a", "Photo/b", "AI/glide/c", "REAL/d"):
        put(tmp_path / "images" / key)
    rows = list_rows(tmp_path / "images", real_name=("Nature", "photo"), fake_name=("ai",))
    assert {key: row["label"] for key, row in rows.items()} == {
        "nature/a": REAL,
        "Photo/b": REAL,
        "AI/glide/c": FAKE,
        "REAL/d": REAL,
    }
    assert rows["AI/glide/c"]["source"] == "glide"


def test_a_name_cannot_mean_both_classes(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(ValueError, match="'real' cannot mean both"):
        open_images(tmp_path / "images", fake_name=("real",))


# --- folders: metadata beside the images ---------------------------------------------------------


def put_metadata(folder: Path, name: str, text: str) -> tuple[dict[str, Any], list[str]]:
    """Label, split and source of each key of three images, and the notes."""
    for key in ("train/x/a.jpg", "train/b.jpg", "REAL/c.jpg"):
        put(folder / key)
    put(folder / name, text.encode())
    listing = open_images(folder).list_images()
    rows = gather(listing).to_pylist()
    return {r["key"]: (r["label"], r["split"], r["source"]) for r in rows}, listing.notes


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "train/metadata.csv",
            "file_name,text,label,source\nx/a.jpg,a cat,fake,sdxl\nb.jpg,a dog,0,\n",
        ),
        (
            "metadata.jsonl",
            '{"file_name": "train/x/a.jpg", "label": 1, "source": "sdxl"}\n'
            '{"file_name": "./train/b.jpg", "label": "REAL"}\n',
        ),
    ],
)
def test_metadata_beside_images_labels_them(tmp_path: Path, name: str, text: str) -> None:
    facts, notes = put_metadata(tmp_path / "images", name, text)
    assert facts == {
        "train/x/a.jpg": (FAKE, "train", "sdxl"),
        "train/b.jpg": (REAL, "train", None),
        "REAL/c.jpg": (REAL, None, None),
    }
    assert any(name in note for note in notes)
    assert any("FAKE" in note and "--real-name 1 --fake-name 0" in note for note in notes)


def test_names_of_classes_and_columns_hold_for_metadata(tmp_path: Path) -> None:
    put(tmp_path / "images" / "a.jpg")
    put(tmp_path / "images" / "metadata.csv", b"file_name,kind\na.jpg,Nature\n")
    rows = list_rows(tmp_path / "images", label_column="kind", real_name=("nature",))
    assert rows["a.jpg"]["label"] == REAL


def test_metadata_about_something_else_changes_nothing(tmp_path: Path) -> None:
    facts, _ = put_metadata(tmp_path / "a", "metadata.csv", "file_name,label\nREAL/c.jpg,cat\n")
    assert facts["REAL/c.jpg"] == (REAL, None, None)
    for text in ("file_name,text\nREAL/c.jpg,a cat\n", "id,label\n1,FAKE\n", 'file_name\n"x\n'):
        facts, notes = put_metadata(tmp_path / "b", "metadata.csv", text)
        assert facts["REAL/c.jpg"] == (REAL, None, None)
        assert len(notes) == 1
        assert notes[0].startswith("not used: ")
        assert "metadata.csv" in notes[0]


@pytest.mark.parametrize(("folder", "is_told"), [("images", True), ("FAKE", False)])
def test_a_table_beside_images_without_labels_is_named(
    tmp_path: Path, folder: str, is_told: bool
) -> None:
    for name in ("0.jpg", "1.jpg", "0.json", "notes.txt"):
        put(tmp_path / "set" / folder / name)
    put(tmp_path / "set" / "train.csv", b"filename,label\n0.jpg,1\n")
    listing = open_images(tmp_path / "set").list_images()
    listing.count_rows(describe=True)
    gather(listing)
    told = [note for note in listing.notes if "train.csv: beside the images" in note]
    assert len(told) == is_told
    assert listing.left_out["sidecar"] == 3


def test_metadata_that_is_a_link_out_of_the_folder_is_not_read(tmp_path: Path) -> None:
    put(tmp_path / "secret.csv", b"file_name,label\na.jpg,FAKE\n")
    put(tmp_path / "images" / "a.jpg")
    (tmp_path / "images" / "metadata.csv").symlink_to("../secret.csv")
    assert list_rows(tmp_path / "images")["a.jpg"]["label"] is None
    assert list_rows(tmp_path / "images", follow_symlinks=True)["a.jpg"]["label"] == FAKE


# --- folders: filters and refusals ---------------------------------------------------------------


def test_output_inside_the_source_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "images" / "a.jpg")
    for out in ("images", "images/out", "images/../images/out"):
        with pytest.raises(ValueError, match="lies inside the source"):
            open_images(tmp_path / "images", tmp_path / out)


def test_output_inside_the_source_by_way_of_a_link_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "images" / "a.jpg")
    (tmp_path / "link").symlink_to(tmp_path / "images")
    with pytest.raises(ValueError, match="lies inside the source"):
        open_images(tmp_path / "images", tmp_path / "link" / "out")


def test_output_beside_the_source_is_fine_even_with_its_name_as_beginning(tmp_path: Path) -> None:
    put(tmp_path / "images" / "a.jpg")
    open_images(tmp_path / "images", tmp_path / "images-out")


def test_a_source_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nowhere"):
        open_images(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"bytes", r"images\.zip is one file"), (b"PK\3\4", r"images\.zip is a ZIP archive.*unpack")],
)
def test_a_file_of_another_kind_is_no_source(tmp_path: Path, data: bytes, message: str) -> None:
    path = put(tmp_path / "images.zip", data)
    with pytest.raises(ValueError, match=message):
        open_images(path)


# --- lists ---------------------------------------------------------------------------------------


def write_list(tmp_path: Path, text: str | bytes, name: str = "list.csv") -> Path:
    return put(tmp_path / name, text if isinstance(text, bytes) else text.encode())


def test_a_csv_list_gives_keys_as_written_labels_and_sources(tmp_path: Path) -> None:
    put(tmp_path / "set" / "a.jpg", b"a")
    absolute = put(tmp_path / "elsewhere" / "b.jpg", b"b")
    path = write_list(
        tmp_path,
        "source,label,path,split\n"
        "coco,REAL,set/a.jpg,validation\n"
        f"sdxl,fake,{absolute},test\n"
        f",,file://{absolute},\n"
        ",1,./set/a.jpg,\n",
    )
    rows = list_rows(path)
    facts = {k: (r["label"], r["split"], r["source"]) for k, r in rows.items()}
    assert facts == {
        "set/a.jpg": (REAL, "val", "coco"),
        str(absolute): (FAKE, "test", "sdxl"),
        f"file://{absolute}": (None, None, None),
        "./set/a.jpg": (FAKE, None, None),
    }
    assert read_all(path) == {
        "set/a.jpg": b"a",
        str(absolute): b"b",
        f"file://{absolute}": b"b",
        "./set/a.jpg": b"a",
    }


@pytest.mark.parametrize("suffix", ["csv", "txt", "parquet"])
def test_paths_are_relative_to_the_list(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "lists" / "set" / "a.jpg", b"a")
    path = tmp_path / "lists" / f"list.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.table({"path": ["set/a.jpg", "gone.jpg"]}), path)
    else:
        head = "path\n" if suffix == "csv" else ""
        path.write_text(f"{head}set/a.jpg\ngone.jpg\n")
    monkeypatch.chdir("/")
    images = read_all(path)
    assert images["set/a.jpg"] == b"a"
    assert error_of(images["gone.jpg"]) == "not_found"


def test_columns_of_a_list_can_be_renamed(tmp_path: Path) -> None:
    path = write_list(tmp_path, "file,is_ai,generator\na.jpg,1,sdxl\n")
    row = list_rows(path, path_column="file", label_column="is_ai", source_column="generator")[
        "a.jpg"
    ]
    assert (row["label"], row["source"]) == (FAKE, "sdxl")


def test_a_list_without_its_path_column_says_which_columns_it_has(tmp_path: Path) -> None:
    path = write_list(tmp_path, "place,label\na.jpg,1\n")
    with pytest.raises(ValueError, match=r"'path'.*place, label.*--path-column"):
        list_rows(path)
    with pytest.raises(ValueError, match=r"only a\.jpg, real, train; put a line with names"):
        list_rows(write_list(tmp_path, "a.jpg,real,train\nb.jpg,fake,test\n"))


def test_a_list_without_a_label_column_says_which_columns_it_has(tmp_path: Path) -> None:
    listing = open_images(write_list(tmp_path, "path,kind\na.jpg,1\n")).list_images()
    gather(listing)
    assert any("only path, kind; --label-column" in note for note in listing.notes)


def test_an_image_as_text_is_no_path(tmp_path: Path) -> None:
    text = "/9j/" + "4AAQSkZJRg" * 1000
    with pytest.raises(UsageError, match=r"line 2: 10,004 characters .* are no path") as caught:
        list_rows(write_list(tmp_path, f"image,label\n{text},1\n"))
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("name", "split"),
    [("train.csv", "train"), ("my_testset.txt", "test"), ("list.csv", None), ("val.jsonl", "val")],
)
def test_the_split_of_a_list_is_in_its_name(tmp_path: Path, name: str, split: str | None) -> None:
    paths = ["a.jpg", "test/b.jpg"]
    lines = [json.dumps({"path": p}) if name == "val.jsonl" else p for p in paths]
    header = ["path"] if name.endswith(".csv") else []
    rows = list_rows(write_list(tmp_path, "\n".join(header + lines), name))
    assert [rows[path]["split"] for path in paths] == [split, "test"]  # never train on a test image


@pytest.mark.parametrize(("name", "label"), [("real.txt", REAL), ("generated.txt", None)])
def test_the_class_of_a_list_is_in_its_name(tmp_path: Path, name: str, label: int | None) -> None:
    rows = list_rows(write_list(tmp_path, "a.jpg\nfake/b.jpg\n", name))
    assert [row["label"] for row in rows.values()] == [label, FAKE]


@pytest.mark.parametrize("column", ["Split", "subset", "Set", "Usage"])
@pytest.mark.parametrize("is_metadata", [False, True])
def test_a_column_of_splits_may_have_another_name(
    tmp_path: Path, column: str, is_metadata: bool
) -> None:
    """What is no split in it is none, unless the column is called so."""
    put(tmp_path / "set" / "a.jpg")
    values = {"a.jpg": "Training", "b.jpg": "Test Set", "c.jpg": "celeba"}
    lines = [f"{name},{value}" for name, value in values.items()]
    text = "\n".join([f"file_name,{column}", *lines])
    for name in values:
        put(tmp_path / "set" / name)
    src = write_list(tmp_path / "set", text, "metadata.csv")
    rows = list_rows(tmp_path / "set" if is_metadata else src)
    is_split = column == "Split"
    assert [rows[name]["split"] for name in values] == [
        "train",
        "Test Set" if is_split else "test",
        "celeba" if is_split else None,
    ]


def test_an_empty_csv_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'path'"):
        list_rows(write_list(tmp_path, ""))


def test_a_label_that_means_nothing_is_unknown_and_that_is_told(tmp_path: Path) -> None:
    path = write_list(tmp_path, "path,label\na.jpg,REAL\nb.jpg,maybe\n")
    assert [row["label"] for row in list_rows(path).values()] == [REAL, None]
    listing = open_images(path).list_images()
    gather(listing)
    assert any("1 REAL, 1 unknown ('maybe')" in note for note in listing.notes)


def test_a_line_without_a_path_is_named(tmp_path: Path) -> None:
    path = write_list(tmp_path, "path,label\na.jpg,REAL\n,FAKE\n")
    with pytest.raises(ValueError, match=r"line 3: no path"):
        list_rows(path)


def test_a_scheme_in_a_list_that_is_not_supported_is_named_with_its_line(tmp_path: Path) -> None:
    path = write_list(tmp_path, "path\nhttp://example.org/a.jpg\n")
    with pytest.raises(ValueError, match=r"line 2: http://"):
        list_rows(path)


def test_a_path_with_a_zero_byte_is_named_with_its_line(tmp_path: Path) -> None:
    path = write_list(tmp_path, "path\na.jpg\nb\0.jpg\n")
    with pytest.raises(ValueError, match="line 3"):
        list_rows(path)


def test_a_ragged_row_is_named(tmp_path: Path) -> None:
    path = write_list(tmp_path, "path,label\na.jpg,REAL\nb, c.jpg,FAKE\n")
    with pytest.raises(ValueError, match="line 3: 3 values for 2 columns"):
        list_rows(path)


@pytest.mark.parametrize("name", ["list.csv", "list.txt"])
def test_a_list_that_is_not_utf8_is_refused(tmp_path: Path, name: str) -> None:
    path = write_list(tmp_path, b"path\ncaf\xe9.jpg\n", name)
    with pytest.raises(ValueError, match=r"not UTF-8"):
        list_rows(path)


@pytest.mark.parametrize("name", ["list.csv", "list.txt"])
def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path: Path, name: str) -> None:
    head = "path\r\n" if name.endswith("csv") else ""
    path = write_list(tmp_path, f"\ufeff{head}a.jpg\r\n\r\nb c.jpg\r\n", name)
    assert set(list_rows(path)) == {"a.jpg", "b c.jpg"}


def test_quotes_hold_commas_quotes_and_newlines(tmp_path: Path) -> None:
    put(tmp_path / "new\nline.jpg", b"newline")
    path = write_list(tmp_path, 'path,label\n"a,b.jpg",REAL\n"say ""hi"".jpg",1\n"new\nline.jpg",0')
    rows = list_rows(path)
    assert {k: r["label"] for k, r in rows.items()} == {
        "a,b.jpg": REAL,
        'say "hi".jpg': FAKE,
        "new\nline.jpg": REAL,
    }
    assert read_all(path)["new\nline.jpg"] == b"newline"


def test_a_quote_that_never_ends_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"list\.csv, line \d"):
        list_rows(write_list(tmp_path, 'path\n"a.jpg\nb.jpg\n'))


def test_spaces_and_odd_names_in_a_text_list_are_kept(tmp_path: Path) -> None:
    names = [" a.jpg", "b.jpg ", "c,d.jpg", '"e".jpg', "f\x85g.jpg", "h\u2028i.jpg"]
    for name in names:
        put(tmp_path / name, name.encode())
    path = write_list(tmp_path, "\n".join(names), "list.txt")
    assert read_all(path) == {name: name.encode() for name in names}


def test_extra_columns_are_carried_with_their_types(tmp_path: Path) -> None:
    columns = {
        "path": pa.array(["a.jpg", "b.jpg"]),
        "score_of_others": pa.array([0.5, None], pa.float32()),
        "width_cm": pa.array([1, 2], pa.uint8()),
        "taken": pa.array([0, 1], pa.timestamp("us", "UTC")),
        "title": pa.array(["one", "two"], pa.large_string()),
    }
    path = tmp_path / "list.parquet"
    pq.write_table(pa.table(columns), path)
    table = gather(open_images(path).list_images())
    for name in list(columns)[1:]:
        assert table.column(name).combine_chunks() == columns[name], name


def test_csv_columns_are_carried_as_text(tmp_path: Path) -> None:
    table = gather(open_images(write_list(tmp_path, "path,n\na,007\nb,\n")).list_images())
    assert table.column("n").to_pylist() == ["007", ""]


@pytest.mark.parametrize("name", ["p_fake", "error", "key", "image", "mtime_ns", "location"])
def test_an_extra_column_with_a_name_of_the_output_is_refused(tmp_path: Path, name: str) -> None:
    path = write_list(tmp_path, f"path,{name}\na.jpg,1\n")
    with pytest.raises(ValueError, match=f"'{name}'"):
        list_rows(path)


@pytest.mark.parametrize("name", ["hash", "shard", "bytes", "row_number", "file_name", ""])
def test_an_extra_column_of_any_other_name_reaches_the_manifest(tmp_path: Path, name: str) -> None:
    path = write_list(tmp_path, f"path,{name}\na.jpg,one\nb.jpg,two\n")
    manifest = write_manifest(tmp_path / "m", "run", open_images(path).list_images(), None)
    table = read_manifest_shard(tmp_path / "m", manifest.files[0], 0)
    assert dict(zip(*(table.column(n).to_pylist() for n in ("key", name)), strict=True)) == {
        "a.jpg": "one",
        "b.jpg": "two",
    }


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="same name"):
        list_rows(write_list(tmp_path, "path,x,x\na.jpg,1,2\n"))


def test_a_damaged_parquet_list_is_named(tmp_path: Path) -> None:
    path = write_list(tmp_path, b"PAR1 no", "list.parquet")
    with pytest.raises(StorageError, match=r"list\.parquet"):
        open_images(path)


# --- lists as other people write them ------------------------------------------------------------

FACTS = [("set/a b.jpg", REAL), ("set/c.jpg", FAKE)]
AS_WRITTEN = {
    "commas.csv": "path,label\nset/a b.jpg,REAL\nset/c.jpg,FAKE\n",
    "spaces.csv": "path, label\nset/a b.jpg, REAL\nset/c.jpg, FAKE\n",
    "spaces_around.csv": "label , path\nREAL , set/a b.jpg\nFAKE , set/c.jpg\n",
    "quotes_after_spaces.csv": 'label, "path"\n0, "set/a b.jpg"\n1, "set/c.jpg"\n',
    "spaces_in_values.csv": "path,label\nset/a b.jpg, REAL\nset/c.jpg, FAKE\n",
    "semicolons.csv": "path;label\nset/a b.jpg;0\nset/c.jpg;1\n",
    "tabs.tsv": "path\tlabel\nset/a b.jpg\treal\nset/c.jpg\tfake\n",
    "tabs.csv": "id\tpath\tlabel\n1\tset/a b.jpg\t0\n2\tset/c.jpg\t1\n",
    "bars.csv": "path|label\nset/a b.jpg|0\nset/c.jpg|1\n",
    "header.txt": "path,label\nset/a b.jpg,0\nset/c.jpg,1\n",
    "capitals.csv": "Path,Label\nset/a b.jpg,0\nset/c.jpg,1\n",
    "metadata.csv": "file_name,label\nset/a b.jpg,0\nset/c.jpg,1\n",
    "timm.txt": "set/a b.jpg 0\nset/c.jpg 1\n",
    "windows.txt": "set/a b.jpg 0\r\nset/c.jpg 1\r\n",
    "caffe.txt": "set/a b.jpg\t0\nset/c.jpg\t1",
    "commas.txt": "set/a b.jpg,0\nset/c.jpg,1\n",
    "names.txt": "set/a b.jpg real\nset/c.jpg fake\n",
    "no_header.csv": "set/a b.jpg,0\nset/c.jpg,1\n",
    "excel.csv": "sep=;\r\npath;label\r\nset/a b.jpg;0\r\nset/c.jpg;1\r\n",
    "lines.jsonl": '{"path": "set/a b.jpg", "label": 0}\n{"path": "set/c.jpg", "label": "FAKE"}\n',
    "metadata.jsonl": '{"file_name": "set/a b.jpg", "label": 0, "text": "x"}\n\n'
    '{"label": 1, "file_name": "set/c.jpg", "other": {"a": [1]}}\n',
    "backslashes.csv": "path,label\nset\\a b.jpg,0\nset\\c.jpg,1\n",
    "backslashes.txt": ".\\set\\a b.jpg 0\r\n.\\set\\c.jpg 1\r\n",
    "before.txt": "0 set/a b.jpg\n1 set/c.jpg\n",
    "words-before.txt": "REAL set/a b.jpg\nFake set/c.jpg\n",
    "before.csv": '0,"set/a b.jpg"\n1,"set/c.jpg"\n',
    "mxnet.lst": "0\t0.000000\tset/a b.jpg\n1\t1.000000\tset/c.jpg\n",
    "array.json": '[{"path": "set/a b.jpg", "label": "real"}, {"path": "set/c.jpg", "label": 1}]',
    "blank-end.csv": "path,label\nset/a b.jpg,0\nset/c.jpg,1\n   \n\t\n",
    "comma-end.csv": "path,label\nset/a b.jpg,0,\nset/c.jpg,1, \n",
    "img-name.csv": "id,img_name,Labels\n7,set/a b.jpg,0\n8,set/c.jpg,1\n",
    "image-path.csv": "ImagePath,label\nset/a b.jpg,0\nset/c.jpg,1\n",
}


@pytest.mark.parametrize("is_zipped", [False, True])
@pytest.mark.parametrize("name", AS_WRITTEN)
def test_lists_are_read_as_people_write_them(tmp_path: Path, name: str, is_zipped: bool) -> None:
    for path, _ in FACTS:
        put(tmp_path / path, path.encode())
    text = AS_WRITTEN[name].encode()
    src = write_list(tmp_path, gzip.compress(text) if is_zipped else text, name + ".gz" * is_zipped)
    labels = {k.replace("\\", "/"): row["label"] for k, row in list_rows(src).items()}
    assert {os.path.normpath(key): label for key, label in labels.items()} == dict(FACTS)
    assert list(read_all(src).values()) == [path.encode() for path, _ in FACTS]


def test_spaces_in_values_are_kept_where_the_header_has_none(tmp_path: Path) -> None:
    put(tmp_path / " a.jpg", b"a")
    assert read_all(write_list(tmp_path, "label,path\n0, a.jpg\n")) == {" a.jpg": b"a"}


def test_numbers_of_other_classes_are_no_labels_but_travel(tmp_path: Path) -> None:
    """ImageNet's lists are sorted by class, so the first ones look like REAL and FAKE."""
    lines = [f"n{number // 3}/{number}.JPEG {number // 3}" for number in range(30)]
    table = gather(open_images(write_list(tmp_path, "\n".join(lines), "val.txt")).list_images())
    assert table.column("label").null_count == 30
    assert table.column("class").to_pylist()[::3] == [str(number) for number in range(10)]


@pytest.mark.parametrize("names", [["a 1", "b 0"], ["a.b 1", "c.d 0"], ["x.jpg 1", "y.jpg 0"]])
def test_files_whose_names_look_like_a_path_and_a_label_are_files(
    tmp_path: Path, names: list[str]
) -> None:
    for name in names:
        put(tmp_path / name, name.encode())
    src = write_list(tmp_path, "\n".join(names), "list.txt")
    assert read_all(src) == {name: name.encode() for name in names}


def test_one_line_without_a_label_makes_all_of_them_paths(tmp_path: Path) -> None:
    src = write_list(tmp_path, "a.jpg 1\nb c.jpg\n", "list.txt")
    assert set(list_rows(src)) == {"a.jpg 1", "b c.jpg"}


def test_the_first_word_of_a_name_is_no_label(tmp_path: Path) -> None:
    for lines in (["my a.jpg", "his b.jpg"], ["0 a.jpg", "1 b.jpg", "2 c.jpg"]):
        assert set(list_rows(write_list(tmp_path, "\n".join(lines), "list.txt"))) == {*lines}


def test_a_file_with_a_backslash_in_its_name_is_that_file(tmp_path: Path) -> None:
    put(tmp_path / "set" / "a.jpg", b"other")
    put(tmp_path / "set\\a.jpg", b"this")
    assert read_all(write_list(tmp_path, "path\nset\\a.jpg\n")) == {"set\\a.jpg": b"this"}


def test_backslashes_do_not_lead_out_of_the_folder_of_the_list(tmp_path: Path) -> None:
    put(tmp_path / "secret.jpg")
    src = write_list(tmp_path / "lists", "path\n..\\secret.jpg\n")
    with pytest.raises(ValueError, match=r"line 2.*outside"):
        list_rows(src)


def test_a_path_of_another_windows_machine_is_told(tmp_path: Path) -> None:
    image = read_all(write_list(tmp_path, "path\nC:\\set\\a.jpg\n"))["C:\\set\\a.jpg"]
    assert error_of(image) == "not_found"
    assert isinstance(image, ImageError)
    assert "Windows" in image.detail


def test_a_chosen_column_beats_one_of_the_usual_name(tmp_path: Path) -> None:
    text = "id,label,label_str,source,path,generator\na,1,real,x,a.jpg,sdxl\n"
    listing = open_images(
        write_list(tmp_path, text), label_column="label_str", source_column="generator"
    ).list_images()
    (row,) = gather(listing).to_pylist()
    assert (row["label"], row["source"], row["id"]) == (REAL, "sdxl", "a")
    assert any(re.match("left out columns: label.*, source", note) for note in listing.notes)


def test_folders_say_what_a_list_has_no_column_for(tmp_path: Path) -> None:
    names = [str(tmp_path / "val/real/x.jpg"), "train/fake/sdxl/a.jpg", "./test/REAL/b.jpg"]
    src = write_list(tmp_path, "path\n" + "\n".join(names))
    facts = [(r["label"], r["split"], r["source"]) for r in list_rows(src).values()]
    assert facts == [(REAL, "val", None), (FAKE, "train", "sdxl"), (REAL, "test", None)]
    src = write_list(tmp_path, "path,label\ntrain/fake/a.jpg,REAL\ntrain/fake/b.jpg,\n")
    facts = [(r["label"], r["split"], r["source"]) for r in list_rows(src).values()]
    assert facts == [(REAL, "train", None), (None, "train", None)]


def test_folders_above_the_list_say_nothing(tmp_path: Path) -> None:
    src = write_list(tmp_path / "test" / "fake", "path\na.jpg\n")
    (row,) = list_rows(src).values()
    assert (row["label"], row["split"]) == (None, None)


def test_long_fields_are_read_and_travel(tmp_path: Path) -> None:
    src = write_list(tmp_path, f"path,workflow\na.jpg,{'x' * 2_000_000}\n")
    assert [len(row["workflow"]) for row in list_rows(src).values()] == [2_000_000]


@pytest.mark.parametrize(
    ("name", "written"),
    [("a b.jpg", "a%20b.jpg"), ("a%20b.jpg", "a%2520b.jpg"), ("100%.jpg", "100%.jpg")],
)
@pytest.mark.parametrize("host", ["", "localhost"])
def test_a_file_uri_is_decoded(tmp_path: Path, name: str, written: str, host: str) -> None:
    put(tmp_path / name, b"a")
    uri = f"file://{host}{tmp_path}/{written}"
    assert read_all(write_list(tmp_path, f"path\n{uri}\n")) == {uri: b"a"}


def test_a_file_uri_that_is_not_encoded_is_that_file(tmp_path: Path) -> None:
    put(tmp_path / "a%20b.jpg", b"a")
    uri = f"file://{tmp_path}/a%20b.jpg"
    assert read_all(write_list(tmp_path, f"path\n{uri}\n")) == {uri: b"a"}


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("list.jsonl", b'{"path": "a.jpg"}\nno\n', r"line 2: no JSON"),
        ("list.jsonl", b'["a.jpg"]\n', r"line 1: no JSON object"),
        ("list.jsonl", b'{"place": "a.jpg"}\n', r"'path'.*place.*--path-column"),
        ("list.json", b'{"images": []}', r"no array of objects.*jsonl"),
        ("list.json", b'["a.jpg"]', r"no array of objects.*jsonl"),
        ("list.json", b'[{"path": "a.jpg"', r"no JSON"),
        ("list.csv.gz", gzip.compress(b"path\na.jpg\n" * 99)[:-9], r"gzip"),
        ("list.csv.gz", b"path\na.jpg\n", r"gzip"),
        ("list.csv", b"version https://git-lfs.github.com/spec/v1\n", r"git lfs pull"),
        ("list.tsv", b"path\tlabel\na.jpg\n", r"line 2: 1 values for 2 columns.*tab"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_list_that_cannot_be_read_is_told(
    tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        list_rows(write_list(tmp_path, data, name))


# --- tables --------------------------------------------------------------------------------------


def test_row_groups_are_joined_to_shards_by_rows_and_by_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_hub_table(tmp_path / "hub.parquet", [0] * 8, None)
    group_bytes = pq.ParquetFile(path).metadata.row_group(0).total_byte_size
    for max_bytes, sizes in ((2**30, [8]), (group_bytes * 3 // 2, [4, 4]), (1, [2, 2, 2, 2])):
        monkeypatch.setattr(parquet, "MAX_SHARD_BYTES", max_bytes)
        batches = open_images(path).list_images().batches
        assert [batch.num_rows for batch in batches] == sizes


def test_a_row_group_that_arrow_cannot_read_at_once_is_read_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than 2 GiB of images."""
    path = write_hub_table(tmp_path / "hub.parquet", [0] * 4, None)
    source = open_images(path)
    rows = pa.Table.from_batches(source.list_images().batches)

    def refuse(*arguments: Any, **options: Any) -> None:
        raise pa.ArrowNotImplementedError("Nested data conversions not implemented")

    monkeypatch.setattr(image_table, "PIECE_ROWS", 1)
    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", refuse)
    assert list(source.read_images(rows)) == [make_png(n) for n in range(4)]


def write_hub_table(
    path: Path, labels: Sequence[int | None], names: Sequence[str] | None, **columns: Any
) -> Path:
    """A Parquet file as `datasets` writes it, with ClassLabel names in the given order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": make_png(n), "path": f"{n}.png"} for n in range(len(labels))]
    table = pa.table(
        {
            "image": pa.array(images, SHARD_FIELDS[1].type),
            "label": pa.array(labels, pa.int64()),
            **columns,
        }
    )
    if names is not None:
        features = {
            "image": {"_type": "Image"},
            "label": {"names": list(names), "_type": "ClassLabel"},
        }
        table = table.replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features}})}
        )
    pq.write_table(table, path, row_group_size=2)
    return path


def test_hub_labels_are_mapped_by_name_not_by_number(tmp_path: Path) -> None:
    write_hub_table(
        tmp_path / "hub" / "train-00000-of-00001.parquet", [0, 1, None], ["FAKE", "REAL"]
    )
    labels = [row["label"] for row in list_rows(tmp_path / "hub").values()]
    assert labels == [FAKE, REAL, None]


def test_numbers_without_class_names_are_taken_as_ours(tmp_path: Path) -> None:
    path = write_hub_table(tmp_path / "hub" / "x.parquet", [0, 1], None)
    assert [row["label"] for row in list_rows(path).values()] == [REAL, FAKE]


def test_the_hub_label_of_an_unlabelled_row_is_no_label(tmp_path: Path) -> None:
    """`datasets` writes -1 where a test label is kept secret."""
    path = write_hub_table(tmp_path / "hub" / "test.parquet", [-1, 0], ["REAL", "FAKE"])
    assert [row["label"] for row in list_rows(path).values()] == [None, REAL]


def test_a_hub_label_beyond_its_names_is_unknown(tmp_path: Path) -> None:
    path = write_hub_table(tmp_path / "hub" / "x.parquet", [0, 2], ["REAL", "FAKE"])
    assert [row["label"] for row in list_rows(path).values()] == [REAL, None]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00001.parquet", "train"),
        ("validation-00000-of-00001.parquet", "val"),
        ("test.parquet", "test"),
        ("part-00000.parquet", None),
    ],
)
def test_the_split_of_a_hub_file_is_in_its_name(
    tmp_path: Path, name: str, split: str | None
) -> None:
    write_hub_table(tmp_path / "hub" / "data" / name, [0], None)
    source = open_images(tmp_path / "hub", source_kind="shards")
    rows = gather(source.list_images()).to_pylist()
    assert [row["split"] for row in rows] == [split]


def test_rows_without_a_key_are_named_after_file_and_place(tmp_path: Path) -> None:
    for name in ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet"):
        write_hub_table(tmp_path / "hub" / name, [0, 1, 0], None)
    keys = list(list_rows(tmp_path / "hub", shard_size=1))
    names = [f"train-0000{file}-of-00002.parquet#{row}" for file in (0, 1) for row in (0, 1, 2)]
    assert keys == names
    assert list(read_all(tmp_path / "hub", shard_size=1).values()) == [
        make_png(n) for _ in (0, 1) for n in (0, 1, 2)
    ]


def test_a_single_hub_file_is_a_source(tmp_path: Path) -> None:
    path = write_hub_table(tmp_path / "x.parquet", [0, 1, 1], None)
    assert read_all(path) == {f"x.parquet#{n}": make_png(n) for n in range(3)}


def test_a_file_is_closed_when_its_images_are_read(tmp_path: Path) -> None:
    path = write_hub_table(tmp_path / "x.parquet", [0, 1, 0, 1, 0], None)
    source = open_images(path)
    rows = gather(source.list_images())
    assert list(source.read_images(rows.slice(2, 2))) == [make_png(2), make_png(3)]
    opened = [os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")]
    assert str(path) not in opened
    path.unlink()
    with pytest.raises(StorageError, match=r"x\.parquet"):
        list(source.read_images(rows))


def test_neighbouring_row_groups_make_a_shard(tmp_path: Path) -> None:
    path = write_hub_table(tmp_path / "x.parquet", [0] * 9, None)  # groups of 2, 2, 2, 2, 1
    listing = open_images(path, shard_size=3).list_images()
    assert listing.keeps_order
    assert [batch.num_rows for batch in listing.batches] == [4, 4, 1]


def test_extra_columns_of_a_table_are_carried(tmp_path: Path) -> None:
    path = write_hub_table(tmp_path / "x.parquet", [0, 1], None, prompt=["a cat", None])
    assert [row["prompt"] for row in list_rows(path).values()] == ["a cat", None]


def test_a_column_that_one_file_lacks_is_null_there(tmp_path: Path) -> None:
    write_hub_table(tmp_path / "hub" / "a.parquet", [0], None)
    write_hub_table(tmp_path / "hub" / "b.parquet", [0], None, prompt=["a cat"])
    assert [row["prompt"] for row in list_rows(tmp_path / "hub").values()] == [None, "a cat"]


def test_a_row_without_bytes_is_not_found(tmp_path: Path) -> None:
    values = [{"bytes": make_png(0), "path": None}, {"bytes": None, "path": "gone.png"}, None]
    images = pa.array(values, SHARD_FIELDS[1].type)
    pq.write_table(pa.table({"image": images}), tmp_path / "x.parquet")
    assert [error_of(image) for image in list(read_all(tmp_path / "x.parquet").values())[1:]] == [
        "not_found",
        "not_found",
    ]


def test_our_own_shards_come_back_with_keys_labels_and_errors(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    put(folder / "train" / "REAL" / "sdxl" / "a.png", make_png(1))
    put(folder / "test" / "FAKE" / "b.png", make_png(2))
    put(folder / "broken.png", b"no image")
    gone = put(folder / "gone.png", make_png(3))
    source = open_images(folder)
    run = RunPlan(
        out=tmp_path / "shards",
        command="convert",
        settings={},
        config={},
        list_source=source.list_images,
        shard_rows=None,
    ).open()
    gone.unlink()
    for shard in range(run.manifest.num_shards):
        rows = read_manifest_shard(run.manifest_folder, run.find_file(shard), shard)
        images = list(source.read_images(rows))
        commit_shard(run, shard, ConvertProcessor().finish(rows, images), {}, {})

    listed = list_rows(tmp_path / "shards")
    facts = {k: (r["label"], r["split"], r["source"]) for k, r in listed.items()}
    assert facts == {
        "train/REAL/sdxl/a.png": (REAL, "train", "sdxl"),
        "test/FAKE/b.png": (FAKE, "test", None),
        "broken.png": (None, None, None),
        "gone.png": (None, None, None),
    }
    again = read_all(tmp_path / "shards")
    assert again["train/REAL/sdxl/a.png"] == make_png(1)
    assert again["test/FAKE/b.png"] == make_png(2)
    assert error_of(again["broken.png"]) == "not_an_image"
    assert error_of(again["gone.png"]) == "not_found"
    assert isinstance(again["gone.png"], ImageError)
    assert again["gone.png"].detail == "the file is gone"
    assert set(list_rows(tmp_path / "shards" / "shards")) == set(listed)


def test_a_damaged_table_is_named_with_the_remedy(tmp_path: Path) -> None:
    path = write_hub_table(tmp_path / "hub" / "x.parquet", [0], None)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(StorageError, match=r"x\.parquet.*repair"):
        list_rows(tmp_path / "hub")


def test_a_table_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "hub" / "x.parquet")
    with pytest.raises(StorageError, match="no column with images, only text"):
        list_rows(tmp_path / "hub")
