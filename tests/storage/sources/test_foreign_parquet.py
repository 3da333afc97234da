"""Parquet files that other programs wrote: their columns, labels, splits and oddities."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.data_files import DataFilesDict, get_data_patterns
from test_sources import error_of, gather, make_png, open_images, put, read_all
from write_manifest import write_manifest

from cifake_ray.config import ScoreConfig, StoreConfig
from cifake_ray.core.imaging.decode import decode_image
from cifake_ray.core.labels import read_file_path
from cifake_ray.core.schema import FAKE, FOOTER_KEY, REAL
from cifake_ray.errors import CifakeError, StorageError, UsageError
from cifake_ray.storage.s3.location import open_path
from cifake_ray.storage.sources import image_table
from cifake_ray.storage.sources.list_file import ListFileSource
from cifake_ray.storage.sources.open_source import open_source
from cifake_ray.storage.sources.parquet import ParquetSource, find_splits
from cifake_ray.storage.sources.source import Listing, Source
from cifake_ray.storage.sources.table_stamps import stamp_table

NUM_ROWS = 6
IMAGES = [make_png(number) for number in range(NUM_ROWS)]
STRUCTS = [{"bytes": data, "path": f"{number}.png"} for number, data in enumerate(IMAGES)]
LABELS = [0, 1] * 3


def write(path: Path, features: Any = None, metadata: Any = None, **columns: Any) -> Path:
    """Write a Parquet file; `image` is a column of images unless another one is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"image": STRUCTS} | columns if "image" not in columns else columns)
    if features is not None:
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=4)
    return path


def class_label(*names: str) -> dict[str, Any]:
    return {"label": {"names": list(names), "_type": "ClassLabel"}}


def open_to_score(src: Path, **options: Any) -> Source:
    out = src.parent / "out"
    return open_source(ScoreConfig(src=str(src), out=str(out), **options), src, out)


def read_listing(source: Source) -> tuple[pa.Table, Listing]:
    listing = source.list_images()
    return gather(listing), listing


def list_column(source: Source, column: str = "label") -> list[Any]:
    return read_listing(source)[0].column(column).to_pylist()


# --- labels --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "names", "options", "labels"),
    [
        (LABELS, ("real", "ai"), {"fake_name": ("AI",)}, [REAL, FAKE] * 3),
        (
            LABELS,
            ("ai", "nature"),
            {"fake_name": ("ai",), "real_name": ("nature",)},
            [FAKE, REAL] * 3,
        ),
        (LABELS, ("0", "1"), {}, [REAL, FAKE] * 3),
        (LABELS, ("FAKE", "REAL"), {}, [FAKE, REAL] * 3),
        (LABELS, None, {"real_name": ("1",), "fake_name": ("0",)}, [FAKE, REAL] * 3),
        (
            [True, False] * 3,
            None,
            {"real_name": ("true",), "fake_name": ("false",)},
            [REAL, FAKE] * 3,
        ),
        ([0.0, 1.0, None] * 2, None, {}, [REAL, FAKE, None] * 2),
        ([0, 1, 2] * 2, None, {"fake_name": ("2",)}, [REAL, FAKE, FAKE] * 2),
        ([0, 1, 2] * 2, ("real", "synthetic", "tampered"), {}, [REAL, FAKE, None] * 2),
        ([0, 1, -1] * 2, ("real", "fake"), {}, [REAL, FAKE, None] * 2),
        (["human", "artificial"] * 3, None, {"real_name": ("human",)}, [REAL, None] * 3),
        ([b"real", b"FAKE "] * 3, None, {}, [REAL, FAKE] * 3),
        (pa.array(["real", "fake"] * 3).dictionary_encode(), None, {}, [REAL, FAKE] * 3),
        (pa.array(["real", "fake"] * 3, pa.large_string()), None, {}, [REAL, FAKE] * 3),
    ],
)
def test_labels_are_read_by_their_names(
    tmp_path: Path, values: Any, names: Any, options: Any, labels: list[int | None]
) -> None:
    features = None if names is None else class_label(*names)
    path = write(tmp_path / "set" / "a.parquet", features, label=values)
    for opened in (open_images(path, **options), open_to_score(path.parent, **options)):
        assert list_column(opened) == labels


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([0, 1, 2] * 2, ("cat", "dog", "car")),
        (["human", "nature"] * 3, None),
        ([2, 3] * 3, None),
        ([[0, 1]] * NUM_ROWS, None),
        ([{"a": 1}] * NUM_ROWS, None),
        (pa.array([1] * NUM_ROWS, pa.timestamp("ns")), None),
    ],
)
def test_scoring_needs_no_labels_and_converting_says_which_options_name_them(
    tmp_path: Path, values: Any, names: Any
) -> None:
    features = None if names is None else class_label(*names)
    path = write(tmp_path / "a.parquet", features, label=values)
    table, listing = read_listing(open_to_score(path))
    assert table.column("label").to_pylist() == [None] * NUM_ROWS
    assert "unknown" in listing.notes[-1]
    with pytest.raises(UsageError, match=r"no label is understood.*unknown.*--fake-name.*--drop"):
        list_column(open_images(path))
    assert list_column(open_images(path, drop_columns=("label",))) == [None] * NUM_ROWS


