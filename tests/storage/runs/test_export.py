"""export: one CSV file that a spreadsheet opens without running anything."""

from __future__ import annotations

import csv
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cifake_ray.errors import StorageError
from cifake_ray.storage.runs.export import export_scores


def write_parts(folder: Path, *tables: pa.Table) -> Path:
    folder.mkdir()
    for number, table in enumerate(tables):
        pq.write_table(table, folder / f"part-{number:05}.parquet")
    return folder


def make_scores(keys: list[str], **columns: Any) -> pa.Table:
    logit = pa.array([-1.5] * len(keys), pa.float32())
    return pa.table({"key": keys, "logit": logit, **columns})


def export(folder: Path) -> list[dict[str, str]]:
    file = folder.parent / "scores.csv"
    num_rows = export_scores(folder, file)
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
        export_scores(tmp_path, tmp_path / "x.csv")
