"""Tars: every member once, whatever wrote the tar, and whatever happened to it since."""

from __future__ import annotations

import gzip
import io
import os
import random
import subprocess
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from faults.proxy import run_proxy
from s3_server import S3Server
from source_kinds import Image, LocalStore, MemoryStore, S3Store, Store, make_tar
from write_manifest import write_manifest

from cifake_ray.config import ConvertConfig
from cifake_ray.core.labels import split_file_name
from cifake_ray.core.schema import FAKE, IMAGE_ERRORS, REAL
from cifake_ray.errors import ImageError, NothingToDo, StorageError, UsageError
from cifake_ray.storage.s3.location import open_path
from cifake_ray.storage.sources.columns import ColumnChoice
from cifake_ray.storage.sources.folder import FolderSource
from cifake_ray.storage.sources.open_source import detect_kind, open_source
from cifake_ray.storage.sources.source import Source
from cifake_ray.storage.sources.tar import TarSource
from cifake_ray.storage.sources.tar_members import list_members

Row = dict[str, Any]
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def open_uri(uri: str, out: str = "/nowhere/out", **options: Any) -> Source:
    config = ConvertConfig(src=uri, out=out, **options)
    return open_source(config, open_path(config.src, config.store), Path(out))


def list_rows(source: Source) -> tuple[dict[str, Row], Counter[str]]:
    listing = source.list_images()
    rows = [row for batch in listing.batches for row in batch.to_pylist()]
    by_key = {row["key"]: row for row in rows}
    assert len(by_key) == len(rows)
    return by_key, +listing.left_out


def read_all(source: Source) -> dict[str, bytes | str]:
    rows = pa.Table.from_batches(list(source.list_images().batches))
    return read_rows(source, rows)


def read_rows(source: Source, rows: pa.Table) -> dict[str, bytes | str]:
    images = [i.error if isinstance(i, ImageError) else i for i in source.read_images(rows)]
    assert {image for image in images if isinstance(image, str)} <= set(IMAGE_ERRORS)
    return dict(zip(rows.column("key").to_pylist(), images, strict=True))


def put_tar(path: Path, *members: tuple[str, bytes] | tarfile.TarInfo, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return path


def make_link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


# --- the format ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("seed", range(3))
def test_members_lie_where_tarfile_finds_them(tmp_path: Path, form: str, seed: int) -> None:
    draw = random.Random(seed)
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=FORMATS[form]) as tar:
        for number in range(60):
            depth = draw.choice((0, 1, 5))
            name = "/".join(
                ["d\u00e9p\u00f4t" if number % 2 else "deep"] * depth + [f"{number}.jpg"]
            )
            if form != "ustar" and number % 7 == 0:
                name = "\u65e5" * 90 + name  # 270 bytes and more
            info = tarfile.TarInfo(name)
            info.size = draw.choice((0, 1, 511, 512, 513, 5000))
            info.mtime = 1.5 if form == "pax" and number % 3 else 1  # a header of its own
            info.uid = 2**22 if form != "ustar" else 0  # more than octal digits hold
            tar.addfile(info, io.BytesIO(draw.randbytes(info.size)))
            if number % 10 == 0:
                folder = tarfile.TarInfo(f"folder-{number}")
                folder.type = tarfile.DIRTYPE
                tar.addfile(folder)
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar if m.isfile()]
    found = list_members(lambda start, size: data[start : start + size], len(data))
    assert [(m.name, m.offset, m.size_bytes) for m in found if m.kind == "file"] == expected
    assert len(expected) == 60


def test_what_gnu_tar_and_its_options_write_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    names = ["a.jpg", "sub/b.png", "l" * 150 + ".jpg", "sp ace \u00fc.jpg"]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode() * 100)
    for form in ("v7", "ustar", "oldgnu", "gnu", "posix"):
        kept = names if form not in ("v7", "ustar") else [n for n in names if len(n) < 100]
        subprocess.run(
            ["tar", "-C", folder, f"--format={form}", "-cf", tmp_path / "x.tar", "--", *kept],
            check=True,
        )
        expected = {f"x.tar/{name}": name.encode() * 100 for name in kept}
        assert read_all(open_uri(str(tmp_path / "x.tar"))) == expected, form