@pytest.mark.parametrize(
    ("values", "names", "options", "told"),
    [
        (LABELS, None, {}, ["3 REAL ('0')", "3 FAKE ('1')", "--real-name 1 --fake-name 0"]),
        (LABELS, ("0", "1"), {}, ["3 REAL ('0')", "3 FAKE ('1')", "--real-name 1 --fake-name 0"]),
        (LABELS, ("real", "fake"), {}, ["3 REAL, 3 FAKE"]),
        ([True, False] * 3, None, {}, ["3 FAKE ('True')", "--real-name true --fake-name false"]),
        ([0, 1, -1] * 2, None, {}, ["2 REAL", "2 without"]),
        ([0, 1, 7] * 2, None, {}, ["2 unknown ('7')", "--fake-name tell what other values mean"]),
        ([*"abcdefghijklmnopqrst"][:NUM_ROWS], None, {}, ["1 unknown ('a'), "]),
    ],
)
def test_what_labels_were_taken_for_is_told(
    tmp_path: Path, values: Any, names: Any, options: Any, told: list[str]
) -> None:
    features = None if names is None else class_label(*names)
    path = write(tmp_path / "a.parquet", features, label=values)
    note = read_listing(open_to_score(path, **options))[1].notes[-1]
    assert [part for part in told if part not in note] == []


def test_what_the_user_said_of_numbers_is_not_asked_again(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", label=LABELS)
    options = {"real_name": ("1",), "fake_name": ("0",)}
    assert "--real-name" not in read_listing(open_images(path, **options))[1].notes[-1]


def test_a_label_column_of_any_name_is_read_with_the_class_names_of_its_own(tmp_path: Path) -> None:
    features = {"Label_A": {"names": ["fake", "real"], "_type": "ClassLabel"}}
    path = write(tmp_path / "a.parquet", features, Label_A=LABELS, label=["x"] * NUM_ROWS)
    table, listing = read_listing(open_images(path, label_column="Label_A"))
    assert table.column("label").to_pylist() == [FAKE, REAL] * 3
    assert "label (the output has its own)" in listing.notes[0]


@pytest.mark.parametrize("names", [("Label", "Split", "Source"), ("labels", "SPLIT", "sources")])
def test_columns_are_found_in_any_case(tmp_path: Path, names: tuple[str, ...]) -> None:
    label, split, source = names
    features = {label: {"names": ["fake", "real"], "_type": "ClassLabel"}}
    values = {split: ["train", "Testing", None] * 2, source: ["sdxl"] * NUM_ROWS}
    path = write(tmp_path / "set" / "a.parquet", features, **{label: LABELS}, **values)
    for src in (path, path.parent):
        table = read_listing(open_images(src))[0]
        assert table.column("label").to_pylist() == [FAKE, REAL] * 3
        assert table.column("split").to_pylist() == ["train", "test", None] * 2
        assert table.column("source").to_pylist() == ["sdxl"] * NUM_ROWS
        assert not {*names} & {*table.column_names}


def test_a_column_of_splits_may_have_another_name(tmp_path: Path) -> None:
    write(tmp_path / "set" / "a.parquet", subset=["train", "Test", "celeba"] * 2)
    table = read_listing(open_images(tmp_path / "set"))[0]
    assert table.column("split").to_pylist() == ["train", "test", None] * 2
    assert "subset" in table.column_names
    assert find_splits(tmp_path / "set") == {"train", "test"}
    write(tmp_path / "b" / "a.parquet", set=[["train"]] * NUM_ROWS)
    assert list_column(open_images(tmp_path / "b"), "split") == [None] * NUM_ROWS


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("real.parquet", (REAL, None, None)),
        ("FAKE/sdxl/0000.parquet", (FAKE, None, "sdxl")),
        ("split=test/label=fake/part-0.parquet", (FAKE, "test", None)),
        ("fake-train-00001-of-00002.parquet", (FAKE, "train", None)),
    ],
)
def test_without_columns_the_path_of_a_file_tells_label_split_and_source(
    tmp_path: Path, name: str, facts: tuple[int | None, str | None, str | None]
) -> None:
    write(tmp_path / "set" / name)
    table, listing = read_listing(open_images(tmp_path / "set"))
    found = zip(*(table.column(c).to_pylist() for c in ("label", "split", "source")), strict=True)
    assert set(found) == {facts}
    assert not any("no labels" in note for note in listing.notes)
    write(tmp_path / "set" / name, label=[1 - (facts[0] or 0)] * NUM_ROWS)
    assert set(list_column(open_images(tmp_path / "set"))) == {1 - (facts[0] or 0)}


