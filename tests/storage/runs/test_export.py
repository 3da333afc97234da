"""export: one CSV file that a spreadsheet opens without running anything."""

from __future__ import annotations

import csv
import json
import os
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3_server import S3Server
from upath import UPath

from cifake_ray.config import ExportConfig
from cifake_ray.errors import StorageError, UsageError
from cifake_ray.pipeline import run_verb
from cifake_ray.storage.io.digest import hash_file
from cifake_ray.storage.io.paths import AnyPath, resolve_path
from cifake_ray.storage.runs import export as export_module
from cifake_ray.storage.runs.export import export_scores


def write_parts(folder: Path, *tables: pa.Table) -> Path:
    folder.mkdir()
    for number, table in enumerate(tables):
        pq.write_table(table, folder / f"part-{number:05}.parquet")
    return folder


def make_scores(keys: list[str], **columns: Any) -> pa.Table:
    logit = pa.array([-1.5] * len(keys), pa.float32())
    return pa.table({"key": keys, "logit": logit, **columns})


def configure(folder: Path, file: AnyPath, **options: Any) -> ExportConfig:
    return ExportConfig(src=str(folder), file=str(file), **options)


def export(folder: Path) -> list[dict[str, str]]:
    file = folder.parent / "scores.csv"
    num_rows = export_scores(folder, file, configure(folder, file, overwrite=True))
    with open(file, encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == num_rows
    return rows


def test_all_parts_become_one_table_with_one_header(tmp_path: Path) -> None:
    folder = write_parts(tmp_path / "s", make_scores(["a", "b"]), make_scores(["c"]))
    assert [row["key"] for row in export(folder)] == ["a", "b", "c"]
    assert float(export(folder)[0]["logit"]) == -1.5


STARTS = [
    "=",
    "+",
    "-",
    "@",
    "\t",
    "\r",
    "\n",
    " =",
    "  \n\t@",
    "\u00a0+",
    "\ufeff=",
    "\v-",
    "\0=",
    "\uff1d",
]


@pytest.mark.parametrize("start", STARTS)
def test_text_that_a_spreadsheet_would_run_is_escaped(tmp_path: Path, start: str) -> None:
    formula = f"{start}cmd|' /C calc'!A0"
    table = make_scores([formula, "a=b"], source=[formula, None])
    rows = export(write_parts(tmp_path / "s", table))
    assert rows[0]["key"] == rows[0]["source"] == f"'{formula}"
    assert rows[1]["key"] == "a=b"
    assert rows[1]["source"] == ""


def test_numbers_below_zero_are_no_formulas(tmp_path: Path) -> None:
    assert export(write_parts(tmp_path / "s", make_scores(["a"])))[0]["logit"] == "-1.5"


def test_large_text_is_escaped_too(tmp_path: Path) -> None:
    """The columns of a list keep the types that its writer chose; polars writes this one."""
    table = make_scores(["a"], title=pa.array(["=1+1"], pa.large_string()))
    assert export(write_parts(tmp_path / "s", table))[0]["title"] == "'=1+1"


def test_categories_are_escaped_too(tmp_path: Path) -> None:
    table = make_scores(["a"], title=pa.array(["=1+1"]).dictionary_encode())
    assert export(write_parts(tmp_path / "s", table))[0]["title"] == "'=1+1"


@pytest.mark.parametrize("start", STARTS)
def test_the_name_of_a_column_is_escaped_too(tmp_path: Path, start: str) -> None:
    table = make_scores(["a"], **{f"{start}1+1": ["x"]})
    assert f"'{start}1+1" in export(write_parts(tmp_path / "s", table))[0]


def test_views_of_text_are_escaped_too(tmp_path: Path) -> None:
    table = make_scores(["a"], title=pa.array(["=1+1"], pa.string_view()))
    assert export(write_parts(tmp_path / "s", table))[0]["title"] == "'=1+1"


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(4)])
def test_raw_bytes_do_not_fit(tmp_path: Path, kind: pa.DataType) -> None:
    table = make_scores(["a"], title=pa.array([b"=1+1"], kind))
    with pytest.raises(StorageError, match="title"):
        export(write_parts(tmp_path / "s", table))


