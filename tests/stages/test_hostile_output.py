"""An output that somebody else wrote: each verb ends well or with one line, and stays inside it."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from wrong_values import WRONG_KINDS, WRONG_VALUES, choose, list_places, put

from cifake_ray import pipeline
from cifake_ray.config import ConvertConfig, ExportConfig, RepairConfig, VerifyConfig
from cifake_ray.errors import CifakeError, StorageError
from cifake_ray.pipeline import run_verb
from cifake_ray.stages.batch import driver, shard_worker
from cifake_ray.stages.batch.shard_worker import WorkerTask
from cifake_ray.stages.resources import Placement


class InlinePool(nullcontext[Any]):
    """What the driver uses of LocalPool, in this process."""

    num_workers = 1

    def __init__(self, placement: Placement, module: str) -> None:
        super().__init__(self)

    def follow_listing(self, batches: Iterator[Any]) -> Iterator[Any]:
        return batches

    def report_shards(self, task: WorkerTask) -> Iterator[Any]:
        worker = shard_worker.ShardWorker(task)
        yield from map(worker.report_shard, range(task.run.manifest.num_shards))


class InlineQuarantine(nullcontext[Any]):
    """Tries images without a child process."""

    def __init__(self, **options: Any) -> None:
        super().__init__(self)

    def try_images(self, images: list[Any], on_step: Callable[[], None]) -> list[Any]:
        return images


@pytest.fixture(scope="module", autouse=True)
def without_ray() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "runs_here", lambda *arguments: True)
        patch.setattr(driver, "LocalPool", InlinePool)
        patch.setattr(shard_worker, "Quarantine", InlineQuarantine)
        patch.setattr(shard_worker, "faulthandler", Mock())  # it would end these tests
        patch.setattr(pipeline, "log", Mock())
        patch.setattr(pipeline, "ProgressLine", Mock())
        yield


def convert(root: Path, **options: Any) -> Any:
    src, out = str(root / "images"), str(root / "out")
    return run_verb(ConvertConfig(src=src, out=out, shard_size=3, **options), time.monotonic())


VERBS: dict[str, Callable[[Path], Any]] = {
    "convert": convert,
    "retry": lambda root: convert(root, retry_errors=True),
    "verify": lambda root: run_verb(VerifyConfig(out=str(root / "out")), time.monotonic()),
    "repair": lambda root: run_verb(RepairConfig(out=str(root / "out")), time.monotonic()),
    "export": lambda root: run_verb(
        ExportConfig(src=str(root / "out"), file=str(root / "e.txt"), overwrite=True),
        time.monotonic(),
    ),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images, a finished output of them, and a folder beside it."""
    root = tmp_path_factory.mktemp("world") / "world"
    for number in range(6):
        path = root / "images" / ("real", "fake")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        Image.new("RGB", (number + 1, 3)).save(buffer, "PNG")
        path.write_bytes(buffer.getvalue())
    convert(root)
    (root / "outside").mkdir()
    (root / "outside" / "victim").write_bytes(b"mine")
    (root / "outside" / "00000.json").write_bytes(b"{}")
    return root


@pytest.fixture
def world(finished: Path) -> Callable[[bool], Path]:
    """Return a function that puts everything back, with an output that has finished or not."""
    backup = finished.parent / "backup"
    if not backup.exists():
        shutil.copytree(finished, backup, symlinks=True)

    def restore(is_finished: bool) -> Path:
        for name in ("out", "outside"):
            shutil.rmtree(finished / name)
            shutil.copytree(backup / name, finished / name)
        if not is_finished:
            (finished / "out" / "_SUCCESS").unlink()
            (finished / "out" / "shards" / "part-00001.parquet").unlink()
            heartbeat = finished / "out" / "_attempts" / "00001.json"
            heartbeat.parent.mkdir()
            names = {"shard": 1, "session": "s", "number": 1, "host": "h", "pid": 1, "started": "?"}
            heartbeat.write_text(json.dumps({**names, "rows_done": 0, "steps": 0}))
        return finished

    return restore


