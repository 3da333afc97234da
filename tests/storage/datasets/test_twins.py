"""Twins and sources: which row belongs to which, on which side it is, and what is refused."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cifake_ray.config import TrainConfig
from cifake_ray.core.imaging.preprocessing import Preprocessing
from cifake_ray.core.schema import FAKE, FOOTER_KEY, REAL
from cifake_ray.errors import UsageError
from cifake_ray.storage.datasets.training_rows import TrainingRows, read_training_rows
from cifake_ray.storage.datasets.training_set import open_training_data

PREPROCESSING = Preprocessing(image_size=8, fit="resize", mean=(0.5,) * 3, std=(0.5,) * 3)
Row = tuple[str, int | None]  # key and label


def encode_image(name: str) -> bytes:
    buffer = io.BytesIO()
    color = tuple(np.random.default_rng(list(name.encode())).integers(0, 256, 3).tolist())
    Image.new("RGB", (8, 8), color).save(buffer, "PNG")
    return buffer.getvalue()


def write(folder: Path, rows: list[Row], **changed: Any) -> Path:
    """Shards of images whose keys are `.../SOURCE/NAME`; the split is the first folder's."""
    table = pa.Table.from_pylist(
        [
            {
                **{"key": key, "label": label, "source": key.split("/")[-2], "error": None},
                **{"split": "test" if key.startswith("test/") else "train"},
                **{"width": 8, "height": 8, "image": {"bytes": encode_image(key)}, **changed},
            }
            for key, label in rows
        ]
    )
    folder.mkdir()
    table = table.replace_schema_metadata({FOOTER_KEY: b"{}"})
    pq.write_table(table, folder / "a.parquet", row_group_size=7)
    return folder


NAMES = [f"{source}/{n:02}" for source in ("pets", "faces") for n in range(10)]
IMAGES: list[Row] = [
    *((f"train/REAL/{name}.jpg", REAL) for name in NAMES),
    *((f"train/FAKE/art/{n}.jpg", FAKE) for n in range(10)),
    ("test/REAL/pets/90.jpg", REAL),
]
TWINS: list[Row] = [(f"dat/FAKE/{name}.png", FAKE) for name in NAMES[:15]]
TWINS += [(f"vae/train/FAKE/{name}.webp", FAKE) for name in NAMES[:5]]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write(tmp_path / "images", IMAGES)


def read(images: Path, twins: Path | None = None, **options: Any) -> TrainingRows:
    return read_training_rows(
        TrainConfig(shards=str(images), run="r", twins=twins and str(twins), **options)
    )


def list_keys(rows: TrainingRows) -> list[str]:
    tables = {path: pq.read_table(path) for path, _ in rows.groups}
    starts = []
    for number, (path, group) in enumerate(rows.groups):
        starts.append((path, 7 * group))
        assert rows.group_rows[number] <= 7
    return [
        tables[starts[group][0]].column("key")[starts[group][1] + row].as_py()
        for group, row in zip(rows.group.tolist(), rows.row.tolist(), strict=True)
    ]


def test_a_twin_has_the_source_and_name_of_its_image_and_only_trains(
    images: Path, tmp_path: Path
) -> None:
    rows = read(images, write(tmp_path / "twins", TWINS), val_fraction=0.4)
    keys, twin_of = list_keys(rows), rows.twin_of
    assert twin_of is not None
    twins = np.flatnonzero(twin_of >= 0)
    assert {keys[n] for n in twins} < {key for key, _ in TWINS}
    for n in twins:
        image = keys[twin_of[n]]
        assert image.split("/")[1] == "REAL"
        assert Path(keys[n]).stem == Path(image).stem
        assert keys[n].split("/")[-2] == image.split("/")[-2]
        assert not rows.is_val[[n, twin_of[n]]].any()
        assert rows.label[n] == FAKE
    num_lost, num_images = len(TWINS) - len(twins), len(np.unique(twin_of[twins]))
    assert num_lost > 0
    assert rows.notes[-1] == (
        f"{len(twins)} twins of {num_images} REAL images; left out {num_lost} of no image that is"
        " trained on"
    )


def test_what_is_no_twin_is_left_out_and_counted(images: Path, tmp_path: Path) -> None:
    others: list[Row] = [
        *(("dat/FAKE/pets/77.png", FAKE), ("dat/FAKE/pets/90.png", FAKE)),
        *(("dat/FAKE/other/00.png", FAKE), *TWINS),
    ]
    rows = read(images, write(tmp_path / "twins", others))
    num_twins = int((rows.twin_of >= 0).sum())
    assert rows.notes[-1].endswith(
        f"; left out {22 - num_twins} of no image that is trained on, 1 of another split than their"
        " image"
    )
    more = write(tmp_path / "more", [*IMAGES, ("b/REAL/pets/00.png", REAL)])
    assert "2 whose name several images" in read(more, tmp_path / "twins").notes[-1]
    with pytest.raises(UsageError, match="19 of other sides than their image"):
        read(images, write(tmp_path / "larger", TWINS, width=9))