def test_converting_without_a_label_column_says_which_columns_there_are(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", is_ai=LABELS)
    assert "only image, is_ai; --label-column" in read_listing(open_images(path))[1].notes[-1]
    assert read_listing(open_to_score(path))[1].notes == []


@pytest.mark.parametrize("option", ["label_column", "source_column", "image_column"])
@pytest.mark.parametrize("name", ["gone", "Image.x"])
def test_an_option_that_names_no_column_is_refused_with_those_there_are(
    tmp_path: Path, option: str, name: str
) -> None:
    write(tmp_path / "set" / "a.parquet", is_ai=LABELS)
    with pytest.raises(
        UsageError, match=f"--{option.replace('_', '-')} {name}: .*only image.*, is_ai"
    ):
        list_column(open_images(tmp_path / "set", **{option: name}))


# --- the column of images ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["image", "Image", "img", "jpg", "png", "bytes", "content", "a.b"])
@pytest.mark.parametrize(
    "values",
    [
        STRUCTS,
        IMAGES,
        pa.array(IMAGES, pa.large_binary()),
        pa.array(IMAGES).dictionary_encode(),
        [None, *STRUCTS[1:]],
        pa.array([list(data) for data in IMAGES], pa.list_(pa.uint8())),
    ],
    ids=["struct", "binary", "large_binary", "dictionary", "null_first", "list_of_bytes"],
)
def test_the_only_column_with_images_is_found(tmp_path: Path, name: str, values: Any) -> None:
    columns = {"caption": ["x"] * NUM_ROWS, "phash": [b"12345678"] * NUM_ROWS, name: values}
    (tmp_path / "set").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "set" / "a.parquet")
    for src in (tmp_path / "set", tmp_path / "set" / "a.parquet"):
        assert [*read_all(src).values()][1:] == IMAGES[1:]


def test_of_several_columns_with_images_one_must_be_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", **{"image": ["x"] * NUM_ROWS})
    pq.write_table(pa.table({"real": IMAGES, "fake": IMAGES[::-1]}), path)
    with pytest.raises(UsageError, match="real, fake; choose one with --image-column"):
        open_images(path)
    assert [*read_all(path, image_column="fake").values()] == IMAGES[::-1]


