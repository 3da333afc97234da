"""export to a folder: many files with the rows of one, resumed wherever it was killed."""

from __future__ import annotations

import json
import shutil
from collections import deque
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from computer import disturb_every_change
from s3_server import S3Server
from score_run import write_score_run

from cifake_ray.config import ExportConfig
from cifake_ray.errors import CifakeError, RunMismatch, StorageError, UsageError
from cifake_ray.pipeline import run_verb
from cifake_ray.stages import export as export_stage
from cifake_ray.storage.io.digest import list_sizes
from cifake_ray.storage.io.paths import resolve_path
from cifake_ray.storage.runs import export_folder
from cifake_ray.storage.runs.export_folder import PartWriter

NUM_ROWS = 50


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    """A finished run of 50 rows in 13 shards; each tenth does not decode."""
    images = tmp_path / "images" / "real"
    images.mkdir(parents=True)
    for number in range(NUM_ROWS):
        (images / f"{number}.png").write_bytes(b"x")

    def make_logits(rows: pa.Table) -> np.ndarray:
        numbers = [int(Path(key).stem) for key in rows["key"].to_pylist()]
        return np.array([np.nan if n % 10 == 0 else n / 10 - 2.0 for n in numbers])

    out = tmp_path / "scores"
    write_score_run(str(images.parent), out, make_logits=make_logits, shard_rows=4)
    return out


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start processes only where a test asks for them by `num_workers`."""
    monkeypatch.setattr(export_stage, "FEW_FILES", 100)


def export(scores: Path, file: Any, **options: Any) -> dict[str, Any]:
    options = {"rows_per_file": 12, **options}
    result, code = run_verb(ExportConfig(src=str(scores), file=str(file), **options), 0.0)
    assert code == 0
    return dict(result)


def read_all(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name[0] not in "_."}


def join_files(format: str, files: list[bytes]) -> Any:
    """Return the rows of many files, or of one."""
    if format == "parquet":
        return pa.concat_tables(pq.read_table(pa.BufferReader(data)) for data in files)
    lines = [data.splitlines(keepends=True) for data in files]
    if format == "csv":  # each file has the header
        assert all(each[0] == lines[0][0] for each in lines)
        lines = [lines[0], *(each[1:] for each in lines[1:])]
    return [line for each in lines for line in each]


@pytest.mark.parametrize("where", [(), ("p_fake >= 0.4",), ("error != null", "key != real/0.png")])
@pytest.mark.parametrize("format", ["csv", "parquet", "jsonl", "txt"])
def test_the_rows_of_all_files_are_those_of_one_file(
    scores: Path, tmp_path: Path, format: str, where: tuple[str, ...]
) -> None:
    columns = () if format == "txt" else ("key,p_fake,is_fake,error,label",)
    single = tmp_path / f"one.{format}"
    one = export(scores, single, where=where, columns=columns)
    many = export(scores, f"{tmp_path}/many.{format}/", where=where, columns=columns)
    assert many["rows"] == one["rows"]
    files = read_all(tmp_path / f"many.{format}")
    assert list(files) == [f"part-{n:05}.{format}" for n in range(5)]
    assert many["files"] == 5
    wanted = join_files(format, [single.read_bytes()])
    assert join_files(format, [*files.values()]) == wanted
    if format == "parquet":
        assert pq.read_table(tmp_path / "many.parquet") == wanted


def test_the_format_is_that_of_the_folder_or_of_the_option(scores: Path, tmp_path: Path) -> None:
    export(scores, f"{tmp_path}/rows/", format="jsonl")
    assert {name.split(".")[1] for name in read_all(tmp_path / "rows")} == {"jsonl"}
    with pytest.raises(UsageError, match="its extension is none of"):
        export(scores, f"{tmp_path}/none/")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sort": ("p_fake",)}, "--sort and --top compare all rows"),
        ({"top": 3}, "--sort and --top compare all rows"),
        ({"format": "label-studio"}, "label-studio is one file"),
        ({"format": "parquet-images"}, "parquet-images is one file"),
        ({"columns": ("nothing",)}, "there is no column 'nothing'"),
        ({"where": ("p_fake ~ 3",)}, "--where"),
        ({"format": "txt", "columns": ("key",)}, "a .txt file holds keys only"),
    ],
)
def test_what_a_folder_cannot_hold_is_refused_before_it_is_made(
    scores: Path, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        export(scores, f"{tmp_path}/many.csv/", **options)
    assert not (tmp_path / "many.csv").exists()


class Killed(Exception):
    pass


def kill_after(count: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let `count` files be written, then end; return the names of those that are begun."""
    begun: list[str] = []
    write_chunks = export_folder.write_chunks

    def write(path: Path, chunks: Any) -> None:
        begun.append(path.name)
        if len(begun) > count:
            raise Killed
        write_chunks(path, chunks)

    monkeypatch.setattr(export_folder, "write_chunks", write)
    return begun