@pytest.mark.parametrize(
    ("rows", "changed", "message"),
    [
        ([("dat/FAKE/x/1.png", FAKE)], {}, "0 twins of 0 REAL images; left out 1 of no image"),
        ([("dat/REAL/pets/01.png", REAL)], {}, "01 of the source pets is not labelled FAKE"),
        ([("dat/pets/01.png", None)], {}, "01 of the source pets is not labelled FAKE"),
        ([("dat/FAKE/pets/01.png", FAKE)], {"error": "no_image"}, "0 twins .* 1 with an error"),
    ],
)
def test_twins_that_match_nothing_are_refused(
    images: Path, tmp_path: Path, rows: list[Row], changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=f"--twins .*{message}"):
        read(images, write(tmp_path / "twins", rows, **changed))


def test_files_of_others_are_refused(images: Path, tmp_path: Path) -> None:
    pq.write_table(
        pa.Table.from_pylist([{"image": {"bytes": b""}, "label": 1}]), tmp_path / "a.parquet"
    )
    with pytest.raises(UsageError, match="is no output of convert"):
        read(images, tmp_path / "a.parquet")


def test_a_pair_of_which_the_image_does_not_decode_is_left_out(tmp_path: Path) -> None:
    images = write(tmp_path / "images", IMAGES)
    path = images / "a.parquet"
    table = pq.read_table(path)
    cells = table.column("image").to_pylist()
    cells[2] = {"bytes": b"no image"}
    table = table.set_column(table.schema.get_field_index("image"), "image", pa.array(cells))
    pq.write_table(table, path, row_group_size=7)
    config = TrainConfig(
        **{"shards": str(images), "run": "r", "twins": str(write(tmp_path / "twins", TWINS))},
        **{"cache_dir": str(tmp_path / "cache"), "val_sources": ("faces,art",)},
    )
    with pytest.raises(UsageError, match="both classes") as caught:
        read_training_rows(config.__class__(**{**vars(config), "twins": None}))
    assert "no labelled FAKE image beside these sources" in str(caught.value)
    data = open_training_data(read_training_rows(config), PREPROCESSING, config, 1)
    twin_of = data.train.twin_of
    assert twin_of is not None
    assert (data.train.labels == REAL).sum() == 9
    assert (data.train.labels == FAKE).sum() == 13, "two twins without their image"
    assert sorted(np.bincount(twin_of[twin_of >= 0], minlength=9).tolist()) == [1] * 5 + [2] * 4
    assert (data.train.labels[twin_of[twin_of >= 0]] == REAL).all()
    assert data.unusable == {"not_an_image": 1}
    small = TrainConfig(**{**vars(config), "cache_gb": 0.0})
    with pytest.raises(UsageError, match="pairs cannot be streamed"):
        open_training_data(read_training_rows(small), PREPROCESSING, small, 1)


def test_rows_without_twins_keep_their_hash_and_with_them_have_another(
    images: Path, tmp_path: Path
) -> None:
    twins = write(tmp_path / "twins", TWINS)
    fewer = write(tmp_path / "fewer", TWINS[:-1])
    hashes = {read(images, path).hash_rows() for path in (None, twins, fewer)}
    assert len(hashes) == 3


# --- sources -------------------------------------------------------------------------------------