def test_image_is_the_column_even_beside_others(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", mask=IMAGES[::-1])
    assert [*read_all(path).values()] == IMAGES
    assert [*read_all(path, image_column="mask").values()] == IMAGES[::-1]


def test_a_column_that_holds_no_images_cannot_be_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", size=[1] * NUM_ROWS)
    with pytest.raises(UsageError, match="--image-column size holds int64, no images"):
        open_images(path, image_column="size")


@pytest.mark.parametrize("as_struct", [False, True])
@pytest.mark.parametrize("name", ["image", "Image"])
def test_a_column_of_paths_is_a_list_relative_to_its_file(
    tmp_path: Path, as_struct: bool, name: str
) -> None:
    """`datasets` writes a struct without bytes where it does not embed the files."""
    for folder in ("train", "test"):
        paths = [f"{folder}-{number}.png" for number in range(NUM_ROWS)]
        for number, path in enumerate(paths[:-1]):
            put(tmp_path / "set" / folder / path, IMAGES[number])
        values = [{"bytes": None, "path": path} for path in paths] if as_struct else paths
        table = pa.table({name: values, "label": LABELS})
        pq.write_table(table, tmp_path / "set" / folder / "0000.parquet")
    source = open_images(tmp_path / "set", source_kind="shards")
    rows = gather(source.list_images())
    images = dict(zip(rows.column("key").to_pylist(), source.read_images(rows), strict=True))
    assert error_of(images.pop("test-5.png")) == error_of(images.pop("train-5.png")) == "not_found"
    assert images["train-2.png"] == images["test-2.png"] == IMAGES[2]
    facts = {row["key"]: (row["label"], row["split"]) for row in rows.to_pylist()}
    assert (facts["train-1.png"], facts["test-2.png"]) == ((FAKE, "train"), (REAL, "test"))
    assert isinstance(open_images(tmp_path / "set" / "test" / "0000.parquet"), ListFileSource)


def test_a_path_column_is_that_of_the_list(tmp_path: Path) -> None:
    put(tmp_path / "a.png", IMAGES[0])
    table = pa.table({"path": ["a.png"], "image": ["an id"], "phash": [b"1234"]})
    pq.write_table(table, tmp_path / "list.parquet")
    with pytest.raises(UsageError, match="'image' has a name that the output uses"):
        read_all(tmp_path / "list.parquet")
    images = read_all(tmp_path / "list.parquet", drop_columns=("image",))
    assert images == {"a.png": IMAGES[0]}


@pytest.mark.parametrize(("mode", "channels"), [(0, 1), (16, 3), (24, 4)])
def test_the_raw_pixels_of_spark_are_images(tmp_path: Path, mode: int, channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, channels), np.uint8)
    pixels[:, :, 3:] = 255
    good = {"origin": "a", "height": 5, "width": 7, "nChannels": channels, "mode": mode}
    rows = [
        good | {"data": pixels.tobytes()},
        good | {"data": pixels.tobytes()[:-1]},
        good | {"data": b"", "mode": -1, "height": -1, "width": -1},
        good | {"data": None},
        good | {"data": pixels.tobytes(), "height": -5, "width": -7},
        None,
    ]
    path = write(tmp_path / "set" / "a.parquet", image=rows)
    first, *others = read_all(path.parent).values()
    assert isinstance(first, bytes)
    rgb = np.broadcast_to(pixels[:, :, 2::-1], (5, 7, 3))
    np.testing.assert_array_equal(decode_image(first), rgb)
    errors = ["truncated", "not_an_image", "not_an_image", "truncated", "not_found"]
    assert [error_of(image) for image in others] == errors


# --- splits --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ("default/train/0000.parquet", "default/test/0000.parquet"),
        ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"),
        ("data/train-00000-of-00001-0123456789abcdef.parquet", "data/test-00000-of-00001.parquet"),
        ("train.parquet", "validation.parquet", "test.parquet"),
        ("training_set.parquet", "eval.parquet"),
        ("my_train_file.parquet", "my-test.parquet", "dev 2.parquet"),
        ("a/Train.parquet".lower(), "a/b/val.parquet"),
        ("data/holdout-00000-of-00001.parquet",),
        ("testing/x.parquet", "valid/x.parquet", "trained/x.parquet"),
        ("test_a/x.parquet", "train01/x.parquet"),
    ],
)
def test_splits_are_those_that_datasets_finds(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        put(tmp_path / name)
    found = {}
    files = DataFilesDict.from_patterns(get_data_patterns(str(tmp_path)), str(tmp_path))
    for split, paths in files.items():
        found |= {os.path.relpath(path, tmp_path): str(split) for path in paths}
    short = {"validation": "val"}
    expected = {name: short.get(split, split) for name, split in found.items()}
    assert {n: s for n in names if (s := read_file_path(n, {}).split)} == expected


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("Training/Test_1.parquet", "test"),  # never train on a test image
        ("FLUX.1-dev/train-00000-of-00001.parquet", "train"),
        ("FLUX.1-dev/0000.parquet", None),
        ("split=test/part-0.parquet", "test"),
        ("my_testset.parquet", "test"),
        ("progan_val/0.parquet", "val"),
        ("train/deep/test/x.parquet", "test"),
        ("train_test_split/test/x.parquet", "test"),
        ("train_test_split/x.parquet", None),
        ("train_test_split/test.parquet", "test"),
        ("latest/contest.parquet", None),
        ("part-00000-of-00002.parquet", None),
        ("x.parquet", None),
    ],
)
def test_the_path_of_a_file_tells_its_split(path: str, split: str | None) -> None:
    assert read_file_path(path, {}).split == split