def test_a_command_that_was_killed_is_resumed_and_keeps_what_is_whole(
    scores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "many.csv"
    export(scores, f"{tmp_path}/undisturbed.csv/")
    with monkeypatch.context() as patch:
        kill_after(3, patch)
        with pytest.raises(Killed):
            export(scores, f"{target}/")
    assert list(read_all(target)) == ["part-00000.csv", "part-00001.csv", "part-00002.csv"]
    assert not (target / "_SUCCESS").exists()
    broken = target / "part-00001.csv"
    broken.write_bytes(broken.read_bytes().replace(b"real", b"fake"))
    with monkeypatch.context() as patch:
        written = kill_after(100, patch)
        result = export(scores, f"{target}/")
    assert written == ["part-00001.csv", "part-00003.csv", "part-00004.csv"]
    assert read_all(target) == read_all(tmp_path / "undisturbed.csv")
    assert (result["rows"], result["files"]) == (NUM_ROWS, 5)
    assert not (target / "_parts").exists()
    files = pq.read_table(target / "_files.parquet").to_pylist()
    assert [file["name"] for file in files] == list(read_all(target))
    assert sum(file["rows"] for file in files) == NUM_ROWS


def test_a_finished_export_is_left_alone_and_made_again_where_a_file_is_gone(
    scores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "many.jsonl"
    first = export(scores, f"{target}/")
    written = kill_after(100, monkeypatch)
    before = read_all(target)
    assert export(scores, f"{target}/") == first
    assert written == []
    (target / "part-00002.jsonl").unlink()
    (target / "notes.md").write_text("mine")
    assert export(scores, f"{target}/") == first
    assert "part-00002.jsonl" in written
    assert read_all(target) == before | {"notes.md": b"mine"}


def test_other_options_need_overwrite_and_leave_no_file_of_before(
    scores: Path, tmp_path: Path
) -> None:
    target = tmp_path / "many.csv"
    export(scores, f"{target}/")
    before = read_all(target)
    (target / "notes.md").write_text("mine")
    with pytest.raises(RunMismatch, match=r"rows_per_file: 12 there, 25 here"):
        export(scores, f"{target}/", rows_per_file=25)
    assert read_all(target) == before | {"notes.md": b"mine"}
    export(scores, f"{target}/", rows_per_file=25, overwrite=True)
    assert list(read_all(target)) == ["notes.md", "part-00000.csv", "part-00001.csv"]


def test_overwrite_that_was_killed_is_resumed_by_itself(
    scores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "many.csv"
    export(scores, f"{target}/")
    with monkeypatch.context() as patch:
        kill_after(2, patch)
        with pytest.raises(Killed):
            export(scores, f"{target}/", overwrite=True)
    assert list(read_all(target)) == ["part-00000.csv", "part-00001.csv"]
    with monkeypatch.context() as patch:
        written = kill_after(100, patch)
        export(scores, f"{target}/", overwrite=True)
    assert written == ["part-00002.csv", "part-00003.csv", "part-00004.csv"]


@pytest.mark.parametrize("there", ["nothing", "another export"])
def test_anything_may_happen_at_any_change_of_a_folder(
    scores: Path, tmp_path: Path, there: str
) -> None:
    """The same command again ends the work; with `_SUCCESS` all files are there, and no other."""
    target, wanted = tmp_path / "many.jsonl", dict[str, bytes]()
    options = {"rows_per_file": 20, "overwrite": there == "another export"}
    config = ExportConfig(src=str(scores), file=f"{target}/", **options)

    def prepare() -> None:
        shutil.rmtree(target, ignore_errors=True)
        if there == "another export":
            export(scores, f"{target}/", rows_per_file=10)

    def check_half() -> None:
        if (target / "_SUCCESS").exists() and wanted:
            files = {row["name"] for row in pq.read_table(target / "_files.parquet").to_pylist()}
            assert files == set(read_all(target))

    def check_whole(may_leave_files: bool) -> None:
        found = read_all(target)
        wanted.update(wanted or found)
        assert found == wanted
        names = {path.name for path in target.iterdir()} - set(found)
        assert names >= {"_SUCCESS", "_files.parquet", "_run.json"}
        assert may_leave_files or len(names) == 3

    num_changes = disturb_every_change(
        lambda: run_verb(config, 0.0),
        prepare=prepare,
        check_half=check_half,
        check_whole=check_whole,
    )
    assert num_changes > 10


def add_file(folder: Path) -> None:
    folder.mkdir()
    (folder / "mine.txt").write_bytes(b"mine")


def add_run(folder: Path) -> None:
    shutil.copytree(folder.parent / "scores", folder)


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (add_file, "holds mine.txt, and no export"),
        (add_run, "command: 'score' there, 'export' here"),
        (lambda folder: folder.write_bytes(b"mine"), "a file is where a folder is needed"),
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_others_is_refused_and_stays(
    scores: Path,
    tmp_path: Path,
    prepare: Callable[[Path], None],
    words: str,
    overwrite: bool,
) -> None:
    target = tmp_path / "many.csv"
    prepare(target)

    def read() -> dict[str, bytes]:
        paths = [target, *target.rglob("*")]
        return {str(p): p.read_bytes() for p in paths if p.is_file()}

    before = read()
    with pytest.raises(CifakeError, match=words):
        export(scores, f"{target}/", overwrite=overwrite)
    assert read() == before


def test_a_folder_inside_the_output_is_refused(scores: Path) -> None:
    with pytest.raises(UsageError, match="is inside"):
        export(scores, f"{scores}/scores/many.csv/")
    with pytest.raises(StorageError, match=r"no _run\.json"):
        export(scores / "scores", f"{scores.parent}/many.csv/")


def test_a_file_that_would_be_taken_for_one_of_the_export_is_named(
    scores: Path, tmp_path: Path
) -> None:
    target = tmp_path / "many.csv"
    export(scores, f"{target}/")
    (target / "part-00009.csv").write_bytes(b"mine")
    (target / "_SUCCESS").unlink()
    with pytest.raises(RunMismatch, match=r"part-00009\.csv is not of this export; move it"):
        export(scores, f"{target}/")


@pytest.mark.parametrize("change", ["file", "scores"])
def test_what_changes_meanwhile_is_told_and_the_export_is_not_finished(
    scores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    target = tmp_path / "many.csv"
    write_part = PartWriter.write_part

    def write(writer: PartWriter, part: Any) -> Any:
        found = write_part(writer, part)
        if part.name == "part-00003.csv":
            if change == "file":
                (target / "part-00001.csv").write_bytes(b"")
            else:
                table = pq.read_table(scores / "_files.parquet")
                digests = pa.array(["00" * 32] * table.num_rows)
                changed = table.set_column(2, table.schema.field(2), digests)
                pq.write_table(changed, scores / "_files.parquet")
        return found

    monkeypatch.setattr(PartWriter, "write_part", write)
    words = {"file": r"part-00001\.csv: changed or removed", "scores": "was changed while"}
    with pytest.raises(StorageError, match=words[change]):
        export(scores, f"{target}/")
    assert not (target / "_SUCCESS").exists()


def test_processes_write_what_one_process_writes(
    scores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(export_stage, "FEW_FILES", 2)
        export(scores, f"{tmp_path}/a.parquet/")
    monkeypatch.setattr("cifake_ray.stages.batch.task_pool.LocalPool", None)
    export(scores, f"{tmp_path}/b.parquet/")
    assert read_all(tmp_path / "a.parquet") == read_all(tmp_path / "b.parquet")
    assert (tmp_path / "a.parquet/_files.parquet").read_bytes() == (
        tmp_path / "b.parquet/_files.parquet"
    ).read_bytes()


def test_files_may_be_done_in_any_order(
    scores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class LastFirst:
        def __init__(self, placement: Any) -> None:
            pass

        def __enter__(self) -> LastFirst:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def map_items(self, work: Any, items: deque[Any]) -> Generator[Any, None, None]:
            yield from map(work, reversed(items))

    monkeypatch.setattr("cifake_ray.stages.batch.task_pool.LocalPool", LastFirst)
    export(scores, f"{tmp_path}/a.csv/", num_workers=0)
    names = pq.read_table(tmp_path / "a.csv/_files.parquet")["name"].to_pylist()
    assert names == [f"part-{n:05}.csv" for n in range(5)]


@pytest.mark.smoke
@pytest.mark.usefixtures("ray_cluster")
def test_tasks_of_ray_write_what_processes_write(scores: Path, tmp_path: Path) -> None:
    export(scores, f"{tmp_path}/a.parquet/", num_workers=1)
    export(scores, f"{tmp_path}/b.parquet/", num_workers=0)
    assert read_all(tmp_path / "a.parquet") == read_all(tmp_path / "b.parquet")


def test_a_folder_in_a_bucket_holds_the_same_files(
    scores: Path, tmp_path: Path, s3_env: S3Server
) -> None:
    root = f"s3://{s3_env.make_bucket()}/many.csv"
    export(scores, f"{root}/", num_workers=0)
    export(scores, f"{tmp_path}/many.csv/")
    files = {p.name: p.read_bytes() for p in resolve_path(root).iterdir() if p.name[0] != "_"}
    assert files == read_all(tmp_path / "many.csv")
    names = {p.name for p in resolve_path(root).iterdir()} - set(files)
    assert names - {"_parts"} == {"_SUCCESS", "_files.parquet", "_run.json"}
    assert list_sizes(resolve_path(root) / "_parts") == {}
    assert json.loads((resolve_path(root) / "_SUCCESS").read_bytes())["rows"] == NUM_ROWS
