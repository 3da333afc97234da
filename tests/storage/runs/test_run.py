"""The papers of a run: who freezes it, how it resumes, and when it counts as done."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cifake_ray.config import VERBS, ConvertConfig, Doc, fingerprint_settings
from cifake_ray.core.schema import MANIFEST_FIELDS, SCHEMA_VERSION
from cifake_ray.errors import CifakeError, NothingToDo, RunMismatch, StorageError
from cifake_ray.storage.io import files
from cifake_ray.storage.io.files import (
    create_bytes,
    find_files,
    make_folder,
    move,
    remove_leftovers,
    write_bytes,
    write_chunks,
)
from cifake_ray.storage.runs import shards
from cifake_ray.storage.runs import verify as verify_module
from cifake_ray.storage.runs.finish import finish_run
from cifake_ray.storage.runs.manifest import read_manifest_shard
from cifake_ray.storage.runs.run import Run, ShardStats
from cifake_ray.storage.runs.run_plan import RunPlan
from cifake_ray.storage.runs.settings import check_settings, identify_run
from cifake_ray.storage.runs.shards import FOOTER_KEY, commit_shard, inspect_shard, read_shard
from cifake_ray.storage.runs.verify import (
    DamagedFile,
    check_here,
    find_damage,
    plan_seal_check,
    set_damaged_aside,
    verify_files,
)
from cifake_ray.storage.sources.source import Listing, batch_rows


def list_keys(num_keys: int = 10, prefix: str = "") -> Listing:
    rows = [(f"{prefix}{n}", None, None, 1, *[None] * 6) for n in range(num_keys)]
    return Listing(batch_rows(rows, pa.schema(MANIFEST_FIELDS)))


def fail_to_list() -> NoReturn:
    raise AssertionError("a run that is frozen must not be listed again")


def open_here(out: Path, list_source: Callable[[], Listing] = list_keys, **settings: Any) -> Run:
    return RunPlan(
        out=out,
        command="score",
        settings=settings,
        config={"out": str(out)},
        list_source=list_source,
        shard_rows=4,
    ).open()


def make_result(run: Run, shard: int) -> pa.Table:
    keys = read_manifest_shard(run.manifest_folder, run.find_file(shard), shard).column("key")
    errors = ["empty" if key == "3" else None for key in keys.to_pylist()]
    return pa.table({"key": keys, "error": pa.array(errors, pa.string())})


def commit_all(run: Run) -> list[ShardStats]:
    numbers = range(run.manifest.num_shards)
    return [commit_shard(run, shard, make_result(run, shard), {}, {}) for shard in numbers]


def flip_byte(path: Path, place: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 1
    path.write_bytes(data)


# --- freezing ------------------------------------------------------------------------------------


def test_the_papers_name_the_run_and_its_manifest(tmp_path: Path) -> None:
    run = open_here(tmp_path, bundle="b1")
    record = json.loads((tmp_path / "_run.json").read_bytes())
    assert record["schema_version"] == SCHEMA_VERSION
    assert record["settings"]["bundle"] == "b1"
    assert record["fingerprint"] == run.fingerprint
    assert record["manifest"]["num_rows"] == 10
    assert run.manifest.num_shards == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["_manifest", "_run.json"]


def test_what_was_counted_and_noted_while_listing_is_kept_and_said(tmp_path: Path) -> None:
    def list_counted() -> Listing:
        listing = list_keys()
        listing.count_rows(describe=True)
        listing.notes.append("a note")
        return listing

    said: list[str] = []
    plan = RunPlan(
        out=tmp_path,
        command="score",
        settings={},
        config={},
        list_source=list_counted,
        shard_rows=4,
        log=said.append,
    )
    run = plan.open()
    assert run.counts == {"labels": {"unlabelled": 10}, "splits": {}, "sources": {}}
    assert [line.partition(";")[0] for line in said] == [
        "score: a note",
        "score: 10 of 10 images have no label and none is labelled REAL or FAKE",
    ]
    assert plan.open() == run
    assert len(said) == 2
    path = tmp_path / "_run.json"
    record = json.loads(path.read_bytes())
    del record["counts"]  # as an earlier version wrote it
    path.write_text(json.dumps(record))
    assert plan.open().counts == {}


def test_the_same_settings_resume_without_a_new_listing(tmp_path: Path) -> None:
    assert open_here(tmp_path, a=1) == open_here(tmp_path, fail_to_list, a=1)


def test_other_settings_are_refused_with_the_difference(tmp_path: Path) -> None:
    open_here(tmp_path, epochs=5, same=1)
    with pytest.raises(RunMismatch, match=r"epochs: 5 there, 6 here\)") as failure:
        open_here(tmp_path, fail_to_list, epochs=6, same=1)
    assert "same" not in str(failure.value).partition("(")[2].partition(")")[0]


def test_a_setting_that_only_one_side_has_is_a_difference(tmp_path: Path) -> None:
    open_here(tmp_path, old=1)
    with pytest.raises(
        RunMismatch, match=r"new: not given there, 2 here; old: 1 there, not given here"
    ):
        open_here(tmp_path, fail_to_list, new=2)


@dataclass(frozen=True, kw_only=True)
class NewerConfig(ConvertConfig):
    sharpness: Annotated[float, Doc("An option of a later version")] = 0.0
    channels: Annotated[tuple[str, ...], Doc("Another")] = ("red",)


@pytest.mark.parametrize("is_search", [False, True])
def test_an_option_that_an_older_version_did_not_have_has_its_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_search: bool
) -> None:
    """Either way round; also in the trainings of a search."""
    command = "tune" if is_search else "convert"
    monkeypatch.setitem(VERBS, "train" if is_search else "convert", NewerConfig)

    def describe(config: Any) -> dict[str, Any]:
        settings = fingerprint_settings(config)
        return identify_run(command, {"recipe": settings} if is_search else settings)

    older = describe(ConvertConfig(src="s", out="o"))
    newer = describe(NewerConfig(src="s", out="o"))
    check_settings(tmp_path, older, newer)
    check_settings(tmp_path, newer, older)
    with pytest.raises(RunMismatch, match="sharpness"):
        check_settings(tmp_path, older, describe(NewerConfig(src="s", out="o", sharpness=1.0)))
    with pytest.raises(RunMismatch, match="channels"):
        check_settings(tmp_path, describe(NewerConfig(src="s", out="o", channels=())), older)


def test_another_command_is_refused(tmp_path: Path) -> None:
    open_here(tmp_path)
    with pytest.raises(RunMismatch, match="command: 'score' there, 'convert' here"):
        RunPlan(
            out=tmp_path,
            command="convert",
            settings={},
            config={},
            list_source=fail_to_list,
            shard_rows=None,
        ).open()


def test_the_output_of_another_version_is_refused(tmp_path: Path) -> None:
    open_here(tmp_path)
    record = json.loads((tmp_path / "_run.json").read_bytes())
    record["schema_version"] = SCHEMA_VERSION + 1
    (tmp_path / "_run.json").write_text(json.dumps(record))
    with pytest.raises(RunMismatch, match=f"schema_version {SCHEMA_VERSION + 1}"):
        open_here(tmp_path, fail_to_list)


def test_the_folder_of_a_training_run_is_refused(tmp_path: Path) -> None:
    record = {"schema_version": SCHEMA_VERSION, "command": "train", "settings": {}}
    (tmp_path / "_run.json").write_text(json.dumps(record))
    with pytest.raises(RunMismatch, match="belongs to a train run"):
        open_here(tmp_path, fail_to_list)


def test_papers_that_were_cut_off_are_named(tmp_path: Path) -> None:
    open_here(tmp_path)
    data = (tmp_path / "_run.json").read_bytes()
    (tmp_path / "_run.json").write_bytes(data[: len(data) // 2])
    with pytest.raises(StorageError, match=r"_run\.json: not valid JSON"):
        open_here(tmp_path, fail_to_list)


def test_nothing_is_frozen_when_there_is_nothing_to_do(tmp_path: Path) -> None:
    with pytest.raises(NothingToDo):
        open_here(tmp_path, lambda: Listing(iter(())))
    assert not (tmp_path / "_run.json").exists()
    assert open_here(tmp_path).manifest.num_rows == 10


def test_a_listing_that_breaks_off_freezes_nothing(tmp_path: Path) -> None:
    def list_half() -> Listing:
        def batches() -> Any:
            yield from list_keys().batches
            raise StorageError("the disk went away")

        return Listing(batches())

    with pytest.raises(StorageError, match="went away"):
        open_here(tmp_path, list_half)
    assert not (tmp_path / "_run.json").exists()
    assert open_here(tmp_path).manifest.num_rows == 10


FREEZE = """
import sys, time
from functools import partial
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_run
out, name = Path(sys.argv[2]), sys.argv[3]
def list_together():
    (out / f"ready-{name}").touch()
    while len(list(out.glob("ready-*"))) < 2:
        time.sleep(0.001)
    return test_run.list_keys(10, prefix=name)