def test_a_split_column_counts_before_the_name(tmp_path: Path) -> None:
    splits = ["train", "Validation", None, "", "fold 1", "testing"]
    write(tmp_path / "set" / "test.parquet", split=splits)
    listed = ["train", "val", "test", "test", "fold 1", "test"]
    assert list_column(open_images(tmp_path / "set"), "split") == listed
    assert find_splits(tmp_path / "set") == set(listed)


# --- repositories --------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["data/", "default/train/", "a/b/c/"])
@pytest.mark.parametrize("beside", [(), ("assets/preview.png", "cover.jpg")])
def test_a_clone_of_a_hub_repository_is_its_parquet(
    tmp_path: Path, prefix: str, beside: tuple[str, ...]
) -> None:
    clone = tmp_path / "clone"
    for name in ("README.md", ".gitattributes", ".git/objects/x.parquet", *beside):
        put(clone / name, IMAGES[0] if name in beside else b"text")
    write(clone / prefix / "train-00000-of-00001.parquet")
    source = open_images(clone)
    assert isinstance(source, ParquetSource)
    table, listing = read_listing(source)
    assert table.num_rows == NUM_ROWS
    assert listing.left_out == {"not Parquet": 1 + len(beside)}


@pytest.mark.parametrize("name", ["metadata.parquet", "about/metadata.parquet", "broken.parquet"])
def test_a_folder_of_images_is_none_of_tables(tmp_path: Path, name: str) -> None:
    put(tmp_path / "images" / "a.png", IMAGES[0])
    if name == "broken.parquet":
        put(tmp_path / "images" / name, b"PAR1")
    else:
        (tmp_path / "images" / name).parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"file_name": ["a.png"]}), tmp_path / "images" / name)
    assert read_all(tmp_path / "images")["a.png"] == IMAGES[0]


def test_a_file_without_images_is_counted_and_left_out(tmp_path: Path) -> None:
    write(tmp_path / "set" / "b.parquet")
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "set" / "a.parquet")
    table, listing = read_listing(open_images(tmp_path / "set"))
    assert table.num_rows == NUM_ROWS
    assert listing.left_out == {"Parquet without images": 1}


def test_a_file_whose_images_are_in_another_column_is_named(tmp_path: Path) -> None:
    write(tmp_path / "set" / "a.parquet")
    pq.write_table(pa.table({"picture": IMAGES}), tmp_path / "set" / "b.parquet")
    with pytest.raises(StorageError, match=r"b\.parquet: no images in a column 'image'.*picture"):
        read_listing(open_images(tmp_path / "set"))


def test_a_git_lfs_pointer_is_named(tmp_path: Path) -> None:
    put(
        tmp_path / "set" / "a.parquet",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    )
    with pytest.raises(StorageError, match=r"Git LFS pointer.*git lfs pull"):
        open_images(tmp_path / "set")


# --- other columns -------------------------------------------------------------------------------


def test_an_error_column_of_others_is_none_of_ours(tmp_path: Path) -> None:
    columns = {"error": ["HTTP 404"] * NUM_ROWS, "error_detail": ["x"] * NUM_ROWS}
    path = write(tmp_path / "a.parquet", **columns, status=["ok"] * NUM_ROWS)
    assert [*read_all(path).values()] == IMAGES
    table, listing = read_listing(open_images(path))
    assert table.column("status").to_pylist() == ["ok"] * NUM_ROWS
    assert "error (the output has its own)" in listing.notes[0]
    forged = write(tmp_path / "b.parquet", metadata={FOOTER_KEY: b"[]"}, **columns)
    assert [*read_all(forged).values()] == IMAGES  # no error of ours has that name


