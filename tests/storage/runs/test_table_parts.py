"""Lists and Parquet files in parts: the same manifest, notes and errors whoever lists them."""

from __future__ import annotations

import csv
import json
import os
import pickle
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cifake_ray.config import ConvertConfig
from cifake_ray.errors import CifakeError, SourceChanged, StorageError, UsageError
from cifake_ray.stages.batch.local_pool import LocalPool
from cifake_ray.stages.resources import Placement
from cifake_ray.storage.runs import list_parts, listed_shards
from cifake_ray.storage.runs.extension import extend_run
from cifake_ray.storage.runs.list_parts import THIS_PROCESS, TaskPool
from cifake_ray.storage.runs.run import Run
from cifake_ray.storage.runs.run_plan import RunPlan
from cifake_ray.storage.sources import open_list, parquet
from cifake_ray.storage.sources.open_source import open_source
from cifake_ray.storage.sources.source import Listing, Source

Row = dict[str, Any]
NUM_ROWS = 100


def make_rows(num_rows: int = NUM_ROWS, first: int = 0) -> list[Row]:
    labels = ("real", "fake", "FAKE", "", "unsure")
    return [
        {
            "path": f"set/{n % 3}/{n:06d} caf\u00e9.jpg",
            "label": labels[n % 7 % len(labels)],
            "split": ("train", "val", "")[n % 3],
            "prompt": 'two\nlines, "quoted"\n' * (n % 4 == 0) + f"prompt {n}",
        }
        for n in range(first, first + num_rows)
    ]