def snapshot(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


TOUCHED: list[str] = []


def watch_outside(event: str, arguments: tuple[Any, ...]) -> None:
    """Note every file that is opened, renamed or removed in a folder called `outside`."""
    if event in ("open", "os.rename", "os.remove", "os.link", "os.truncate", "os.rmdir"):
        for path in arguments[:2]:
            if isinstance(path, str | os.PathLike) and "/outside" in os.path.realpath(path):
                TOUCHED.append(f"{event} {path}")


sys.addaudithook(lambda event, arguments: IS_WATCHED and watch_outside(event, arguments))
IS_WATCHED: list[bool] = []


def check_verbs(
    world: Callable[[bool], Path],
    change: Callable[[Path], None],
    states: Sequence[bool] = (True, False),
) -> list[str]:
    """Run every verb on the changed output, finished and not; return the errors."""
    said = []
    for is_finished in states:
        for name, call in VERBS.items():
            root = world(is_finished)
            change(root / "out")
            beside = snapshot(root / "outside")
            TOUCHED.clear()
            IS_WATCHED.append(True)
            try:
                call(root)
            except CifakeError as error:
                said.append(f"{name}: {error}")
            finally:
                IS_WATCHED.clear()
            assert TOUCHED == [], name
            assert snapshot(root / "outside") == beside, name
            assert {p.name for p in root.iterdir()} <= {"images", "out", "outside", "e.txt"}
    return said


# Of `config`, which are options and checked as those of the command line, one stands for all.
FILES = {
    "_run.json": lambda place: place[:1] != ("config",) or place[1:2] in ((), ("src",)),
    "_SUCCESS": lambda place: True,
    "_attempts/00001.json": lambda place: True,
}


@pytest.mark.parametrize("wrong", WRONG_VALUES)
@pytest.mark.parametrize("name", FILES)
def test_any_value_of_its_records_may_be_any_other(
    world: Callable[[bool], Path], name: str, wrong: str
) -> None:
    root = world(name == "_SUCCESS")
    record = json.loads((root / "out" / name).read_bytes())
    value = WRONG_VALUES[wrong]
    for number, place in enumerate(choose(filter(FILES[name], list_places(record)), wrong)):
        text = json.dumps(put(record, place, value))

        def change(out: Path, text: str = text) -> None:
            if (out / name).exists():
                (out / name).write_text(text)

        check_verbs(world, change, [number % 2 == 0])


TEXTS = {
    "nothing": b"",
    "a word": b"null",
    "no JSON": b"{",
    "no text": b"\xff\xfe\x00",
    "deep": b"[" * 200_000,
    "a long number": b'{"schema_version": ' + b"9" * 10_000 + b"}",
    "not a number": b'{"schema_version": 1, "command": "convert", "settings": {"a": NaN}}',
    "a name twice": b'{"command": "convert", "command": "score"}',
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("name", FILES)
def test_its_records_may_be_no_records(
    world: Callable[[bool], Path], name: str, text: bytes
) -> None:
    def change(out: Path) -> None:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(text)

    check_verbs(world, change)


PLACES = [
    "_run.json",
    "_SUCCESS",
    "_files.parquet",
    "_attempts/00001.json",
    "_manifest/*.parquet",
    "shards/part-00000.parquet",
]


@pytest.mark.parametrize("kind", WRONG_KINDS.values(), ids=WRONG_KINDS)
@pytest.mark.parametrize("name", PLACES)
def test_its_files_may_be_no_files(
    world: Callable[[bool], Path], name: str, kind: Callable[[Path], Any]
) -> None:
    def change(out: Path) -> None:
        (path,) = list(out.glob(name)) or [out / name]
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        kind(path)

    check_verbs(world, change)


@pytest.mark.parametrize("name", ["_attempts", "_manifest", "shards", ".huggingface.yaml"])
def test_its_folders_may_be_links_out_of_it(world: Callable[[bool], Path], name: str) -> None:
    def change(out: Path) -> None:
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.symlink_to("../outside")

    said = check_verbs(world, change)
    assert len(said) == 2 * len(VERBS)
    assert all("is a link that leads out of" in line for line in said)


def test_a_new_run_does_not_follow_a_link_that_was_there_before(
    world: Callable[[bool], Path],
) -> None:
    root = world(True)
    shutil.rmtree(root / "out")
    (root / "out").mkdir()
    (root / "out" / "_manifest").symlink_to(root / "outside")
    with pytest.raises(StorageError, match="is a link that leads out of"):
        convert(root)
    assert len(snapshot(root / "outside")) == 2


def test_links_within_the_output_and_links_of_a_person_are_no_harm(
    world: Callable[[bool], Path],
) -> None:
    root = world(True)
    (root / "out" / "notes").symlink_to(root / "outside")
    (root / "out" / "shards").rename(root / "out" / "elsewhere")
    (root / "out" / "shards").symlink_to("elsewhere")
    result, code = VERBS["verify"](root)
    assert (result["damaged"], code) == ({}, 0)


# --- tables --------------------------------------------------------------------------------------

COLUMNS: dict[str, Any] = {
    "null": lambda n: pa.nulls(n),
    "numbers": lambda n: pa.array([2**62] * n),
    "negative": lambda n: pa.array([-1] * n),
    "text": lambda n: pa.array(["../outside/victim"] * n),
    "absolute": lambda n: pa.array([os.path.abspath("outside/victim")] * n),
    "nothing": lambda n: pa.nulls(n, pa.string()),
    "bytes": lambda n: pa.array([b"\xff"] * n),
    "lists": lambda n: pa.array([["x"]] * n),
    "dates": lambda n: pa.array([2**40] * n, pa.timestamp("s")),
    "dictionary": lambda n: pa.array(["x"] * n).dictionary_encode(),
    "large text": lambda n: pa.array(["x"] * n, pa.large_string()),
}


@pytest.mark.parametrize("wrong", [*COLUMNS, "missing", "twice"])
@pytest.mark.parametrize(
    "name", ["_files.parquet", "_manifest/*.parquet", "shards/part-00000.parquet"]
)
def test_any_column_of_its_tables_may_be_any_other(
    world: Callable[[bool], Path], name: str, wrong: str
) -> None:
    (path,) = (world(True) / "out").glob(name)
    table = pq.ParquetFile(path).read()
    for number, column in choose(enumerate(table.schema.names), wrong + name):
        if wrong == "missing":
            other = table.remove_column(number)
        elif wrong == "twice":
            other = table.append_column(column, table.column(number))
        else:
            other = table.set_column(number, column, COLUMNS[wrong](table.num_rows))

        def change(out: Path, other: pa.Table = other) -> None:
            pq.write_table(other, out / path.name if path.parent == out else next(out.glob(name)))

        check_verbs(world, change, [number % 2 == 0])


FOOTERS = [
    "null", "[]", "{}", "7", "[" * 100_000, '{"rows": 3}',
    '{"run": RUN, "rows": "x", "errors": {}, "unlike_training": {}}',
    '{"run": RUN, "rows": 3, "errors": {"x": "y"}, "unlike_training": {}}',
    '{"run": RUN, "rows": 3, "errors": {"x": -1}, "unlike_training": {}}',
    '{"run": RUN, "rows": 3, "errors": [], "unlike_training": {}}',
    '{"run": RUN, "rows": 3, "errors": {}, "unlike_training": 7}',
    '{"run": RUN, "rows": 1e999, "errors": {}, "unlike_training": {}}',
    '{"run": RUN, "rows": 3, "errors": {}, "unlike_training": {}, "called_fake": [1]}',
    '{"run": [RUN], "rows": 3, "errors": {}, "unlike_training": {}}',
]  # fmt: skip


@pytest.mark.parametrize("footer", FOOTERS)
def test_the_footer_of_a_shard_may_be_any(world: Callable[[bool], Path], footer: str) -> None:
    def change(out: Path) -> None:
        path = out / "shards" / "part-00000.parquet"
        table = pq.ParquetFile(path).read()
        mark = json.loads(table.schema.metadata[b"cifake_ray"])["run"]
        text = footer.replace("RUN", json.dumps(mark)).encode()
        pq.write_table(table.replace_schema_metadata({b"cifake_ray": text}), path)

    check_verbs(world, change)


@pytest.mark.parametrize("location", ["../outside/victim", "/etc/hostname", "real/../../outside/x"])
@pytest.mark.parametrize("follows", [False, True])
def test_a_manifest_names_nothing_beside_the_source(
    world: Callable[[bool], Path], location: str, follows: bool
) -> None:
    root = world(True)
    shutil.rmtree(root / "out")
    convert(root, follow_symlinks=follows)
    (root / "out" / "_SUCCESS").unlink()
    (root / "out" / "shards" / "part-00000.parquet").unlink()
    (path,) = (root / "out" / "_manifest").iterdir()
    table = pq.ParquetFile(path).read()
    column = pa.array([location] * table.num_rows)
    table = table.set_column(table.schema.get_field_index("location"), "location", column)
    pq.write_table(table, path, row_group_size=3)
    with pytest.raises(StorageError, match="which is not in the source"):
        convert(root, follow_symlinks=follows)