def test_only_simple_columns_travel_and_that_is_told_once(tmp_path: Path) -> None:
    extra = {
        "mask": IMAGES,
        "conditioning_image": STRUCTS,
        "embedding": [[0.5, 1.0]] * NUM_ROWS,
        "width": [1] * NUM_ROWS,
        "prompt": ["x"] * NUM_ROWS,
        "kind": pa.array(["a", "b"] * 3).dictionary_encode(),
        "taken": pa.array([0] * NUM_ROWS, pa.timestamp("us", "UTC")),
        "nothing": pa.nulls(NUM_ROWS),
    }
    for name in ("a", "b"):
        write(tmp_path / "set" / f"{name}.parquet", **extra)
    source = open_images(tmp_path / "set")
    table, listing = read_listing(source)
    assert table.column_names[-4:] == ["prompt", "kind", "taken", "nothing"]
    (note,) = (note for note in listing.notes if "columns" in note)
    for told in ("mask (binary)", "conditioning_image (struct)", "embedding (list)", "width ("):
        assert told in note
    write_manifest(tmp_path / "m", "run", source.list_images(), None)

    options = {"keep_column": ("mask", "embedding"), "drop_columns": ("prompt", "nothing")}
    table, _ = read_listing(open_images(tmp_path / "set", **options))
    assert table.column_names[-4:] == ["mask", "embedding", "kind", "taken"]
    assert table.column("mask").to_pylist() == IMAGES * 2
    assert table.column("embedding").to_pylist() == [[0.5, 1.0]] * 2 * NUM_ROWS


def test_the_same_holds_for_a_list(tmp_path: Path) -> None:
    path = tmp_path / "list.parquet"
    columns = {"path": ["a"], "tags": [["x"]], "width": [32], "label": [0], "label_str": ["fake"]}
    pq.write_table(pa.table(columns), path)
    table, listing = read_listing(open_images(path, label_column="label_str"))
    assert table.column("label").to_pylist() == [FAKE]
    assert "tags (list)" in listing.notes[0]
    assert "width (the output has its own)" in listing.notes[0]
    assert list_column(open_images(path, keep_column=("tags",)), "tags") == [["x"]]
    dropped = read_listing(open_images(path, drop_columns=("tags", "width", "label")))[0]
    assert dropped.column("label").to_pylist() == [None]


@pytest.mark.parametrize("option", ["drop_columns", "keep_column"])
@pytest.mark.parametrize("name", ["set", "list.csv"])
def test_a_column_to_drop_or_keep_must_be_there(tmp_path: Path, option: str, name: str) -> None:
    write(tmp_path / "set" / "a.parquet")
    put(tmp_path / "list.csv", b"path\na.png\n")
    with pytest.raises(UsageError, match=r"gone: no such column, only (image|path)"):
        read_listing(open_images(tmp_path / name, **{option: ("gone",)}))


@pytest.mark.parametrize("name", ["p_fake", "logit", "is_fake"])
def test_a_column_with_the_name_of_a_result_is_refused_unless_dropped(
    tmp_path: Path, name: str
) -> None:
    path = write(tmp_path / "a.parquet", **{name: [0.5] * NUM_ROWS})
    with pytest.raises(UsageError, match=f"'{name}'.*--drop-columns {name}"):
        read_listing(open_images(path))
    assert name not in read_listing(open_images(path, drop_columns=(name,)))[0].column_names


@pytest.mark.parametrize("is_list", [False, True])
@pytest.mark.parametrize(
    "values", [[7], [1.5], [True], ["sdxl"], pa.array(["x"]).dictionary_encode()]
)
def test_a_source_of_any_simple_type_is_text(tmp_path: Path, is_list: bool, values: Any) -> None:
    first = {"path": ["a.png"]} if is_list else {"image": IMAGES[:1]}
    pq.write_table(pa.table(first | {"source": values, "split": values}), tmp_path / "a.parquet")
    (source,) = list_column(open_images(tmp_path / "a.parquet"), "source")
    assert isinstance(source, str)