def test_sparse_members_are_rows_that_say_so(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    with open(folder / "holes.jpg", "wb") as file:
        for number in range(40):  # more holes than one header of GNU has room for
            file.seek(number * 2**16)
            file.write(b"x" * 4096)
    (folder / "plain.jpg").write_bytes(b"plain")
    for form in ("oldgnu", "posix"):
        words = ["tar", "-C", folder, "--sparse", f"--format={form}", "-cf", tmp_path / "x.tar"]
        subprocess.run([*words, "holes.jpg", "plain.jpg"], check=True)
        expected = {"x.tar/holes.jpg": "format_not_allowed", "x.tar/plain.jpg": b"plain"}
        assert read_all(open_uri(str(tmp_path / "x.tar"))) == expected, form


def test_links_give_the_bytes_of_the_member_they_lead_to(tmp_path: Path) -> None:
    put_tar(
        tmp_path / "x.tar",
        make_link("before.jpg", "./sub/a.jpg", tarfile.SYMTYPE),
        ("sub/a.jpg", b"image"),
        make_link("hard.jpg", "sub/a.jpg", tarfile.LNKTYPE),
        make_link("sub/near.jpg", "a.jpg", tarfile.SYMTYPE),
        make_link("sub/up.jpg", "../sub/a.jpg", tarfile.SYMTYPE),
        make_link("lost.jpg", "nowhere.jpg", tarfile.LNKTYPE),
        make_link("out.jpg", "/etc/passwd", tarfile.SYMTYPE),
        make_link("pipe", "", tarfile.FIFOTYPE),
        make_link("device", "", tarfile.CHRTYPE),
    )
    source = open_uri(str(tmp_path / "x.tar"))
    names = ("before.jpg", "sub/a.jpg", "hard.jpg", "sub/near.jpg", "sub/up.jpg")
    expected = {f"x.tar/{name}": b"image" for name in names}
    assert read_all(source) == {**expected, "x.tar/lost.jpg": "not_found"}
    assert list_rows(source)[1] == {"not a regular file": 2, "link out of its tar": 1}


def test_names_are_kept_as_they_are_and_reach_no_file(tmp_path: Path) -> None:
    outside = tmp_path / "secret.jpg"
    outside.write_bytes(b"secret")
    names = ["../secret.jpg", str(outside), "./a.jpg", "a//b.jpg", "..", "x/../../y.jpg"]
    put_tar(tmp_path / "in" / "x.tar", *((name, b"member") for name in names))
    assert read_all(open_uri(str(tmp_path / "in"))) == {f"x.tar/{n}": b"member" for n in names}


def test_a_name_that_is_not_utf8_is_a_bad_key(tmp_path: Path) -> None:
    data = make_tar([Image("caf\u00e9.jpg", b"1"), Image("ok.jpg", b"2")], format=FORMATS["ustar"])
    bad = bytearray(data.replace("caf\u00e9".encode(), b"caf\xe9x"))
    bad[148:156] = b"%06o\0 " % (sum(bad[:148]) + 8 * 32 + sum(bad[156:512]))
    (tmp_path / "x.tar").write_bytes(bad)
    expected = {"x.tar/caf\\xe9x.jpg": "bad_key", "x.tar/ok.jpg": b"2"}
    assert read_all(open_uri(str(tmp_path))) == expected


# --- damage --------------------------------------------------------------------------------------


def test_a_tar_cut_anywhere_keeps_what_is_whole_and_says_that_there_was_more(
    tmp_path: Path,
) -> None:
    images = [Image(f"{number}.jpg", b"%d" % number * 700) for number in range(3)]
    data = make_tar(images)
    ends = [512 + number * 1536 + len(image.data) for number, image in enumerate(images)]
    for size in range(0, 3 * 1536 + 1, 128):
        (tmp_path / "x.tar").write_bytes(data[:size])
        results = read_all(open_uri(str(tmp_path)))
        whole = {
            f"x.tar/{i.name}": i.data for i, end in zip(images, ends, strict=True) if end <= size
        }
        assert results.items() >= whole.items()
        # No tar at all is an image like any other file: the decoder tells that it is none.
        others = {key: value for key, value in results.items() if key not in whole}
        if size < 512:
            assert others == {"x.tar": data[:size]}
        else:
            assert others.pop("x.tar") in ("truncated", "decode_failed")
            assert set(others.values()) <= {"truncated"}


def test_behind_a_damaged_header_the_others_are_found(tmp_path: Path) -> None:
    data = bytearray(make_tar([Image(f"{n}.jpg", b"%d" % n * 600) for n in range(4)]))
    header = data.index(b"1.jpg")
    data[header + 100] ^= 0xFF
    (tmp_path / "x.tar").write_bytes(data)
    results = read_all(open_uri(str(tmp_path), include=("*.jpg",)))
    assert results.pop("x.tar") == "decode_failed"  # whatever is included
    assert set(results) == {f"x.tar/{n}.jpg" for n in (0, 2, 3)}


def test_what_is_called_a_tar_and_is_none_is_a_row_like_any_file(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n" * 20
    (tmp_path / "pointer.tar").write_bytes(pointer)
    (tmp_path / "empty.tar").write_bytes(b"")
    (tmp_path / "gone.tar").symlink_to(tmp_path / "nowhere.tar")
    put_tar(tmp_path / "good.tar", ("a.jpg", b"a"))
    assert read_all(open_uri(str(tmp_path))) == {
        "empty.tar": b"",
        "gone.tar": "not_found",
        "good.tar/a.jpg": b"a",
        "pointer.tar": pointer,
    }


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (124, b"\x80" + b"\xff" * 11),  # a size of 2^88
        (124, b"\xff" * 12),  # a negative one
        (124, b"-0000000001\0"),
        (124, b"77777777777\0"),
        (156, b"x"),  # PAX records that are none
        (156, b"L"),
        (156, b"S"),
        (156, b"9"),
        (0, b"\0" * 100),
    ],
)
def test_hostile_headers_give_rows_and_no_trouble(tmp_path: Path, at: int, value: bytes) -> None:
    data = bytearray(make_tar([Image(f"{n}.jpg", b"x" * 100) for n in range(3)]))
    data[1024 + at : 1024 + at + len(value)] = value
    header = data[1024:1536]
    data[1024 + 148 : 1024 + 156] = b"%06o\0 " % (sum(header[:148]) + 256 + sum(header[156:]))
    (tmp_path / "x.tar").write_bytes(data)
    results = read_all(open_uri(str(tmp_path)))
    assert results["x.tar/0.jpg"] == b"x" * 100
    assert len(results) > 1  # the other members, or that they are lost