run = test_run.open_here(out, list_together)
print(",".join(file.name for file in run.manifest.files))
"""


def test_two_processes_that_freeze_at_once_work_on_one_manifest(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", FREEZE, str(Path(__file__).parent), str(tmp_path), name],
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("a", "b")
    ]
    answers = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert len(answers) == 1
    assert all((tmp_path / "_manifest" / name).is_file() for name in answers.pop().split(","))


def test_an_output_that_cannot_be_written_is_refused_before_the_listing(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="a file is where a folder is needed"):
        open_here(tmp_path / "file" / "out", fail_to_list)


# --- parts ---------------------------------------------------------------------------------------


def test_a_committed_part_is_found_again_with_its_account(tmp_path: Path) -> None:
    run = open_here(tmp_path)
    table = make_result(run, 1)
    part = commit_shard(run, 1, table, {"bundle": "b1"}, {"size": 2})
    assert part.rows == 4
    assert part.errors == ({"empty": 1} if "3" in table["key"].to_pylist() else {})
    assert part.size_bytes == run.shard_path(1).stat().st_size
    assert inspect_shard(run, 1) == part
    assert inspect_shard(run, 0) is None
    found = pq.read_table(run.shard_path(1))
    assert found.to_pylist() == table.to_pylist()
    facts = json.loads(pq.read_schema(run.shard_path(1)).metadata[FOOTER_KEY])
    assert (facts["fingerprint"], facts["bundle"]) == (run.fingerprint, "b1")
    assert part.unlike_training == facts["unlike_training"] == {"size": 2}


def test_images_of_many_bytes_are_split_into_row_groups_that_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "MAX_GROUP_BYTES", 25)
    run = open_here(tmp_path)
    rows = make_result(run, 1)
    image = pa.StructArray.from_arrays(
        [[b"x" * 10, None, b"y" * 60, b"z"], rows["key"].combine_chunks()], ["bytes", "path"]
    )
    rows = rows.add_column(1, "image", image)
    part = commit_shard(run, 1, rows, {}, {})
    written = pq.ParquetFile(run.shard_path(1))
    groups = [written.metadata.row_group(n).num_rows for n in range(written.num_row_groups)]
    assert groups == [2, 2]
    assert read_shard(run.shard_path(1)).replace_schema_metadata(None) == rows
    assert inspect_shard(run, 1) == part


def test_a_part_whose_account_lacks_something_is_made_again(tmp_path: Path) -> None:
    """An older version of the program counted less."""
    run = open_here(tmp_path)
    commit_shard(run, 0, make_result(run, 0), {}, {})
    table = pq.read_table(run.shard_path(0))
    facts = json.loads(table.schema.metadata[FOOTER_KEY])
    del facts["unlike_training"]
    metadata = {FOOTER_KEY: json.dumps(facts).encode()}
    pq.write_table(table.replace_schema_metadata(metadata), run.shard_path(0))
    assert inspect_shard(run, 0) is None


def test_finding_a_part_reads_its_end_and_a_flipped_bit_before_it_is_for_verify(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_here(tmp_path)
    parts = commit_all(run)
    path, data = run.shard_path(0), run.shard_path(0).read_bytes()
    path.write_bytes(data[:20] + bytes([data[20] ^ 1]) + data[21:])
    monkeypatch.setattr(shards, "read_if_exists", None)  # no file is read whole
    monkeypatch.setattr(shards, "read_bytes", None)
    monkeypatch.setattr(shards, "END_BYTES", 10)  # and a longer footer is read once more
    assert [inspect_shard(run, part.shard) for part in parts] == parts
    path.write_bytes(data[:20] + data[21:])
    assert inspect_shard(run, 0) is None
    monkeypatch.undo()
    path.write_bytes(data[:20] + bytes([data[20] ^ 1]) + data[21:])
    finish_run(run, parts, {})
    damaged = [DamagedFile("scores/part-00000.parquet", "sha256 differs")]
    assert verify_files(tmp_path) == check_here(plan_seal_check(tmp_path)) == damaged


def test_a_part_of_an_earlier_version_is_read_whole(tmp_path: Path) -> None:
    """Its footer seals nothing, so its digest is that of all bytes."""
    run = open_here(tmp_path)
    parts = commit_all(run)
    path = run.shard_path(0)
    table = pq.read_table(path)
    pq.write_table(table, path, write_page_checksum=True, use_dictionary=False)
    data = path.read_bytes()
    found = inspect_shard(run, 0)
    assert found is not None
    assert found.sha256 == hashlib.sha256(data).hexdigest()
    assert (found.rows, found.errors) == (parts[0].rows, parts[0].errors)
    finish_run(run, [found, *parts[1:]], {})
    assert verify_files(tmp_path) == check_here(plan_seal_check(tmp_path)) == []
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    end = column.data_page_offset + column.total_compressed_size - 1
    path.write_bytes(data[:end] + bytes([data[end] ^ 1]) + data[end + 1 :])
    assert inspect_shard(run, 0) is None
    assert [item.reason for item in verify_files(tmp_path)] == ["sha256 differs"]


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    one, two = open_here(tmp_path / "one"), open_here(tmp_path / "two")
    assert commit_all(one) == commit_all(two)


@pytest.mark.parametrize("foreign", [None, {b"cifake_ray": b"{}"}, {b"cifake_ray": b"no json"}])
def test_a_file_that_we_did_not_write_is_not_accepted(
    tmp_path: Path, foreign: dict[bytes, bytes] | None
) -> None:
    run = open_here(tmp_path)
    run.results_folder.mkdir()
    table = make_result(run, 0).replace_schema_metadata(foreign)
    pq.write_table(table, run.shard_path(0))
    assert inspect_shard(run, 0) is None


# --- finishing -----------------------------------------------------------------------------------


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    run = open_here(tmp_path)
    with pytest.raises(CifakeError, match=r"do not add up.*1 shards missing"):
        finish_run(run, commit_all(run)[:-1], {})
    assert not (tmp_path / "_SUCCESS").exists()


def test_a_lost_or_doubled_row_is_refused(tmp_path: Path) -> None:
    run = open_here(tmp_path)
    parts = commit_all(run)
    for rows in (parts[0].rows - 1, parts[0].rows + 1):
        table = pa.table({"key": ["x"] * rows, "error": pa.nulls(rows, pa.string())})
        wrong = commit_shard(run, 0, table, {}, {})
        with pytest.raises(CifakeError, match=f"10 images listed, {6 + rows} rows written"):
            finish_run(run, [wrong, *parts[1:]], {})
    assert not (tmp_path / "_SUCCESS").exists()


# --- files ---------------------------------------------------------------------------------------


def test_write_bytes_replaces_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_a_folder_that_is_gone_does_not_come_into_being_again(tmp_path: Path) -> None:
    for write in (partial(write_bytes, data=b"x"), partial(make_folder, parents=False)):
        with pytest.raises(StorageError, match=r"out was moved or deleted .*; put it back"):
            write(tmp_path / "out" / "file")
    assert list(tmp_path.iterdir()) == []


def test_create_bytes_does_not_overwrite(tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert create_bytes(path, b"first")
    assert not create_bytes(path, b"second")
    assert path.read_bytes() == b"first"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_what_breaks_off_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    def make_chunks() -> Any:
        yield b"half"
        raise RuntimeError("interrupted")

    path = tmp_path / "file"
    write_bytes(path, b"old")
    with pytest.raises(RuntimeError, match="interrupted"):
        write_chunks(path, make_chunks())
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


WRITE_TOO_MUCH = """
import resource, signal, sys
from functools import partial
from pathlib import Path
from cifake_ray.errors import StorageError
from cifake_ray.storage.io.files import write_bytes
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_bytes(Path(sys.argv[1]), b"x" * 5000)
except StorageError as error:
    print(error)