@pytest.mark.parametrize("is_list", [False, True])
@pytest.mark.parametrize("column", ["source", "split"])
@pytest.mark.parametrize("value", [["x"], {"a": 1}, b"\xff"])
def test_a_column_of_another_type_is_named_and_can_be_dropped(
    tmp_path: Path, is_list: bool, column: str, value: Any
) -> None:
    first = {"path": ["a.png"]} if is_list else {"image": IMAGES[:1]}
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(first | {column: [value]}), path)
    with pytest.raises(UsageError, match=f"'{column}' holds .*--drop-columns {column}"):
        read_listing(open_images(path))
    assert list_column(open_images(path, drop_columns=(column,)), column) == [None]


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (["a", None, "c", "d", "e", "f"], r"row 1: the column 'key' is empty.*--drop-columns key"),
        (["a", "", "c", "d", "e", "f"], "row 1: the column 'key' is empty"),
        (["a", "a", "c", "d", "e", "f"], "keys of the column 'key' are listed twice.*'a'"),
        ([["a"]] * NUM_ROWS, "'key' holds list"),
    ],
)
def test_keys_that_cannot_be_keys_are_named_and_can_be_dropped(
    tmp_path: Path, keys: Any, told: str
) -> None:
    path = write(tmp_path / "a.parquet", key=keys)
    with pytest.raises(UsageError, match=told):
        write_manifest(tmp_path / "m", "run", open_images(path).list_images(), None)
    numbered = open_images(path, drop_columns=("key",)).list_images()
    assert gather(numbered).column("key").to_pylist()[1] == "a.parquet#1"


def test_keys_may_be_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", key=list(range(NUM_ROWS)))
    assert [*read_all(path)] == [str(number) for number in range(NUM_ROWS)]


@pytest.mark.parametrize("values", [["a", "a"], [1, 2], [None, "a"], [["a"], ["b"]]])
def test_paths_that_cannot_be_paths_are_named(tmp_path: Path, values: Any) -> None:
    pq.write_table(pa.table({"path": values}), tmp_path / "list.parquet")
    with pytest.raises(UsageError, match="'path'"):
        write_manifest(
            tmp_path / "m", "run", open_images(tmp_path / "list.parquet").list_images(), None
        )


# --- files that differ, and hostile ones ---------------------------------------------------------


def test_columns_of_files_are_united(tmp_path: Path) -> None:
    write(tmp_path / "set" / "a.parquet", n=pa.array(range(6), pa.int8()), x=pa.nulls(6))
    write(tmp_path / "set" / "b.parquet", n=pa.array(range(6), pa.int64()), x=["y"] * 6, z=[1] * 6)
    table, _ = read_listing(open_images(tmp_path / "set"))
    assert table.column("n").to_pylist() == [*range(6)] * 2
    assert table.column("x").to_pylist() == [None] * 6 + ["y"] * 6
    assert table.column("z").to_pylist() == [None] * 6 + [1] * 6


def test_a_column_of_which_files_disagree_is_named(tmp_path: Path) -> None:
    write(tmp_path / "set" / "a.parquet", n=[1] * NUM_ROWS)
    write(tmp_path / "set" / "b.parquet", n=["x"] * NUM_ROWS)
    with pytest.raises(StorageError, match=r"disagree.*\bn\b.*--drop-columns"):
        read_listing(open_images(tmp_path / "set"))
    assert read_listing(open_images(tmp_path / "set", drop_columns=("n",)))[0].num_rows == 12


FOOTERS = [
    b"\xff\xfe",
    b"[]",
    b"null",
    b"3",
    b'"text"',
    b"{}",
    b'{"info": null}',
    b'{"info": {"features": []}}',
    b'{"info": {"features": {"label": []}}}',
    b'{"info": {"features": {"label": {"names": 3}}}}',
    b'{"info": {"features": {"label": {"names": [0, 1]}}}}',
    b'{"info": {"features": {"label": {"names": {"0": "real"}}}}}',
    b'{"info": {"features": {"label": {"names": []}}}}',
    b"[" * 100_000,
]


@pytest.mark.parametrize("footer", FOOTERS, ids=range(len(FOOTERS)))
def test_a_footer_of_another_shape_tells_nothing(tmp_path: Path, footer: bytes) -> None:
    path = write(tmp_path / "a.parquet", metadata={b"huggingface": footer}, label=LABELS)
    assert list_column(open_to_score(path)) == [REAL, FAKE] * 3