def test_changed_bytes_anywhere_give_rows_and_what_lies_before_them_is_untouched(
    tmp_path: Path,
) -> None:
    draw = random.Random(0)
    images = [Image(f"{n}/{'long/' * 30}a.jpg", draw.randbytes(200)) for n in range(4)]
    for form in FORMATS.values():
        data = make_tar(images, format=form)
        for _ in range(60):
            changed = bytearray(data)
            first = draw.randrange(len(data))
            for at in range(first, min(first + draw.choice((1, 4, 600)), len(data))):
                changed[at] = draw.randrange(256)
            (tmp_path / "x.tar").write_bytes(changed)
            results = read_all(open_uri(str(tmp_path)))
            for image in images:
                if data.index(image.data) + len(image.data) <= first:
                    assert results[f"x.tar/{image.name}"] == image.data


def test_tars_that_were_concatenated_are_read_to_the_end(tmp_path: Path) -> None:
    parts = [make_tar([Image(f"{number}.jpg", b"x")]) for number in range(3)]
    (tmp_path / "x.tar").write_bytes(b"".join(parts))
    assert read_all(open_uri(str(tmp_path))) == {f"x.tar/{n}.jpg": b"x" for n in range(3)}


def test_an_endless_tar_of_zeros_is_over_soon(tmp_path: Path) -> None:
    with open(tmp_path / "x.tar", "wb") as file:
        file.write(make_tar([Image("a.jpg", b"a")]))
        file.truncate(2**40)
    assert read_all(open_uri(str(tmp_path))) == {"x.tar/a.jpg": b"a"}


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar"])
def test_a_compressed_tar_is_refused_by_name_unless_it_is_excluded(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_bytes(gzip.compress(make_tar([Image("a.jpg", b"a")])))
    with pytest.raises(UsageError, match=rf"{name}: compressed by gzip.*decompress it"):
        list_rows(open_uri(str(tmp_path / name)))
    with pytest.raises(UsageError, match=r"--exclude"):
        list_rows(open_uri(str(tmp_path)))
    put_tar(tmp_path / "b.tar", ("b.jpg", b"b"))
    assert read_all(open_uri(str(tmp_path), exclude=(name,))) == {"b.tar/b.jpg": b"b"}


# --- samples and labels --------------------------------------------------------------------------


def test_sidecars_are_left_out_and_everything_else_is_a_row(tmp_path: Path) -> None:
    names = [
        *("0.cls", "0.jpg", "0.json", "0.txt"),
        *("1.left.jpg", "1.right.PNG", "1.depth.npy", "1.mask"),
        *("d/2.json", "d/2.webp", "d/._2.webp"),
        *("3", "4.strange", "metadata.csv", "5.txt"),
    ]
    put_tar(tmp_path / "x.tar", *((name, name.encode()) for name in names))
    images = ("0.jpg", "1.left.jpg", "1.right.PNG", "d/2.webp", "3", "4.strange")
    source = open_uri(str(tmp_path))
    assert read_all(source) == {f"x.tar/{name}": name.encode() for name in images}
    assert list_rows(source)[1] == {"sidecar": len(names) - len(images) - 1, "system file": 1}


@pytest.mark.parametrize(
    ("suffix", "data", "options", "label"),
    [
        ("cls", b"FAKE\n", {}, FAKE),
        ("cls", b"real", {}, REAL),
        ("cls", b"1", {}, None),  # a class of any kind
        ("cls", b"537", {}, None),
        ("cls", b"0", {"real_name": ("1",), "fake_name": ("0",)}, FAKE),
        ("cls", b"\xff\xfe", {}, None),
        ("cls", b"1", {"label_column": "cls"}, FAKE),
        ("cls", b"fake", {"label_column": "is_ai"}, None),
        ("json", b'{"cls": "fake"}', {"label_column": "cls"}, None),
        ("json", b'{"label": "Real"}', {}, REAL),
        ("json", b'{"label": 1}', {}, None),
        ("json", b'{"is_ai": 1, "label": "cat"}', {"label_column": "is_ai"}, FAKE),
        ("json", b'{"is_ai": false}', {"label_column": "is_ai"}, REAL),
        ("json", b'{"is_ai": 7}', {"label_column": "is_ai"}, None),
        (
            "json",
            b'{"made by": "Camera"}',
            {"label_column": "made by", "real_name": ("camera",)},
            REAL,
        ),
        ("json", b"[1, 2]", {}, None),
        ("json", b"{" * 5000, {}, None),
        ("json", b"[" * 60000, {}, None),
    ],
)
@pytest.mark.parametrize("is_first", [True, False])
def test_a_label_is_read_from_a_sidecar_if_it_means_real_or_fake(
    tmp_path: Path, suffix: str, data: bytes, options: Row, label: int | None, is_first: bool
) -> None:
    sample = [(f"7.{suffix}", data), ("7.jpg", b"image")]
    members = [*(sample if is_first else reversed(sample)), ("8.jpg", b"image")]
    put_tar(tmp_path / "train" / "0.tar", *members)
    rows, _ = list_rows(open_uri(str(tmp_path), **options))
    assert rows["train/0.tar/7.jpg"]["label"] == label
    assert rows["train/0.tar/8.jpg"]["label"] is None
    if label is not None:
        assert rows["train/0.tar/7.jpg"]["split"] == "train"


def test_numbers_that_are_not_taken_for_labels_are_told_with_the_remedy(tmp_path: Path) -> None:
    members = [(f"{n}.cls", str(n % 2).encode()) for n in range(4)] + [("9.json", b'{"label": 1}')]
    images = [(name.partition(".")[0] + ".jpg", b"image") for name, _ in members]
    put_tar(tmp_path / "0.tar", *sorted(members + images))
    source = open_uri(str(tmp_path))
    listing = source.list_images()
    list(listing.batches)
    told = [note for note in listing.notes if "--real-name 0 --fake-name 1" in note]
    assert [note.partition(", which")[0] for note in told] == [
        "4 images have 0 or 1 in their .cls",
        "1 images have 0 or 1 in their .json",
    ]
    rows, _ = list_rows(open_uri(str(tmp_path), real_name=("0",), fake_name=("1",)))
    assert [row["label"] for _, row in sorted(rows.items())] == [REAL, FAKE, REAL, FAKE, FAKE]


def test_a_sidecar_beats_the_path_and_leaves_its_split_and_source(tmp_path: Path) -> None:
    for folder in ("train/FAKE/sdxl", "train/FAKE"):
        put_tar(tmp_path / folder / "0.tar", ("1.cls", b"real"), ("1.jpg", b"1"), ("2.jpg", b"2"))
    rows, _ = list_rows(open_uri(str(tmp_path)))
    assert {key: (row["label"], row["split"], row["source"]) for key, row in rows.items()} == {
        "train/FAKE/sdxl/0.tar/1.jpg": (REAL, "train", "sdxl"),
        "train/FAKE/sdxl/0.tar/2.jpg": (FAKE, "train", "sdxl"),
        "train/FAKE/0.tar/1.jpg": (REAL, "train", None),
        "train/FAKE/0.tar/2.jpg": (FAKE, "train", None),
    }


@pytest.mark.parametrize(
    ("tar", "member", "facts"),
    [
        ("train/00000.tar", "FAKE/sdxl/a.jpg", (FAKE, "train", "sdxl")),
        ("train/FAKE/sdxl-00000.tar", "a.jpg", (FAKE, "train", "sdxl")),
        ("train-fake-00000-of-00002.tar", "a.jpg", (FAKE, "train", None)),
        ("val_real_001.tar", "a.jpg", (REAL, "val", None)),
        ("real.tar", "a.jpg", (REAL, None, None)),
        ("FAKE/00000.tar", "./n01440764/a.jpg", (FAKE, None, "n01440764")),
        ("unreal-engine.tar", "a.jpg", (None, None, None)),
        ("00000.tar", "a.jpg", (None, None, None)),
    ],
)
def test_tar_and_member_together_are_the_path_that_tells_the_label(
    tmp_path: Path, tar: str, member: str, facts: tuple[Any, ...]
) -> None:
    put_tar(tmp_path / "set" / tar, (member, b"a"))
    rows, _ = list_rows(open_uri(str(tmp_path / "set")))
    row = rows[f"{tar}/{member}"]
    assert (row["label"], row["split"], row["source"]) == facts


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("imagenet_midjourney-train-000.tar", ["imagenet_midjourney", "train"]),
        ("data/train-00000-of-00016.tar", ["data", "train"]),
        ("FLUX.1-dev-00003.tar", ["FLUX.1-dev"]),
        ("sd15_00001.tar", ["sd15"]),
        ("00000.tar.gz", []),
    ],
)
def test_the_words_of_a_tar_are_told_from_its_number(name: str, parts: list[str]) -> None:
    assert [part for part in split_file_name(name, {"fake": FAKE}) if part] == parts