"""


def test_a_disk_that_takes_no_more_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    process = subprocess.run(
        [sys.executable, "-c", WRITE_TOO_MUCH, str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert str(path) in process.stdout, process.stderr
    assert "size limit" in process.stdout
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_path_below_a_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="file"):
        write_bytes(tmp_path / "file" / "below", b"x")


def test_a_folder_where_a_file_should_be_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match="folder"):
        write_bytes(tmp_path / "folder", b"x")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


DEAD_PID = 999_999_999


@pytest.mark.parametrize(
    ("host", "pid", "age_s", "stays"),
    [
        ("mine", DEAD_PID, 0, False),
        ("mine", os.getpid(), 1e6, True),
        ("other", DEAD_PID, 1800, True),
        ("other", os.getpid(), 1e6, False),
    ],
    ids=["dead", "alive", "recent", "old"],
)
def test_leftovers_are_removed_but_not_what_another_host_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str, pid: int, age_s: float, stays: bool
) -> None:
    """A process of another host or container is not alive here, but it may be there."""
    hosts = {"mine": files.identify_host(), "other": "0123abcd"}
    monkeypatch.setattr(files, "identify_host", lambda: hosts[host])
    monkeypatch.setattr(os, "getpid", lambda: pid)

    def leave(temporary: Path, path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", leave)
    monkeypatch.setattr(Path, "unlink", lambda path, missing_ok=False: None)
    with pytest.raises(KeyboardInterrupt):
        write_bytes(tmp_path / "part-00000.parquet", b"half")
    monkeypatch.undo()
    (written,) = tmp_path.iterdir()
    made_s = time.time() - age_s
    os.utime(written, (made_s, made_s))
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [written] * stays


def test_other_files_are_not_leftovers(tmp_path: Path) -> None:
    for name in (".writing-999999999-ab", ".writing-probe", "part-00000.parquet", ".hidden"):
        (tmp_path / name).write_bytes(b"")
    os.utime(tmp_path / ".writing-999999999-ab", (0, 0))  # of the version before
    os.utime(tmp_path / ".hidden", (0, 0))
    remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".hidden", "part-00000.parquet"]


# --- what others wrote ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["_manifest/photo.jpg", "_attempts/a", "scores/part-00000.parquet"]
)
def test_files_of_others_are_never_taken_for_ours(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(RunMismatch, match=f"{name} is where a run would write"):
        open_here(tmp_path)
    assert (tmp_path / name).read_bytes() == b"mine"


def test_what_a_person_leaves_in_a_run_survives_its_end(tmp_path: Path) -> None:
    run = open_here(tmp_path)
    parts = commit_all(run)
    notes = [tmp_path / "notes.txt", run.manifest_folder / "notes.txt"]
    for note in notes:
        note.write_bytes(b"mine")
    finish_run(run, parts, {})
    assert all(note.read_bytes() == b"mine" for note in notes)


def test_a_list_of_files_that_names_others_is_refused(tmp_path: Path) -> None:
    run = open_here(tmp_path / "out")
    finish_run(run, commit_all(run), {})
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    files = tmp_path / "out" / "_files.parquet"
    table = pq.read_table(files)
    row = {**table.to_pylist()[0], "name": "../victim"}
    pq.write_table(pa.concat_tables([table, pa.Table.from_pylist([row], table.schema)]), files)
    with pytest.raises(StorageError, match="does not name the shards of the run"):
        verify_files(tmp_path / "out")
    assert find_damage(tmp_path / "out") is None
    set_damaged_aside(tmp_path / "out", [])
    assert victim.read_bytes() == b"mine"


def test_a_part_that_nobody_committed_is_damage(tmp_path: Path) -> None:
    run = open_here(tmp_path)
    finish_run(run, commit_all(run), {})
    extra = run.results_folder / "part-99999.parquet"
    extra.write_bytes(run.shard_path(0).read_bytes())
    assert verify_files(tmp_path) == [
        DamagedFile("scores/part-99999.parquet", "not committed by this run")
    ]


def test_a_damaged_manifest_is_damage_that_cannot_be_repaired(tmp_path: Path) -> None:
    run = open_here(tmp_path)
    finish_run(run, commit_all(run), {})
    file = run.manifest.files[0].name
    flip_byte(run.manifest_folder / file, 0.5)
    assert verify_files(tmp_path) == [DamagedFile(f"_manifest/{file}", "sha256 differs")]
    with pytest.raises(StorageError, match="start again in a new folder"):
        set_damaged_aside(tmp_path, verify_files(tmp_path))
    assert (tmp_path / "_SUCCESS").exists()


def test_what_was_set_aside_comes_back_when_the_rest_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_here(tmp_path)
    finish_run(run, commit_all(run), {})
    damage = [DamagedFile(f"scores/part-{shard:05}.parquet", "sha256 differs") for shard in (0, 1)]
    before = find_files(tmp_path)

    def refuse_second(path: Path, target: Path) -> None:
        if path == run.shard_path(1):
            raise StorageError(f"{path}: Permission denied; check the permissions")
        move(path, target)

    monkeypatch.setattr(verify_module, "move", refuse_second)
    with pytest.raises(StorageError, match=r"part-00001\.parquet: Permission denied"):
        set_damaged_aside(tmp_path, damage)
    assert find_files(tmp_path) == before


@pytest.mark.parametrize("name", ["config", "settings", "manifest", "command"])
def test_papers_that_were_edited_are_named(tmp_path: Path, name: str) -> None:
    open_here(tmp_path)
    papers = json.loads((tmp_path / "_run.json").read_text())
    papers[name] = [7]
    (tmp_path / "_run.json").write_text(json.dumps(papers))
    with pytest.raises(CifakeError, match=r"_run\.json: .*it may have been edited"):
        verify_files(tmp_path)


def test_the_folder_of_a_training_is_named_to_those_who_check_files(tmp_path: Path) -> None:
    record = {"schema_version": SCHEMA_VERSION, "command": "train", "settings": {}}
    (tmp_path / "_run.json").write_text(json.dumps(record))
    with pytest.raises(
        StorageError, match="output of train; give that of convert, score, evaluate or audit"
    ):
        verify_files(tmp_path)