@pytest.mark.parametrize(
    "table",
    [
        pa.table({}),
        pa.table({"image": pa.array([], pa.binary())}),
        pa.table({"image": pa.nulls(3)}),
        pa.table({"image": pa.array([3], pa.int64())}),
        pa.table({"image": [[1, 2, 3]]}),
        pa.table({"image": [{"bytes": 3, "path": 4}]}),
        pa.table({"image": [{"bytes": None, "path": None}]}),
        pa.table({"image": [[{"bytes": b"x", "path": "y"}]]}),
        pa.table({"image": [{"height": 1, "width": 1, "nChannels": "x", "mode": "x", "data": 3}]}),
        pa.table([[b"a"], [b"b"]], names=["image", "image"]),
        pa.table([[b"a"], ["x"], ["y"]], names=["image", "label", "label"]),
        pa.table({"image": [b""], "label": [0]}),
        pa.table(
            {"image": [b"x"], "label": pa.nulls(1), "split": pa.nulls(1), "source": pa.nulls(1)}
        ),
        pa.table({"image": [b"x"], "": ["no name"]}),
    ],
    ids=range(14),
)
def test_odd_tables_are_rows_or_a_clear_error(tmp_path: Path, table: pa.Table) -> None:
    (tmp_path / "set").mkdir()
    pq.write_table(table, tmp_path / "set" / "a.parquet")
    for src in (tmp_path / "set", tmp_path / "set" / "a.parquet"):
        for opened in (open_images, open_to_score):
            told, num_read = None, 0
            try:
                source = opened(src)
                for batch in source.list_images().batches:
                    num_read += len(list(source.read_images(pa.Table.from_batches([batch]))))
            except CifakeError as error:
                told = str(error)
            if told is None:
                assert num_read == table.num_rows
            else:
                assert str(src) in told
                assert "\n" not in told


def test_a_small_file_of_endless_images_takes_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page of a dictionary holds an image once, and every row may name it."""
    monkeypatch.setattr(image_table, "MAX_HELD_BYTES", 2**20)
    data = bytes(2**17)
    values = pa.DictionaryArray.from_arrays(pa.array([0] * 400, pa.int32()), pa.array([data]))
    table = pa.table({"image": values})
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, dictionary_pagesize_limit=2**30, store_schema=False)
    assert path.stat().st_size < 2**20
    source = open_images(path)
    rows = gather(source.list_images())
    before = pa.total_allocated_bytes()
    most = 0
    for image in source.read_images(rows):
        assert image == data
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < 2**24


# --- files that change ---------------------------------------------------------------------------


@pytest.mark.parametrize("num_rows", [NUM_ROWS, 2])
def test_rows_of_a_file_that_changed_after_its_listing_are_errors(
    tmp_path: Path, num_rows: int
) -> None:
    kept = [f"kept/{number}" for number in range(NUM_ROWS)]
    changing, keys = write(tmp_path / "src" / "a.parquet"), [f"a{n}" for n in range(NUM_ROWS)]
    write(changing.with_name("b.parquet"), key=kept)
    write(changing, key=keys)
    source = open_to_score(changing.parent)
    rows = gather(source.list_images())
    write(changing, image=STRUCTS[::-1][:num_rows], key=keys[:num_rows])
    os.utime(changing, (1, 1))

    def read(rows: pa.Table) -> list[bytes | str]:
        images = open_to_score(changing.parent).read_images(rows)
        return [image if isinstance(image, bytes) else error_of(image) for image in images]

    assert read(rows) == ["changed"] * NUM_ROWS + IMAGES
    # Runs of earlier versions know only whether a row is there.
    place = rows.column_names.index("etag")
    earlier = rows.set_column(place, "etag", pa.nulls(len(rows), pa.string()))
    assert read(earlier) == [
        *IMAGES[::-1][:num_rows],
        *["changed"] * (NUM_ROWS - num_rows),
        *IMAGES,
    ]


def test_images_in_memory_are_those_of_the_file_as_it_was_listed(tmp_path: Path) -> None:
    path = write(tmp_path / "src" / "a.parquet")
    source = open_to_score(path.parent)
    before = gather(source.list_images())
    assert list(source.read_images(before)) == IMAGES
    write(path, image=STRUCTS[::-1])
    os.utime(path, (1, 1))
    after = gather(source.list_images())
    assert list(source.read_images(after)) == IMAGES[::-1]
    assert {error_of(image) for image in source.read_images(before)} == {"changed"}


def test_an_etag_is_the_same_with_quotes_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    path = open_path("memory://bucket/a.parquet", StoreConfig())
    stamps = []
    for etag in ("0x8D", '"0x8D"', "0x8E"):
        info = {"size": 5, "etag": etag}
        monkeypatch.setattr(type(path.fs), "info", lambda *_, info=info, **__: info)
        stamps.append(stamp_table(path))
    assert stamps[0] == stamps[1] != stamps[2]
