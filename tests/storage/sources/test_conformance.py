"""What every kind of source promises (`storage.sources.source.Source`), tested on every kind."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import pickle
import threading
import time
import tracemalloc
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from source_kinds import (
    FsspecListKind,
    FsspecPrefixKind,
    FsspecTarKind,
    Image,
    InventoryKind,
    ListKind,
    LocalStore,
    MemoryStore,
    ParquetKind,
    S3ListKind,
    S3PrefixKind,
    S3Store,
    SourceKind,
    TarKind,
)
from write_manifest import write_manifest

from cifake_ray.core.schema import FAKE, IMAGE_ERRORS, MANIFEST_FIELDS, REAL
from cifake_ray.errors import ImageError, NothingToDo
from cifake_ray.storage.s3 import prefetch
from cifake_ray.storage.s3.listing import KeyLister
from cifake_ray.storage.sources import (
    folder,
    fsspec_prefix,
    held_images,
    key_batches,
    s3_prefix,
    tar,
)
from cifake_ray.storage.sources import source as source_module
from cifake_ray.storage.sources.source import Source

KINDS: dict[str, Callable[[Path, pytest.FixtureRequest], SourceKind]] = {
    "folder": lambda work, _: SourceKind(LocalStore(work / "set"), work),
    "s3 prefix": lambda work, use: S3PrefixKind(use_s3(use, "set #1?/50%20of them/"), work),
    "fsspec prefix": lambda work, _: FsspecPrefixKind(MemoryStore(), work),
    "list of files": lambda work, _: ListKind(LocalStore(work / "set"), work),
    "list of s3 uris": lambda work, use: S3ListKind(use_s3(use, "the set/"), work),
    "list of fsspec uris": lambda work, _: FsspecListKind(MemoryStore(), work),
    "s3 inventory": lambda work, use: InventoryKind(use_s3(use, ""), work),
    "parquet": lambda work, _: ParquetKind(LocalStore(work / "unused"), work),
    "tar": lambda work, _: TarKind(LocalStore(work / "set"), work),
    "tar on s3": lambda work, use: TarKind(use_s3(use, "set #1?/50%20of them/"), work),
    "tar by fsspec": lambda work, _: FsspecTarKind(MemoryStore(), work),
}

ODD_NAMES = [
    "_underscore.jpg",
    ".hidden.jpg",
    "..two-dots",
    "two  spaces .jpg",
    " leading.jpg",
    "per%20cent.jpg",
    "per cent.jpg",
    "100%.jpg",
    "%2F",
    "plus+plus.jpg",
    "hash#tag.jpg",
    "question?.jpg",
    "a&b;c=d,e@f:g$h!i(k)",
    "a*b[c]{d}.jpg",
    "<xml>&amp;",
    "~tilde",
    "s3:scheme.jpg",
    "nfc-\u00e9.jpg",
    "nfd-e\u0301.jpg",
    "\u65e5\u672c\u8a9e/\U0001f9ff.jpg",
    "\U0010ffff",
    "single'.jpg",
    'double".jpg',
    "back\\slash.jpg",
    "new\nline.jpg",
    "carriage\rreturn.jpg",
    "tab\t.jpg",
    "escape\x1b[31m.jpg",
    "control\x01\x1f\x7f",
    "right-to-left-\u202egpj.exe",
    "no extension",
    "notes.abc",
    "archive.parquet",
    "-rf",
    ".github/_deep/1/2/3/4/x.jpg",
    "x" * 246 + ".jpg",
]


def use_s3(request: pytest.FixtureRequest, prefix: str) -> S3Store:
    return S3Store(request.getfixturevalue("s3_env"), prefix)


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> SourceKind:
    return KINDS[request.param](tmp_path, request)


def need(kind: SourceKind, behaviour: str) -> None:
    if behaviour in kind.cannot:
        pytest.skip(kind.cannot[behaviour])


def numbered(count: int) -> list[Image]:
    return [Image(f"{number % 7}/{number:03d}.jpg", b"%03d" % number) for number in range(count)]


def gather(source: Source) -> pa.Table:
    return pa.Table.from_batches(list(source.list_images().batches))


def read_all(source: Source, rows: pa.Table | None = None) -> dict[str, bytes | str]:
    """The bytes, or the name of the error, of each key, in the order of the rows."""
    rows = gather(source) if rows is None else rows
    images = list(source.read_images(rows))
    keys = rows.column("key").to_pylist()
    assert len(set(keys)) == len(keys) == len(images)
    assert {image.error for image in images if isinstance(image, ImageError)} <= set(IMAGE_ERRORS)
    named = (image.error if isinstance(image, ImageError) else image for image in images)
    return dict(zip(keys, named, strict=True))


def list_in_small_batches(monkeypatch: pytest.MonkeyPatch, num_rows: int) -> None:
    monkeypatch.setattr(source_module, "LISTING_BATCH_ROWS", num_rows)
    monkeypatch.setattr(key_batches, "LISTING_BATCH_ROWS", num_rows)
    monkeypatch.setattr(tar, "LARGE_READ_BYTES", tar.SMALL_READ_BYTES)
    monkeypatch.setattr(s3_prefix, "KeyLister", partial(KeyLister, page_keys=num_rows))


class ByteReads:
    """Counts the calls of what gets bytes from a store, or refuses them."""

    def __init__(self, kind: SourceKind, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.is_allowed = 0, True
        owner, name = kind.byte_reader
        read = getattr(owner, name)

        def spy(*args: Any, **kwargs: Any) -> Any:
            assert self.is_allowed, f"{name} was called"
            self.count += 1
            return read(*args, **kwargs)

        monkeypatch.setattr(owner, name, spy)


# --- listing -------------------------------------------------------------------------------------


def test_odd_names_are_listed_and_read_byte_for_byte(kind: SourceKind) -> None:
    names = [f"FAKE/{name}" for name in ODD_NAMES if name not in kind.unstorable]
    kind.put(*(Image(name, name.encode()) for name in names))
    assert read_all(kind.open()) == {kind.key_of(name): name.encode() for name in names}


def test_a_listing_has_the_columns_of_the_manifest(kind: SourceKind) -> None:
    kind.put(Image("a.jpg", b"a"))
    listing = kind.open().list_images()
    (row,) = (row for batch in listing.batches for row in batch.to_pylist())
    assert list(row) == [field.name for field in MANIFEST_FIELDS]
    assert (row["key"], row["error"]) == (kind.key_of("a.jpg"), None)
    assert not +listing.left_out


def test_what_is_listed_in_parts_is_what_is_listed_at_once(
    kind: SourceKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    list_in_small_batches(monkeypatch, 3)
    kind.put(*numbered(40), Image("0/left-out.txt", b"text"))
    source = kind.open(include=("*.jpg",))
    whole = source.list_images()
    rows = pa.Table.from_batches(whole.batches)
    todo, batches, left_out = deque[Any]([None]), list[pa.RecordBatch](), Counter[str]()
    while todo:
        parts = todo.popleft()
        listing = source.list_images(parts, max_rows=1)
        batches += listing.batches
        left_out += listing.left_out
        todo += [[part] for part in json.loads(json.dumps(listing.left))]
    assert pa.Table.from_batches(batches).sort_by("key").equals(rows.sort_by("key"))
    assert left_out == whole.left_out


def test_sizes_are_known_when_listed(kind: SourceKind) -> None:
    need(kind, "sizes")
    kind.put(Image("empty.jpg", b""), Image("five.jpg", b"12345"))
    rows = gather(kind.open())
    sizes = zip(rows.column("key").to_pylist(), rows.column("size_bytes").to_pylist(), strict=True)
    assert dict(sizes) == {kind.key_of("empty.jpg"): 0, kind.key_of("five.jpg"): 5}


def test_label_split_and_source_come_from_the_path_or_the_columns(kind: SourceKind) -> None:
    kind.put(
        Image("train/FAKE/sdxl/a.jpg", b"a", "FAKE", "train", "sdxl"),
        Image("test/REAL/b.jpg", b"b", "REAL", "test", None),
        Image("c.jpg", b"c"),
    )
    facts = {
        row["key"]: (row["label"], row["split"], row["source"])
        for row in gather(kind.open()).to_pylist()
    }
    assert facts == {
        kind.key_of("train/FAKE/sdxl/a.jpg"): (FAKE, "train", "sdxl"),
        kind.key_of("test/REAL/b.jpg"): (REAL, "test", None),
        kind.key_of("c.jpg"): (None, None, None),
    }


def test_filters_leave_keys_out_and_count_them(kind: SourceKind) -> None:
    names = ("a.jpg", "b.JPG", "c.png", "deep/d.jpg", "deep/thumbs/e.jpg")
    kind.put(*(Image(name, b"x") for name in names))
    listing = kind.open(include=("*.jpg", "*.png"), exclude=("*thumbs*",)).list_images()
    keys = [key for batch in listing.batches for key in batch.column("key").to_pylist()]
    assert sorted(keys) == [kind.key_of(name) for name in ("a.jpg", "c.png", "deep/d.jpg")]
    # A folder with nothing to keep is not entered, where folders are listed one by one.
    assert sum(listing.left_out.values()) == 2
    assert set(+listing.left_out) <= {"excluded", "excluded folder"}


def test_a_glob_that_matches_a_folder_holds_for_all_below_it(kind: SourceKind) -> None:
    kind.put(*(Image(name, b"x") for name in ("a.jpg", "x/thumbs/deep/b.jpg", "y/c.jpg")))
    listing = kind.open(exclude=("*/thumbs", "*y/")).list_images()
    keys = [key for batch in listing.batches for key in batch.column("key").to_pylist()]
    assert keys == [kind.key_of("a.jpg")]


CLUTTER = {
    "REAL/._a.jpg": "system file",
    "REAL/.DS_Store": "system file",
    "REAL/Thumbs.db": "system file",
    "desktop.ini": "system file",
    "REAL/a.txt": "sidecar",
    "REAL/a.JSON": "sidecar",
    "metadata.csv": "sidecar",
    "annotations/a.xml": "sidecar",
    "labels.csv.gz": "sidecar",
    "README": "sidecar",
    "__MACOSX/REAL/a.jpg": "system folder",
    "REAL/@eaDir/a.jpg": "system folder",
    "REAL/.ipynb_checkpoints/a.jpg": "system folder",
    ".git/objects": "system folder",
    "REAL/IMG_0001.MOV": "video or sound",
    "REAL/.a.jpg.crc": "sidecar",
    "REAL/.picasaoriginals/a.jpg": "system folder",
    "REAL/@__thumb/a.jpg": "system folder",
    ".stfolder/a": "system folder",
    "_SUCCESS": "system file",
}


def test_clutter_is_left_out_and_counted(kind: SourceKind) -> None:
    need(kind, "clutter")
    kind.put(*(Image(name, b"x") for name in ("REAL/a.jpg", "thumbs", "txt", "a.zip", *CLUTTER)))
    listing = kind.open().list_images()
    keys = [key for batch in listing.batches for key in batch.column("key").to_pylist()]
    assert sorted(keys) == ["REAL/a.jpg", "a.zip", "thumbs", "txt"]
    counts = {reason.removeprefix("in a "): n for reason, n in (+listing.left_out).items()}
    assert counts == Counter(CLUTTER.values())


@pytest.mark.parametrize(
    ("glob", "key"),
    [("*.txt", "REAL/a.txt"), ("*/.git/*", "REAL/.git/a.jpg"), ("*/._*.jpg", "REAL/._a.jpg")],
)
def test_clutter_is_an_image_when_it_is_asked_for(kind: SourceKind, glob: str, key: str) -> None:
    need(kind, "clutter")
    kind.put(*(Image(name, b"x") for name in ("REAL/a.jpg", key)))
    assert list(read_all(kind.open(include=(glob,)))) == [key]


def test_metadata_beside_images_is_used_or_said_to_be_there(kind: SourceKind) -> None:
    need(kind, "clutter")
    kind.put(Image("set/a.jpg", b"x"), Image("set/metadata.csv", b"file_name,label\na.jpg,1\n"))
    listing = kind.open().list_images()
    labels = [label for batch in listing.batches for label in batch.column("label").to_pylist()]
    assert labels in ([FAKE], [None])
    note = listing.notes[0]
    assert "set/metadata.csv" in note
    assert "source" in note


def test_a_glob_of_images_does_not_ask_for_clutter(kind: SourceKind) -> None:
    need(kind, "clutter")
    kind.put(*(Image(name, b"x") for name in ("REAL/a.jpg", "REAL/._a.jpg", ".git/a.jpg")))
    assert list(read_all(kind.open(include=("*.jpg", "*")))) == ["REAL/a.jpg"]


def test_files_that_are_named_one_by_one_are_no_clutter(kind: SourceKind) -> None:
    if not isinstance(kind, ListKind | ParquetKind):
        pytest.skip("it lists whatever is there")
    kind.put(*(Image(name, name.encode()) for name in CLUTTER))
    assert read_all(kind.open()) == {kind.key_of(name): name.encode() for name in CLUTTER}


def test_a_filter_that_keeps_nothing_is_nothing_to_do(kind: SourceKind, tmp_path: Path) -> None:
    kind.put(Image("a.jpg", b"a"))
    with pytest.raises(NothingToDo, match=r"no file .*1 excluded"):
        write_manifest(tmp_path / "m", "run", kind.open(include=("*.png",)).list_images(), None)


def test_an_empty_source_is_nothing_to_do(kind: SourceKind, tmp_path: Path) -> None:
    with pytest.raises(NothingToDo):
        write_manifest(tmp_path / "m", "run", kind.open().list_images(), None)


def test_a_key_that_stands_twice_is_refused_by_name(kind: SourceKind, tmp_path: Path) -> None:
    need(kind, "duplicates")
    kind.put(*numbered(20), Image("1/008.jpg", b"008"))
    with pytest.raises(ValueError, match=r"twice.*1/008\.jpg"):
        write_manifest(tmp_path / "m", "run", kind.open().list_images(), None)


def test_more_keys_than_a_page_are_each_listed_once(
    kind: SourceKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    list_in_small_batches(monkeypatch, 5)
    images = numbered(60)
    kind.put(*images)
    batches = list(kind.open(shard_size=5).list_images().batches)
    assert max(batch.num_rows for batch in batches) <= 10
    keys = [key for batch in batches for key in batch.column("key").to_pylist()]
    assert sorted(keys) == sorted(kind.key_of(image.name) for image in images)


def test_the_same_listing_gives_the_same_manifest(kind: SourceKind, tmp_path: Path) -> None:
    kind.put(*numbered(40))
    listings = [kind.open().list_images() for _ in range(2)]
    first, second = (
        write_manifest(tmp_path / str(number), "run", listing, None)
        for number, listing in enumerate(listings)
    )
    assert first == second
    assert first.num_rows == 40


# --- reading -------------------------------------------------------------------------------------


def test_there_is_one_result_a_row_in_the_order_of_the_rows(kind: SourceKind) -> None:
    images = numbered(75)
    kind.put(*images)
    source = kind.open()
    rows = gather(source)
    rows = rows.take(pa.array(np.random.default_rng(0).permutation(rows.num_rows)))
    expected = {kind.key_of(image.name): image.data for image in images}
    assert read_all(source, rows) == {key: expected[key] for key in rows.column("key").to_pylist()}
    assert list(source.read_images(rows.slice(0, 0))) == []


def test_what_changed_or_went_after_the_listing_is_the_error_of_its_row_alone(
    kind: SourceKind,
) -> None:
    need(kind, "changes")
    for name in ("gone", "kept", "longer", "rewritten", "shorter"):
        kind.put(Image(name, b"12345"))
    source = kind.open()
    rows = gather(source)
    kind.store.write("longer", b"123456")
    kind.store.write("rewritten", b"54321")
    kind.store.write("shorter", b"")
    kind.store.remove("gone")
    expected = {
        "gone": "not_found",
        "kept": b"12345",
        "longer": "changed",
        "rewritten": "changed",
        "shorter": "changed",
    }
    results = read_all(source, rows)
    assert results == {kind.key_of(name): result for name, result in expected.items()}


def test_an_image_above_the_limit_is_too_large_and_its_neighbours_are_read(
    kind: SourceKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (folder, fsspec_prefix, held_images, prefetch, tar):
        monkeypatch.setattr(module, "MAX_IMAGE_BYTES", 10)
    kind.put(Image("exact", b"x" * 10), Image("large", b"x" * 11), Image("other", b""))
    source = kind.open()
    assert read_all(source) == {
        kind.key_of("exact"): b"x" * 10,
        kind.key_of("large"): "too_large",
        kind.key_of("other"): b"",
    }


def test_an_image_above_the_limit_is_not_read(
    kind: SourceKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    need(kind, "unread")
    for module in (folder, fsspec_prefix, held_images, prefetch, tar):
        monkeypatch.setattr(module, "MAX_IMAGE_BYTES", 10)
    kind.put(Image("large", b"x" * 11))
    source = kind.open()
    rows = gather(source)
    ByteReads(kind, monkeypatch).is_allowed = False
    assert list(read_all(source, rows).values()) == ["too_large"]


def test_no_more_is_read_ahead_than_is_allowed(
    kind: SourceKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fsspec_prefix, "NUM_FETCH_THREADS", 4)
    monkeypatch.setattr(folder, "NUM_READ_THREADS", 2)
    monkeypatch.setattr(folder, "READ_GROUP_SIZE", 2)
    monkeypatch.setattr(prefetch, "MAX_AHEAD", 8)
    kind.put(*numbered(60))
    source = kind.open()
    rows = gather(source)
    reads = ByteReads(kind, monkeypatch)
    images = source.read_images(rows)
    assert isinstance(next(images), bytes)
    time.sleep(0.3)  # for threads that would read on
    assert 1 <= reads.count <= 10
    assert len(list(images)) == 59


def test_a_source_that_is_left_half_way_keeps_no_thread_and_no_file(
    kind: SourceKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    list_in_small_batches(monkeypatch, 5)
    kind.put(*numbered(40))
    source = kind.open(shard_size=5)
    rows = gather(source)
    list(source.read_images(rows))  # what lasts as long as the process is there now
    before = set(find_files_and_threads())
    batches: Any = source.list_images().batches
    assert next(batches).num_rows
    batches.close()
    images: Any = source.read_images(rows)
    assert isinstance(next(images), bytes)
    images.close()
    deadline_s = time.monotonic() + 5
    while (left := set(find_files_and_threads()) - before) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert not left


def find_files_and_threads() -> Iterator[str]:
    """Files that are open and threads that run, but for the pool that a process has for S3."""
    for number in os.listdir("/proc/self/fd"):
        try:
            path = os.readlink(f"/proc/self/fd/{number}")
        except OSError:
            continue  # the listing's own
        if path.startswith("/") and not path.startswith(("/proc", "/dev")):
            yield path
    for thread in threading.enumerate():
        if not thread.name.startswith("s3"):
            yield f"{thread.name} {thread.ident}"


@pytest.fixture(scope="module")
def other_process() -> Iterator[ProcessPoolExecutor]:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        yield pool


def read_elsewhere(pickled: bytes, environment: dict[str, str]) -> dict[str, bytes | str]:
    os.environ.update(environment)
    source, rows = pickle.loads(pickled)
    return read_all(source, rows)


def test_a_source_is_pickled_without_secrets_and_reads_in_another_process(
    kind: SourceKind, other_process: ProcessPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    need(kind, "another process")
    caplog.set_level(logging.INFO)
    images = numbered(12)
    kind.put(*images)
    source = kind.open()
    rows = gather(source)
    expected = {kind.key_of(image.name): image.data for image in images}
    assert read_all(source, rows) == expected  # connections and files that are open do not travel
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    pickled = pickle.dumps((source, rows))
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"):
        assert environment.get(name, "no secret").encode() not in pickled
        assert environment.get(name, "no secret") not in repr(source) + caplog.text
    assert other_process.submit(read_elsewhere, pickled, environment).result(60) == expected


# --- memory --------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_listing(
    kind: SourceKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    list_in_small_batches(monkeypatch, 20)
    monkeypatch.setattr(s3_prefix, "LISTING_THREADS", 1)  # each holds a few pages

    def measure() -> int:
        source = kind.open(shard_size=20)
        tracemalloc.start()
        num_rows = sum(batch.num_rows for batch in source.list_images().batches)
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert num_rows == len(kind.images)
        return peak_bytes

    kind.put(*(Image(f"{n % 25:02d}/{'x' * 200}{n:04d}.jpg", b"") for n in range(200)))
    measure()  # what is imported and cached at the first time
    few = measure()
    kind.put(*(Image(f"{n % 25:02d}/{'x' * 200}{n:04d}.jpg", b"") for n in range(200, 1000)))
    assert measure() < few + 250_000  # 800 rows hold 350,000 and more