# --- which folders are tars ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["00000.tar", "00000.parquet", "00000_stats.json"], "tar"),  # img2dataset
        (["train/00000.tar", "train/00001.tar", "README.md"], "tar"),
        (["data/train/a/00000.tar"], "tar"),
        (["a.tar.gz"], "tar"),
        (["0.jpg", "extra.tar"], "folder"),
        (["images/0.jpg", "extra.tar"], "folder"),
        (["train.parquet", "extra.tar"], "shards"),
        (["notes.txt"], "folder"),
    ],
)
@pytest.mark.parametrize("where", ["local", "memory", "s3"])
def test_a_folder_of_tars_is_recognised(
    tmp_path: Path, request: pytest.FixtureRequest, names: list[str], kind: str, where: str
) -> None:
    store = make_store(where, tmp_path, request)
    for name in names:
        store.write(name, b"data")
    config = ConvertConfig(src=store.uri, out="/nowhere/out")
    assert detect_kind(open_path(config.src, config.store), store.uri, ColumnChoice()) == kind


def make_store(where: str, work: Path, request: pytest.FixtureRequest) -> Store:
    if where == "s3":
        return S3Store(request.getfixturevalue("s3_env"), "shards/")
    return LocalStore(work / "set") if where == "local" else MemoryStore()