def test_dates_decimals_and_truths_fit(tmp_path: Path) -> None:
    day, money = pa.array([0], pa.date32()), pa.array([Decimal("-1.00")])
    table = make_scores(["a"], day=day, money=money, truth=[True], nothing=pa.nulls(1))
    row = export(write_parts(tmp_path / "s", table))[0]
    assert [row[name] for name in ("day", "money", "truth", "nothing")] == [
        "1970-01-01",
        "-1.00",
        "true",
        "",
    ]


def test_odd_keys_survive_the_round_trip(tmp_path: Path) -> None:
    keys = ["new\nline", "cr\rlf\n", 'quo"te', "com,ma", "\u00e9\U0001f9ff", " space ", "a\\b"]
    assert [row["key"] for row in export(write_parts(tmp_path / "s", make_scores(keys)))] == keys


def test_a_column_that_does_not_fit_is_named_and_no_file_appears(tmp_path: Path) -> None:
    folder = write_parts(tmp_path / "s", make_scores(["a"], tags=[["x", "y"]]))
    with pytest.raises(StorageError, match="tags"):
        export(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_part_that_breaks_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    good = make_scores(["a"])
    folder = write_parts(tmp_path / "s", good, make_scores(["b"], tags=[["x"]]))
    (tmp_path / "scores.csv").write_text("old")
    with pytest.raises(StorageError):
        export(folder)
    assert (tmp_path / "scores.csv").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s", "scores.csv"]


def test_a_folder_without_scores_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"part-\*\.parquet"):
        export_scores(tmp_path, tmp_path / "x.csv", configure(tmp_path, tmp_path / "x.csv"))


# --- other formats, and a part of it -------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    one = make_scores(["=a", "b"], p_fake=pa.array([0.1, 0.374], pa.float32()), error=[None, None])
    two = make_scores(["c"], p_fake=pa.array([None], pa.float32()), error=["empty"])
    error = pa.field("error", pa.string())
    return write_parts(
        tmp_path / "s", *(t.set_column(3, error, t["error"].cast("string")) for t in (one, two))
    )


def test_parquet_keeps_types(folder: Path) -> None:
    file = folder.parent / "all.parquet"
    assert export_scores(folder, file, configure(folder, file)) == 3
    assert pq.read_table(file).equals(
        pa.concat_tables(map(pq.read_table, sorted(folder.iterdir())))
    )


def test_json_lines_hold_numbers_as_they_are_meant(folder: Path) -> None:
    file = folder.parent / "all.jsonl"
    assert export_scores(folder, file, configure(folder, file, columns=("p_fake,key",))) == 3
    assert file.read_text().splitlines() == [
        '{"p_fake": 0.1, "key": "=a"}',
        '{"p_fake": 0.374, "key": "b"}',
        '{"p_fake": null, "key": "c"}',
    ]


def test_json_lines_have_null_or_text_for_what_json_lacks(tmp_path: Path) -> None:
    values = {
        "number": [float("nan")],
        "day": pa.array([0], pa.date32()),
        "nested": [{"a": [Decimal("1.5"), None]}],
    }
    folder, file = write_parts(tmp_path / "s", make_scores(["a"], **values)), tmp_path / "x.jsonl"
    export_scores(folder, file, configure(folder, file, columns=tuple(values)))
    assert json.loads(file.read_text()) == {
        "number": None,
        "day": "1970-01-01",
        "nested": {"a": ["1.5", None]},
    }
    folder = write_parts(tmp_path / "t", make_scores(["a"], raw=[b"x"]))
    with pytest.raises(StorageError, match="raw"):
        export_scores(folder, file, configure(folder, file, overwrite=True))


def test_text_holds_keys_alone(folder: Path) -> None:
    file = folder.parent / "keys.txt"
    assert export_scores(folder, file, configure(folder, file, where=("p_fake >= 0.2",))) == 1
    assert file.read_text() == "b\n"
    write_parts(folder.parent / "odd", make_scores(["new\nline"]))
    with pytest.raises(StorageError, match=r"'new\\nline' is more than a line"):
        export_scores(folder.parent / "odd", file, configure(folder, file, overwrite=True))


