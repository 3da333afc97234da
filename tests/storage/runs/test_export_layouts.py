"""Exports for Label Studio, FiftyOne and Hugging Face: what those programs read."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from score_run import write_score_run

from cifake_ray.config import ExportConfig
from cifake_ray.errors import StorageError, UsageError
from cifake_ray.storage.runs.export import encode_scores, export_scores

ODD = ["=cmd|' /C calc'!A0.png", 'quo"te, comma.png', "new\nline\r.png", "\u202eabc#?%20 é.png"]
NAMES = [*(f"FAKE/{name}" for name in ODD), "REAL/a.png", "REAL/b.png"]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    for number, name in enumerate(NAMES):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / name)
    (folder / "REAL" / "\udcff.png").write_bytes(b"x")  # not UTF-8: it has no key
    return folder


@pytest.fixture
def scores(images: Path, tmp_path: Path) -> Path:
    """p_fake falls with the name; REAL/b.png does not decode."""

    def make_logits(rows: pa.Table) -> np.ndarray:
        order = [NAMES.index(key) if key in NAMES else -1 for key in rows["key"].to_pylist()]
        return np.array([np.nan if n in (-1, 5) else 2.0 - n for n in order])

    write_score_run(str(images), tmp_path / "scores", make_logits=make_logits, shard_rows=3)
    return tmp_path / "scores"


def export(scores: Path, file: Path, **options: Any) -> Counter[str]:
    counts: Counter[str] = Counter()
    config = ExportConfig(src=str(scores), file=str(file), **options)
    assert export_scores(scores, file, config, counts) == counts["rows"]
    return counts


def test_tasks_hold_the_image_the_verdict_and_its_model(scores: Path, tmp_path: Path) -> None:
    file = tmp_path / "tasks.json"
    counts = export(scores, file, format="label-studio", sort=("p_fake desc",))
    assert counts == {"rows": 6, "without a file": 1}
    tasks = json.loads(file.read_text(encoding="utf-8"))
    assert [task["data"]["key"] for task in tasks] == NAMES
    first, unscored = tasks[0], tasks[-1]
    path = f"{str(tmp_path)[1:]}/images/FAKE/%3Dcmd%7C%27%20/C%20calc%27%21A0.png"
    assert first["data"]["image"] == f"/data/local-files/?d={path}"
    assert first["predictions"] == [
        {
            "model_version": "built-in cifake abababababab float32",
            "score": first["data"]["p_fake"],
            "result": [
                {
                    "from_name": "verdict",
                    "to_name": "image",
                    "type": "choices",
                    "value": {"choices": ["FAKE"]},
                }
            ],
        }
    ]
    assert unscored["predictions"] == []
    assert unscored["data"]["error"] == "not_an_image"
    real = tasks[4]["predictions"][0]
    assert real["result"][0]["value"] == {"choices": ["REAL"]}
    assert real["score"] == pytest.approx(1 - tasks[4]["data"]["p_fake"])


def test_tasks_as_lines_say_the_same(scores: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"format": "label-studio", "columns": ("key",)}
    export(scores, tmp_path / "t.json", **options, image_prefix="https://h/?p=")
    export(scores, tmp_path / "t.jsonl", **options, image_prefix="https://h/?p=")
    lines = (tmp_path / "t.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == json.loads((tmp_path / "t.json").read_text())
    data = [json.loads(line)["data"] for line in lines]
    assert {"key": "REAL/a.png", "image": "https://h/?p=REAL/a.png"} in data
    assert "https://h/?p=FAKE/new%0Aline%0D.png" in [row["image"] for row in data]


def test_a_folder_of_fiftyone_holds_samples_with_predictions(scores: Path, tmp_path: Path) -> None:
    """FiftyOne 1.22 has read such a folder: `FiftyOneDatasetImporter`, the form without ids."""
    export(scores, tmp_path / "set", format="fiftyone", where=("is_fake != null",))
    metadata = json.loads((tmp_path / "set" / "metadata.json").read_text())
    assert "version" not in metadata  # else it must hold what only FiftyOne's database knows
    assert metadata["info"]["classes"] == ["REAL", "FAKE"]
    samples = json.loads((tmp_path / "set" / "samples.json").read_text())["samples"]
    by_key = {sample["key"]: sample for sample in samples}
    assert set(by_key) == set(NAMES[:5])
    sample = by_key[NAMES[2]]
    assert sample["filepath"] == f"{tmp_path}/images/{NAMES[2]}"
    assert sample["prediction"] == {
        "_cls": "Classification",
        "label": "FAKE",
        "confidence": 0.5,
        "logits": [0.0, 0.0],
    }
    assert sample["ground_truth"] == {"_cls": "Classification", "label": "FAKE"}
    with pytest.raises(UsageError, match=r"metadata\.json exists"):
        export(scores, tmp_path / "set", format="fiftyone")


def test_columns_that_fiftyone_could_not_hold_get_other_names(tmp_path: Path, images: Path) -> None:
    (tmp_path / "list.csv").write_text("path,tags,a b,_x\nREAL/a.png,t,1,2\n")
    shutil.copytree(images / "REAL", tmp_path / "REAL")
    write_score_run(str(tmp_path / "list.csv"), tmp_path / "scores")
    export(tmp_path / "scores", tmp_path / "set", format="fiftyone")
    sample = json.loads((tmp_path / "set" / "samples.json").read_text())["samples"][0]
    assert (sample["column_tags"], sample["column_a_b"], sample["column__x"]) == ("t", "1", "2")
    assert sample["filepath"] == str(tmp_path / "REAL" / "a.png")


def test_load_dataset_reads_an_imagefolder(scores: Path, images: Path, tmp_path: Path) -> None:
    (images / "REAL" / "b.png").unlink()
    (images / "REAL" / "\udcff.png").unlink()
    chosen = ("error = null",)
    export(scores, images / "metadata.jsonl", format="imagefolder", where=chosen)
    rows = datasets.load_dataset("imagefolder", data_dir=str(images), cache_dir=str(tmp_path / "c"))
    found = {row["key"]: row["image"].getpixel((0, 0))[0] for row in rows["train"]}
    assert found == {name: number for number, name in enumerate(NAMES[:5])}


def test_an_imagefolder_elsewhere_is_refused(scores: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"images/metadata\.jsonl, or use"):
        export(scores, tmp_path / "new" / "metadata.jsonl", format="imagefolder")
    assert not (tmp_path / "new" / "metadata.jsonl").exists()


def test_load_dataset_decodes_a_parquet_with_images(
    scores: Path, images: Path, tmp_path: Path
) -> None:
    (images / "FAKE" / ODD[1]).unlink()
    file = tmp_path / "images.parquet"
    options: dict[str, Any] = {"format": "parquet-images", "sort": ("key desc",), "top": 6}
    counts = export(scores, file, **options, columns=("key,p_fake,label",))
    assert counts == {"rows": 6, "image not_found": 1, "image bad_key": 1}
    rows = datasets.load_dataset(
        "parquet", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert rows.features["label"].names == ["REAL", "FAKE"]
    found = [(row["key"], row["image"] and row["image"].getpixel((0, 0))[0]) for row in rows]
    numbers = {name: number for number, name in enumerate(NAMES)}
    wanted = {**numbers, NAMES[1]: None, "REAL/\\xff.png": None}
    assert found == sorted(wanted.items(), key=lambda row: row[0].encode(), reverse=True)[:6]


def test_no_rows_are_a_file_that_can_be_read(scores: Path, tmp_path: Path) -> None:
    nothing: dict[str, Any] = {"where": ("p_fake > 1",), "sort": ("p_fake",)}
    export(scores, tmp_path / "i.parquet", format="parquet-images", **nothing)
    assert pq.read_table(tmp_path / "i.parquet").num_rows == 0
    export(scores, tmp_path / "t.json", format="label-studio", **nothing)
    assert json.loads((tmp_path / "t.json").read_text()) == []
    export(scores, tmp_path / "s.csv", **nothing)
    assert (tmp_path / "s.csv").read_text().startswith('"key","logit"')


def test_images_inside_parquet_travel_only_as_images(scores: Path, tmp_path: Path) -> None:
    export(scores, tmp_path / "in.parquet", format="parquet-images", columns=("label",))
    write_score_run(str(tmp_path / "in.parquet"), tmp_path / "again")
    export(tmp_path / "again", tmp_path / "out.parquet", format="parquet-images")
    images = [pq.read_table(tmp_path / f"{n}.parquet")["image"].to_pylist() for n in ("in", "out")]
    contents = [[row and row["bytes"] for row in rows] for rows in images]
    assert contents[0] == contents[1]
    assert len(set(contents[0])) == len(NAMES) + 1
    with pytest.raises(UsageError, match="use --format parquet-images"):
        export(tmp_path / "again", tmp_path / "t.json", format="label-studio")


def test_score_files_alone_do_not_say_where_images_are(scores: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="give the folder that has _run"):
        export(scores / "scores", tmp_path / "t.json", format="label-studio")


def test_margin_is_the_distance_to_the_threshold(scores: Path) -> None:
    options: dict[str, Any] = {"sort": ("margin",), "top": 2, "columns": ("key,margin",)}
    config = ExportConfig(src=str(scores), file="-", format="jsonl", **options)
    lines = b"".join(encode_scores(scores, config, Counter())).splitlines()
    rows = [json.loads(line) for line in lines]  # logit(0.4) is -0.405; the logits 2, 1, 0, ...
    assert [row["key"] for row in rows] == [NAMES[2], NAMES[3]]
    assert rows[0]["margin"] == pytest.approx(0.405465, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"by": "source"}, "--by needs --top"),
        ({"top": 0}, "--top is 0"),
        ({"sort": ("",)}, "--sort: give a column"),
        ({"image_prefix": "x"}, "--image-prefix is for"),
        ({"sort": ("p",)}, "--sort: there is no column 'p'; there are key"),
        ({"top": 1, "by": "p"}, "--by: there is no column 'p'"),
    ],
)
def test_a_wrong_order_is_named(scores: Path, options: dict[str, Any], expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        export(scores, scores.parent / "x.csv", **options)