def test_what_lies_beside_the_tars_is_counted(tmp_path: Path) -> None:
    for number in range(3):
        put_tar(tmp_path / "set" / f"{number:05d}.tar", (f"{number}.jpg", b"x"))
        (tmp_path / "set" / f"{number:05d}.parquet").write_bytes(b"rows of img2dataset")
    (tmp_path / "set" / "latest.tar").symlink_to("/etc/hostname")
    rows, left_out = list_rows(open_uri(str(tmp_path / "set")))
    assert sorted(rows) == [f"{number:05d}.tar/{number}.jpg" for number in range(3)]
    assert left_out == {"not a tar": 3, "link out of the folder": 1}


def test_a_folder_without_tars_is_nothing_to_do(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.jpg").write_bytes(b"a")
    listing = open_uri(str(tmp_path / "set"), source_kind="tar").list_images()
    with pytest.raises(NothingToDo, match="1 not a tar"):
        write_manifest(tmp_path / "m", "run", listing, None)


# --- stores --------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["local", "memory", "s3"])
@pytest.mark.parametrize("is_one", [True, False])
def test_a_tar_that_changed_or_went_after_the_listing_is_the_error_of_its_rows(
    tmp_path: Path, request: pytest.FixtureRequest, where: str, is_one: bool
) -> None:
    store = make_store(where, tmp_path, request)
    tars = {f"{name}.tar": make_tar([Image("a.jpg", b"1"), Image("b.jpg", b"2")]) for name in "kcg"}
    for name, data in tars.items():
        store.write(name, data)
    uris = [f"{store.uri}/{name}" for name in tars] if is_one else [store.uri]
    results: dict[str, bytes | str] = {}
    listed = [(source, list(source.list_images().batches)) for source in map(open_uri, uris)]
    store.write("c.tar", tars["c.tar"].replace(b"1", b"7"))
    store.remove("g.tar")
    for source, batches in listed:
        results |= read_rows(source, pa.Table.from_batches(batches))
    assert results == {
        "k.tar/a.jpg": b"1",
        "k.tar/b.jpg": b"2",
        **dict.fromkeys(("c.tar/a.jpg", "c.tar/b.jpg"), "changed"),
        **dict.fromkeys(("g.tar/a.jpg", "g.tar/b.jpg"), "not_found"),
    }


@pytest.mark.parametrize(("size_bytes", "most_share"), [(2_000, 1.2), (3 * 2**20, 0.1)])
def test_a_store_is_asked_rarely_and_large_images_are_not_fetched_to_list_them(
    s3_env: S3Server,
    monkeypatch: pytest.MonkeyPatch,
    size_bytes: int,
    most_share: float,
) -> None:
    count = 8 * 2**20 // size_bytes * 3
    store = S3Store(s3_env, "set/")
    images = [Image(f"{n:05d}.jpg", os.urandom(size_bytes)) for n in range(count)]
    data = make_tar(images)
    store.write("0.tar", data)
    with run_proxy(s3_env.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        source = open_uri(store.uri)
        rows = pa.Table.from_batches(list(source.list_images().batches))
        assert rows.num_rows == count
        ranges = [seen.headers["Range"] for seen in proxy.seen if "Range" in seen.headers]
        assert sum(map(measure_range, ranges)) < most_share * len(data)
        assert len(ranges) <= max(count, 10) + 2
        proxy.seen.clear()
        assert list(source.read_images(rows)) == [image.data for image in images]
        assert len(proxy.seen) <= max(count, 10)


def measure_range(text: str) -> int:
    start, end = text.removeprefix("bytes=").split("-")
    return int(end) - int(start) + 1


def test_a_tar_that_changes_while_it_is_listed_ends_the_listing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put_tar(tmp_path / "set" / "x.tar", ("a.jpg", b"a"))
    source = open_uri(str(path.parent))
    scan = FolderSource.list_images

    def list_then_change(self: FolderSource) -> Any:
        listing = scan(self)
        batches = list(listing.batches)
        os.utime(path, ns=(1, 1))
        listing.batches = iter(batches)
        return listing

    monkeypatch.setattr(FolderSource, "list_images", list_then_change)
    with pytest.raises(StorageError, match=r"x\.tar: changed.*try again"):
        list_rows(source)


def test_rows_keep_the_order_of_their_tars_and_shards_are_as_large_as_asked(tmp_path: Path) -> None:
    for tar in range(40):  # more than are listed at once
        members = [(f"{number}.jpg", b"%d" % number) for number in reversed(range(7))]
        put_tar(tmp_path / f"{tar:02d}.tar", *members)
    source = open_uri(str(tmp_path), shard_size=16)
    assert isinstance(source, TarSource)
    listing = source.list_images()
    assert listing.keeps_order
    batches = list(listing.batches)
    assert [batch.num_rows for batch in batches] == [16] * 17 + [8]
    keys = [key for batch in batches for key in batch.column("key").to_pylist()]
    assert keys == [f"{tar:02d}.tar/{n}.jpg" for tar in range(40) for n in reversed(range(7))]


def test_a_run_that_listed_its_tars_as_files_gets_rows_and_no_trouble(tmp_path: Path) -> None:
    put_tar(tmp_path / "x.tar", ("a.jpg", b"a"))
    files = FolderSource(tmp_path, {}).list_images()
    rows = pa.Table.from_batches(list(files.batches))
    assert read_rows(open_uri(str(tmp_path)), rows) == {"x.tar": "not_an_image"}