@pytest.mark.parametrize(
    ("where", "keys"),
    [
        (("p_fake>=0.374",), ["b"]),
        (("p_fake < 0.2",), ["=a"]),
        (("error = null",), ["=a", "b"]),
        (("error != null",), ["c"]),
        (("error == 'empty'",), ["c"]),
        (("error = null", "key != b"), ["=a"]),
        (("p_fake > 1",), []),
    ],
)
@pytest.mark.parametrize("ending", ["parquet", "jsonl", "csv"])
def test_rows_are_chosen(
    folder: Path, where: tuple[str, ...], keys: list[str], ending: str
) -> None:
    file = folder.parent / f"some.{ending}"
    assert export_scores(folder, file, configure(folder, file, where=where)) == len(keys)
    if ending == "parquet":
        assert pq.read_table(file)["key"].to_pylist() == keys


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"where": ("p_fake",)}, "give COLUMN OPERATOR VALUE"),
        ({"where": ("p_fake > high",)}, "'high' cannot be compared with p_fake"),
        ({"where": ("nothing = 1",)}, "no column 'nothing'; there are key, logit, p_fake, error"),
        ({"columns": ("key", "nothing")}, "--columns: there is no column 'nothing'"),
    ],
)
def test_a_wrong_choice_is_named(folder: Path, options: dict[str, Any], expected: str) -> None:
    file = folder.parent / "x.csv"
    with pytest.raises(UsageError, match=expected):
        export_scores(folder, file, configure(folder, file, **options))
    assert not file.exists()


@pytest.mark.parametrize("name", ["scores", "scores.xlsx", "scores.csv.gz", "a.csv/b"])
def test_an_unknown_extension_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"none of \.csv, \.parquet, \.jsonl, \.txt and \.onnx"):
        export_scores(Path("s"), Path(name), ExportConfig(src="s", file=name))
    assert ExportConfig(src="s", file=name, format="jsonl").chosen_format == "jsonl"


def test_a_value_may_be_of_several_lines(tmp_path: Path) -> None:
    write_parts(tmp_path / "odd", make_scores(["new\nline", "other"]))
    file = tmp_path / "some.parquet"
    options = configure(tmp_path / "odd", file, where=("key = 'new\nline'",))
    assert export_scores(tmp_path / "odd", file, options) == 1


def test_a_full_standard_output_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parts(tmp_path / "scores", make_scores(["a"]))
    with open("/dev/full", "w", encoding="utf-8") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        with pytest.raises(StorageError, match=r"standard output: .*the disk is full"):
            run_verb(ExportConfig(src=str(tmp_path / "scores"), file="-"), 0.0)
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # what is left goes there


def test_a_file_that_exists_is_kept(folder: Path) -> None:
    file = folder.parent / "x.csv"
    file.write_text("mine")
    with pytest.raises(UsageError, match=r"x\.csv exists; .*--overwrite"):
        export_scores(folder, file, configure(folder, file))
    assert file.read_text() == "mine"


def test_a_file_that_appears_meanwhile_is_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = folder.parent / "x.csv"
    file.write_text("mine")
    monkeypatch.setattr(export_module, "exists", lambda path: False)
    with pytest.raises(UsageError, match="--overwrite"):
        export_scores(folder, file, configure(folder, file))
    assert file.read_text() == "mine"
    assert sorted(path.name for path in folder.parent.iterdir()) == ["s", "x.csv"]


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_an_object_is_written_in_parts_and_appears_whole(
    tmp_path: Path, s3_env: S3Server, ending: str
) -> None:
    """Parts of a bucket have 5 MiB at least; s3fs takes 50."""
    bucket = s3_env.make_bucket()
    noise = np.random.default_rng(0).bytes(30 * 2**20).hex()
    folder = write_parts(tmp_path / "s", *(make_scores([f"{n}{noise}"]) for n in range(2)))
    file = resolve_path(f"s3://{bucket}/x.{ending}")
    assert export_scores(folder, file, configure(folder, file)) == 2
    local = tmp_path / f"x.{ending}"
    export_scores(folder, local, configure(folder, local))
    assert hash_file(file) == hash_file(local)
    with pytest.raises(UsageError, match="--overwrite"):
        export_scores(folder, file, configure(folder, file))
    (folder / "part-00001.parquet").write_bytes(b"broken")
    with pytest.raises(StorageError, match="damaged"):
        export_scores(folder, file, configure(folder, file, overwrite=True))
    assert hash_file(file) == hash_file(local)
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_an_empty_choice_in_a_bucket_is_an_empty_file(folder: Path) -> None:
    file = UPath("memory://bucket/x.txt")
    assert export_scores(folder, file, configure(folder, file, where=("p_fake > 1",))) == 0
    assert file.read_bytes() == b""