def test_named_sources_validate_and_nothing_else_does(tmp_path: Path) -> None:
    images = write(tmp_path / "images", [*IMAGES, ("train/FAKE/web/1.jpg", FAKE)])
    rows = read(images, val_sources=("faces", "art"))
    keys = np.array(list_keys(rows))
    assert {key.split("/")[-2] for key in keys[rows.is_val]} == {"faces", "art"}
    assert {key.split("/")[-2] for key in keys[~rows.is_val]} == {"pets", "web"}
    for joined in ("faces,art", "faces, art,"):
        assert rows.hash_rows() == read(images, val_sources=(joined,)).hash_rows()


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ("faces,cats", "--val-sources cats: .* it has art, faces, pets"),
        ("faces", "--val-sources faces: no labelled FAKE image of these sources"),
        ("art", "--val-sources art: no labelled FAKE image beside these sources"),
        ("art,faces", "--val-sources art,faces: no labelled FAKE image beside these sources"),
        ("", "--val-sources '' names no source"),
        (" ,", "--val-sources ' ,' names no source"),
    ],
)
def test_sources_that_cannot_validate_are_refused(images: Path, sources: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read(images, val_sources=(sources,))


def test_sources_and_a_split_are_not_both_taken(images: Path) -> None:
    with pytest.raises(UsageError, match="--val-sources and --val-split: give one"):
        read(images, val_sources=("art",), val_split="val")


# --- what is drawn -------------------------------------------------------------------------------


def test_rows_know_their_source_where_sources_are_balanced(images: Path, tmp_path: Path) -> None:
    twins = str(write(tmp_path / "twins", TWINS))
    config = TrainConfig(
        **{"shards": str(images), "run": "r", "twins": twins, "val_fraction": 0.4},
        **{"cache_dir": str(tmp_path / "cache"), "balance_sources": 0.5, "twin_share": 0.5},
    )
    rows = read_training_rows(config)
    data, names = open_training_data(rows, PREPROCESSING, config, 1), list_keys(rows)
    for side in (data.train, data.val):
        assert side.source is not None
        sources = [names[n].split("/")[-2] for n in side.positions]
        found = set(zip(sources, side.source.tolist(), strict=True))
        assert sorted(name for name, _ in found) == ["art", "faces", "pets"]
        assert len({number for _, number in found}) == 3
    assert read(images, val_fraction=0.4).source is None


def test_sources_belong_to_a_run_that_balances_them(images: Path, tmp_path: Path) -> None:
    table = pq.read_table(images)
    merged = pa.array([name.as_py().replace("faces", "pets") for name in table["source"]])
    table = table.set_column(table.schema.get_field_index("source"), "source", merged)
    pq.write_table(table, tmp_path / "merged.parquet", row_group_size=7)
    for balance, num_runs in ((None, 1), (0.5, 2)):
        options = {"val_fraction": 0.4, "balance_sources": balance}
        paths = (images, tmp_path / "merged.parquet")
        assert len({read(path, **options).hash_rows() for path in paths}) == num_runs


@pytest.mark.parametrize(
    ("options", "changed", "message"),
    [
        (
            {"balance_sources": 0.5, "val_fraction": 0.4},
            {"source": None},
            "--balance-sources 0.5: no image of .* has a source; --balance-sources 0 balances REAL",
        ),
        (
            {"twin_share": 0.5, "val_sources": ("faces,art,web",)},
            {},
            "--twin-share 0.5: all FAKE images that are trained on are twins; give 1",
        ),
        (
            {"twin_share": 0.5, "val_sources": ("faces,web",)},
            {},
            "--twin-share 0.5: no image that is trained on has a twin that decodes; give 0",
        ),
    ],
)
def test_what_has_nothing_to_draw_from_is_refused(
    tmp_path: Path, options: dict[str, Any], changed: dict[str, Any], message: str
) -> None:
    images = write(tmp_path / "images", [*IMAGES, ("train/FAKE/web/1.jpg", FAKE)], **changed)
    if "twin_share" in options:
        broken = {"image": {"bytes": b"no image"}} if "decodes" in message else {}
        options |= {"twins": str(write(tmp_path / "twins", TWINS[:10], **broken))}
    paths = {"shards": str(images), "run": "r", "cache_dir": str(tmp_path / "cache")}
    config = TrainConfig(**{**paths, **options})
    with pytest.raises(UsageError, match=message):
        open_training_data(read_training_rows(config), PREPROCESSING, config, 1)


def test_the_owner_of_a_twin_is_told_by_its_split_or_not_at_all(tmp_path: Path) -> None:
    """Names that images of test or validation have too say nothing alone."""
    images = write(tmp_path / "images", [*IMAGES, ("test/REAL/pets/00.jpg", REAL)])
    twins = write(tmp_path / "twins", [*TWINS, ("test/FAKE/pets/00.png", FAKE)])
    rows = read(images, twins)
    keys, twin_of = list_keys(rows), rows.twin_of
    assert twin_of is not None
    pairs = {keys[n]: keys[twin_of[n]] for n in np.flatnonzero(twin_of >= 0)}
    assert "test/FAKE/pets/00.png" not in pairs
    assert "of another split" not in rows.notes[-1]
    elsewhere = [(key.replace("dat/", "test/"), label) for key, label in TWINS]
    lost = read(images, write(tmp_path / "of test", elsewhere)).notes[-1]
    assert "14 of another split than their image" in lost
    assert pairs["dat/FAKE/pets/00.png"] == "train/REAL/pets/00.jpg"
    twins = write(tmp_path / "without a split", TWINS, split=None)
    rows = read(images, twins)
    assert "train/REAL/pets/00.jpg" not in {keys[n] for n in rows.twin_of if n >= 0}
    assert "whose name several images of a source have" in rows.notes[-1]