def write_csv(folder: Path, rows: list[Row], name: str = "list.csv", separator: str = ",") -> Path:
    with open(folder / name, "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)
    return folder / name


def write_excel_csv(folder: Path, rows: list[Row]) -> Path:
    path = write_csv(folder, rows, "list.tsv", "\t")
    path.write_bytes(b"sep=\t\r\n" + path.read_bytes().removeprefix("\ufeff".encode()))
    return path


def write_json_lines(folder: Path, rows: list[Row]) -> Path:
    """Names that occur in some lines only, and empty lines between."""
    lines = [json.dumps({k: v for k, v in row.items() if v}, ensure_ascii=False) for row in rows]
    (folder / "list.jsonl").write_text("\n\n".join(lines))
    return folder / "list.jsonl"


def write_json_array(folder: Path, rows: list[Row]) -> Path:
    (folder / "list.json").write_text(json.dumps(rows))
    return folder / "list.json"


def write_paths(folder: Path, rows: list[Row]) -> Path:
    (folder / "list.txt").write_text("".join(f"{row['path']}\r\n" for row in rows))
    return folder / "list.txt"


def write_labelled(folder: Path, rows: list[Row]) -> Path:
    lines = (f"{row['path']} {n % 2}\n" for n, row in enumerate(rows))
    (folder / "list.lst").write_text("".join(lines))
    return folder / "list.lst"


def write_parquet_lists(folder: Path, rows: list[Row]) -> Path:
    return write_tables(folder, rows)


def write_images(folder: Path, rows: list[Row]) -> Path:
    """One file has a column of another type, which is promoted, and one lacks it."""
    facts = ("label", "split", "prompt")
    path = write_tables(
        folder,
        [
            {"key": row["path"], "image": b"\xff\xd8\xff", "n": n}
            | {name: row[name] for name in facts}
            for n, row in enumerate(rows)
        ],
    )
    last, first = pq.read_table(path / "b.parquet"), pq.read_table(path / "a-9.parquet")
    floats = last["n"].cast(pa.float64())
    size = len(last) // 9 + 1
    pq.write_table(last.set_column(2, "n", floats), path / "b.parquet", row_group_size=size)
    pq.write_table(first.drop_columns("n"), path / "a-9.parquet", row_group_size=size)
    return path


def write_tables(folder: Path, rows: list[Row]) -> Path:
    """Files whose order of names is not that of their lengths."""
    path = folder / "set"
    (path / "a").mkdir(parents=True)
    size = -(-len(rows) // 4)
    for number, name in enumerate(("a-9.parquet", "a/1.parquet", "a/2.parquet", "b.parquet")):
        some = rows[number * size : (number + 1) * size]
        pq.write_table(pa.Table.from_pylist(some), path / name, row_group_size=size // 9 + 1)
    return path


KINDS: dict[str, Callable[[Path, list[Row]], Path]] = {
    "csv": write_csv,
    "excel": write_excel_csv,
    "json lines": write_json_lines,
    "json array": write_json_array,
    "paths": write_paths,
    "labelled": write_labelled,
    "parquet list": write_parquet_lists,
    "images": write_images,
}
NO_PARTS = {"json array"}


def open_table(path: Path, **options: Any) -> Source:
    config = ConvertConfig(src=str(path), out="/nowhere", shard_size=16, **options)
    return open_source(config, path, Path("/nowhere"))


def make_plan(
    out: Path,
    source: Source,
    max_rows: int | None,
    workers: TaskPool = THIS_PROCESS,
    notes: list[str] | None = None,
    shard_rows: int = 16,
) -> RunPlan:
    def list_source() -> Listing:
        listing = source.list_images(max_rows=max_rows)
        listing.count_rows(describe=True)
        return listing

    return RunPlan(
        out=out,
        command="score",
        settings={},
        config={},
        list_source=list_source,
        shard_rows=shard_rows,
        source=source,
        workers=workers,
        needs_labels=True,
        log=(notes if notes is not None else []).append,
    )


class Shuffled:
    """Does the items in a random order, each from a copy of the work, as a cluster does."""

    num_workers = 3

    def __init__(self, seed: int) -> None:
        self.random, self.num_items = random.Random(seed), 0

    def map_items(self, work: Callable[[Any], Any], items: deque[Any]) -> Iterator[Any]:
        while items:
            items.rotate(self.random.randrange(len(items)))
            self.num_items += 1
            yield pickle.loads(pickle.dumps(work))(items.popleft())


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_list, "PART_ROWS", 7)
    monkeypatch.setattr(parquet, "PART_SHARDS", 1)


def check_same(run: Run, notes: list[str], whole: Run, whole_notes: list[str]) -> None:
    assert run.identity == whole.identity
    assert (run.counts, run.left_out) == (whole.counts, whole.left_out)
    told = [{n for n in some if "list" not in n} for some in (notes, whole_notes)]
    assert told[0] == told[1]
    assert not list(run.out.glob("_manifest/.listing-*"))


@pytest.mark.parametrize("part_rows", [1, 30, 10_000])
@pytest.mark.parametrize("kind", KINDS)
def test_the_manifest_does_not_depend_on_the_parts(
    tmp_path: Path,
    kind: str,
    part_rows: int,
    small_parts: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(list_parts, "PART_ROWS", part_rows)
    source = open_table(KINDS[kind](tmp_path, make_rows()), exclude=("*/2/*",))
    notes, whole_notes, workers = list[str](), list[str](), Shuffled(part_rows)
    run = make_plan(tmp_path / "parts", source, part_rows, workers, notes).open()
    whole = make_plan(tmp_path / "whole", source, None, notes=whole_notes).open()
    assert whole.manifest.num_rows == NUM_ROWS - len([n for n in range(NUM_ROWS) if n % 3 == 2])
    check_same(run, notes, whole, whole_notes)
    assert (workers.num_items > 0) == (part_rows < NUM_ROWS and kind not in NO_PARTS)


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("kind", ["csv", "images"])
def test_the_manifest_does_not_depend_on_the_number_of_processes(
    tmp_path: Path, kind: str, num_workers: int
) -> None:
    path = KINDS[kind](tmp_path, make_rows(open_list.PART_ROWS + 5000))
    notes, whole_notes, source = list[str](), list[str](), open_table(path)
    with LocalPool(Placement(num_workers, 1, 0)) as pool:
        run = make_plan(tmp_path / "parts", source, 1, pool, notes, 1024).open()
    whole = make_plan(tmp_path / "whole", source, None, notes=whole_notes, shard_rows=1024).open()
    check_same(run, notes, whole, whole_notes)


def find_error(plan: RunPlan) -> tuple[type[CifakeError], str]:
    with pytest.raises(CifakeError) as caught:
        plan.open()
    return type(caught.value), str(caught.value)


def spoil(kind: str, path: Path) -> None:
    """Make one of the last lines, or the last file, a bad one."""
    if path.is_dir():
        table = pq.read_table(path / "b.parquet")
        name = "key" if kind == "images" else "path"
        values = [*table[name].to_pylist()[:-1], None]
        index = table.schema.get_field_index(name)
        table = table.set_column(index, name, pa.array(values))
        pq.write_table(table, path / "b.parquet", row_group_size=7)
        return
    *lines, last = path.read_text().splitlines(keepends=True)
    bad = {"csv": "too,few\n", "excel": "a\t\tb\n", "json lines": '{"label": "real"}\n'}
    path.write_text("".join([*lines, bad.get(kind, f"{'x' * 5000}\n"), last]))


@pytest.mark.parametrize("kind", sorted({*KINDS} - NO_PARTS))
def test_a_bad_row_of_a_part_has_the_error_of_the_whole(
    tmp_path: Path, kind: str, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(list_parts, "PART_ROWS", 1)
    path = KINDS[kind](tmp_path, make_rows())
    spoil(kind, path)
    source = open_table(path)
    error = find_error(make_plan(tmp_path / "whole", source, None))
    assert find_error(make_plan(tmp_path / "parts", source, 1)) == error
    assert error[0] is UsageError
    assert str(path) in error[1]
    assert not list(tmp_path.glob("parts/_manifest/.listing-*"))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_key_in_two_parts_is_refused(
    tmp_path: Path, kind: str, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(list_parts, "PART_ROWS", 1)
    rows = make_rows()
    source = open_table(KINDS[kind](tmp_path, [*rows, rows[3]]))
    error = find_error(make_plan(tmp_path / "whole", source, None))
    assert "listed twice" in error[1]
    assert find_error(make_plan(tmp_path / "parts", source, 1)) == error


@pytest.mark.parametrize("kind", ["csv", "parquet list", "images"])
def test_labels_of_which_no_part_understands_one_are_refused(
    tmp_path: Path, kind: str, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(list_parts, "PART_ROWS", 1)
    rows = [{**row, "label": f"what {n % 3}"} for n, row in enumerate(make_rows())]
    source = open_table(KINDS[kind](tmp_path, rows), exclude=("*/2/*",))
    error = find_error(make_plan(tmp_path / "whole", source, None))
    assert "no label is understood" in error[1]
    assert find_error(make_plan(tmp_path / "parts", source, 1)) == error


@pytest.mark.parametrize("kind", ["parquet list", "images"])
def test_a_file_with_other_columns_or_damage_is_named(
    tmp_path: Path, kind: str, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(list_parts, "PART_ROWS", 1)
    path = KINDS[kind](tmp_path, make_rows())
    source, last = open_table(path), path / "b.parquet"
    table = pq.read_table(last)
    pq.write_table(table.append_column("prompt2", pa.array([[1]] * len(table))), last)
    make_plan(tmp_path / "others", source, 1).open()  # a column that does not travel
    pq.write_table(table.set_column(2, "split", pa.array([[1]] * len(table))), last)
    error = find_error(make_plan(tmp_path / "whole", source, None))
    assert find_error(make_plan(tmp_path / "parts", source, 1)) == error
    assert str(last) in error[1]
    last.write_bytes(last.read_bytes()[:100])
    error = find_error(make_plan(tmp_path / "whole2", source, None))
    assert find_error(make_plan(tmp_path / "parts2", source, 1)) == error
    assert str(last) in error[1]


@dataclass
class Stopped:
    """Stops after some items."""

    left: int
    num_workers = 2

    def map_items(self, work: Callable[[Any], Any], items: deque[Any]) -> Iterator[Any]:
        while self.left and items:
            self.left -= 1
            yield work(items.popleft())
        raise KeyboardInterrupt


@pytest.mark.parametrize("kind", sorted({*KINDS} - NO_PARTS))
def test_a_listing_that_was_stopped_goes_on_unless_the_table_has_changed(
    tmp_path: Path, kind: str, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(list_parts, "PART_ROWS", 1)
    path = KINDS[kind](tmp_path, make_rows())
    whole = make_plan(tmp_path / "whole", open_table(path), None).open()
    for name, num_items in (("out", 3), ("changed", 0), ("changed when all is listed", 10**6)):
        with pytest.raises(KeyboardInterrupt):
            make_plan(tmp_path / name, open_table(path), 1, Stopped(num_items)).open()
    run = make_plan(tmp_path / "out", open_table(path), 1).open()
    assert run.identity == whole.identity
    for file in [path] if path.is_file() else path.rglob("*.parquet"):
        os.utime(file, (1, 1))
    for name in ("changed", "changed when all is listed"):
        with pytest.raises(SourceChanged, match="it has changed since its listing began"):
            make_plan(tmp_path / name, open_table(path), 1).open()
        make_plan(tmp_path / name, open_table(path), 1).open()


@pytest.mark.parametrize("num_items", [3, 10**6])
def test_a_listing_that_was_stopped_begins_anew_when_a_file_is_gone(
    tmp_path: Path, num_items: int, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(list_parts, "PART_ROWS", 1)
    path = write_images(tmp_path, make_rows())
    with pytest.raises(KeyboardInterrupt):
        make_plan(tmp_path / "out", open_table(path), 1, Stopped(num_items)).open()
    min(path.rglob("*.parquet")).unlink()
    with pytest.raises(SourceChanged, match="it has changed since its listing began"):
        make_plan(tmp_path / "out", open_table(path), 1).open()
    run = make_plan(tmp_path / "out", open_table(path), 1).open()
    assert run.identity == make_plan(tmp_path / "whole", open_table(path), None).open().identity


def test_a_listing_that_was_stopped_begins_anew_when_a_file_with_another_column_has_come(
    tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(list_parts, "PART_ROWS", 20)
    path = write_images(tmp_path, make_rows())
    with pytest.raises(KeyboardInterrupt):
        make_plan(tmp_path / "out", open_table(path), 20, Stopped(2)).open()
    first = pq.read_table(min(path.rglob("*.parquet")))
    keys = pa.array([f"new-{n}" for n in range(first.num_rows)])
    more = first.set_column(first.column_names.index("key"), "key", keys)
    pq.write_table(more.append_column("camera", keys), path / "zz.parquet")
    with pytest.raises(SourceChanged, match="other columns than when its listing began"):
        make_plan(tmp_path / "out", open_table(path), 20).open()
    run = make_plan(tmp_path / "out", open_table(path), 20).open()
    assert run.identity == make_plan(tmp_path / "whole", open_table(path), None).open().identity


def test_a_damaged_file_of_shards_is_named(
    tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(list_parts, "PART_ROWS", 20)
    path = write_images(tmp_path, make_rows())
    with pytest.raises(KeyboardInterrupt):
        make_plan(tmp_path / "out", open_table(path), 20, Stopped(2)).open()
    for file in tmp_path.glob("out/_manifest/.listing-*/*.rows"):
        file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(StorageError, match=r"\.rows: what was listed is damaged"):
        make_plan(tmp_path / "out", open_table(path), 20).open()


@pytest.mark.parametrize("held_bytes", [1, 2**28])
def test_files_of_images_are_extended_by_parts(
    tmp_path: Path, held_bytes: int, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(list_parts, "PART_ROWS", 20)
    monkeypatch.setattr(listed_shards, "MAX_HELD_BYTES", held_bytes)
    path, runs = write_images(tmp_path, make_rows()), dict[str, Run]()
    for name in ("whole", "parts"):
        make_plan(tmp_path / name, open_table(path), None).open()
    new = pq.read_table(path / "b.parquet")
    keys = [f"new/{n}.jpg" for n in range(len(new))]
    pq.write_table(new.set_column(0, "key", pa.array(keys)), path / "c.parquet", row_group_size=5)
    for name, max_rows in (("whole", None), ("parts", 20)):
        plan = make_plan(tmp_path / name, open_table(path), max_rows, Shuffled(1))
        run = plan.find()
        assert run is not None
        runs[name], changes = extend_run(plan)
        assert changes.counts == {"new": len(keys), "changed": 0, "gone": 0}
    digests = [[file.sha256 for file in run.manifest.files] for run in runs.values()]
    assert digests[0] == digests[1]
