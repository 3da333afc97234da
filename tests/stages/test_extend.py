"""score --extend: new keys become new shards; what is there is never touched."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from computer import Computer, SimulatedPool, disturb_every_change
from test_every_step import AllAreGood

from cifake_ray.config import DecideConfig, ExportConfig, RepairConfig, ScoreConfig
from cifake_ray.core.evaluation.policy import set_verdicts
from cifake_ray.core.processing.processor import assemble_rows
from cifake_ray.core.schema import SCORE_FIELDS
from cifake_ray.errors import ImageError, RunMismatch, StorageError, UsageError
from cifake_ray.pipeline import run_verb
from cifake_ray.stages import score
from cifake_ray.stages.batch import driver, shard_worker
from cifake_ray.stages.batch.summary import BatchSummary
from cifake_ray.storage.bundles.built_ins import locate_bundle
from cifake_ray.storage.bundles.bundle import read_bundle_info
from cifake_ray.storage.runs import extension, listed_rows
from cifake_ray.storage.runs import run as run_module
from cifake_ray.storage.runs.export import export_scores
from cifake_ray.storage.runs.run import require_run
from cifake_ray.storage.runs.run_plan import RunPlan
from cifake_ray.storage.runs.shards import describe_threshold
from cifake_ray.storage.runs.verify import find_damage, verify_files

BUNDLE = read_bundle_info(locate_bundle(None))


class StubProcessor:
    """A detector whose score is a pure function of the bytes."""

    batch_size = 3
    decodes = True
    image_bytes = 1

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.footer = {
            "bundle": BUNDLE.fingerprint,
            "thresholds": json.dumps(BUNDLE.list_thresholds()),
            **describe_threshold(threshold, None),
        }
        self.prepare: Any = list

    def finish(self, rows: pa.Table, prepared: Sequence[bytes | ImageError]) -> pa.Table:
        errors = [image if isinstance(image, ImageError) else None for image in prepared]
        logit = [
            None if isinstance(image, ImageError) else hashlib.sha256(image).digest()[0] / 256
            for image in prepared
        ]
        columns = {"logit": logit, "p_fake": logit, "is_fake": [None] * len(errors)}
        headers = [None] * len(errors)
        table = assemble_rows(SCORE_FIELDS, rows, columns, headers, errors)
        return set_verdicts(table, self.threshold, None)

    def count_unlike(self, rows: pa.Table) -> dict[str, int]:
        return {"any": 0}


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def make_maker(**options: Any) -> Any:
        return StubMaker(options["threshold"])

    monkeypatch.setattr(score, "MakeScoreProcessor", make_maker)
    monkeypatch.setattr(score, "read_bundle_info", lambda *args, **options: BUNDLE)
    monkeypatch.setattr(driver, "runs_here", lambda *args: True)
    monkeypatch.setattr(driver, "LocalPool", lambda *args: SimulatedPool(Computer()))
    monkeypatch.setattr(driver, "watch_progress", lambda reports, *args: reports)
    monkeypatch.setattr(shard_worker, "faulthandler", Mock())  # it would end these tests
    monkeypatch.setattr(shard_worker, "Quarantine", AllAreGood)


class StubMaker:
    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def __call__(self, placement: Any) -> StubProcessor:
        return StubProcessor(self.threshold)


def write_images(folder: Path, numbers: range) -> Path:
    for number in numbers:
        path = folder / ("real", "fake")[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"%d" % number)
    return folder


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return write_images(tmp_path / "src", range(10))


def run_score(src: Path, out: Path, log: Any = lambda line: None, **options: Any) -> BatchSummary:
    config = ScoreConfig(
        src=str(src), out=str(out), shard_size=4, precision="float32", num_workers=0, **options
    )
    result = score.score_images(
        config, src, out, locate_bundle(None), lambda _: None, time.monotonic(), log
    )
    assert isinstance(result, BatchSummary)
    return result


def read_rows(out: Path) -> list[dict[str, Any]]:
    return sorted(pq.read_table(out / "scores").to_pylist(), key=lambda row: row["key"])


def read_parts(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / "scores").iterdir()}


def test_extensions_give_the_rows_of_one_run_over_the_last_listing(
    src: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run_score(src, out, extend=True)  # of nothing: a run like any other
    for numbers in (range(10, 25), range(25, 27)):
        before = read_parts(out)
        write_images(src, numbers)
        summary = run_score(src, out, extend=True)
        assert summary.changes == {"new": len(numbers), "changed": 0, "gone": 0}
        assert summary.listed == summary.done == numbers.stop
        assert summary.shards_resumed == len(before)
        assert before.items() <= read_parts(out).items()
        assert verify_files(out) == []
    whole = run_score(src, tmp_path / "whole")
    assert read_rows(out) == read_rows(tmp_path / "whole")
    assert (summary.called_fake, summary.labels) == (whole.called_fake, whole.labels)
    said: list[str] = []
    again = run_score(src, out, said.append, extend=True)
    assert again.changes == {"new": 0, "changed": 0, "gone": 0}
    assert "score: 0 new images" in said
    assert any(line.startswith("score: finished 20") for line in said)
    assert [file.name.partition("-")[2] for file in require_run(out).manifest.files] == [
        "00000.parquet"
    ] * 3


def test_what_changed_or_went_is_named_and_its_row_stays(src: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_score(src, out)
    before = read_rows(out)
    (src / "real" / "2.jpg").write_bytes(b"another image")
    os.utime(src / "fake" / "3.jpg", (1, 1))
    (src / "real" / "4.jpg").unlink()
    said: list[str] = []
    summary = run_score(src, out, said.append, extend=True)
    assert summary.changes == {"new": 0, "changed": 2, "gone": 1}
    assert read_rows(out) == before
    named = pq.read_table(out / "_changes.parquet").to_pylist()
    changes = {row["key"]: row["change"] for row in named}
    assert changes == {"real/2.jpg": "changed", "fake/3.jpg": "changed", "real/4.jpg": "gone"}
    (line,) = [line for line in said if "2 changed and 1 gone" in line]
    assert "'real/4.jpg'" in line
    write_images(src, range(10, 12))
    assert run_score(src, out, extend=True).changes == {"new": 2, "changed": 2, "gone": 1}
    assert [row for row in read_rows(out) if row["key"] in {b["key"] for b in before}] == before
    assert verify_files(out) == []


def test_anything_may_happen_at_any_change_of_an_extension(src: Path, tmp_path: Path) -> None:
    out, old, wanted = tmp_path / "out", tmp_path / "old", tmp_path / "wanted"
    run_score(src, old)
    write_images(src, range(10, 17))
    run_score(src, wanted)

    def prepare() -> None:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(old, out)

    def check_half() -> None:
        try:
            is_whole = verify_files(out) == []
        except StorageError:
            is_whole = False
        if is_whole:  # then it is the old one or the new one, and nothing between
            assert read_rows(out) in (read_rows(old), read_rows(wanted))
        assert read_parts(old).items() <= read_parts(out).items()

    def check_whole(may_leave_files: bool) -> None:
        assert read_rows(out) == read_rows(wanted)
        assert verify_files(out) == []
        if not may_leave_files:
            named = {file.name for file in require_run(out).manifest.files}
            assert {path.name for path in (out / "_manifest").iterdir()} == named
            assert not (out / "_attempts").exists()

    num_changes = disturb_every_change(
        lambda: run_score(src, out, extend=True),
        prepare=prepare,
        check_half=check_half,
        check_whole=check_whole,
    )
    assert num_changes > 30


def test_a_run_that_has_not_finished_is_extended_too(src: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_score(src, out)
    (out / "_SUCCESS").unlink()
    (out / "scores" / "part-00001.parquet").unlink()
    write_images(src, range(10, 15))
    assert run_score(src, out, extend=True).done == 15
    run_score(src, tmp_path / "whole")
    assert read_rows(out) == read_rows(tmp_path / "whole")
    assert verify_files(out) == []


def run_first(monkeypatch: pytest.MonkeyPatch, another: Callable[[], object]) -> None:
    """Run another command after the next one has looked at the run, before it extends it."""
    extend_run = driver.extend_run

    def extend_late(plan: RunPlan) -> Any:
        monkeypatch.setattr(driver, "extend_run", extend_run)
        another()
        return extend_run(plan)

    monkeypatch.setattr(driver, "extend_run", extend_late)


def test_two_that_extend_at_once_end_with_one_listing(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run_score(src, out)
    write_images(src, range(10, 15))
    run_first(monkeypatch, lambda: run_score(src, out, extend=True))
    assert run_score(src, out, extend=True).done == 15
    assert len(require_run(out).manifest.list_extents()) == 2
    run_score(src, tmp_path / "whole")
    assert read_rows(out) == read_rows(tmp_path / "whole")
    assert verify_files(out) == []
    write_images(src, range(15, 40))
    with ThreadPoolExecutor(3) as threads:
        runs = [threads.submit(run_score, src, out, extend=True) for _ in range(3)]
    assert [run.result().done for run in runs] == [40] * 3
    assert len(require_run(out).manifest.list_extents()) == 3
    assert run_score(src, out).done == 40
    assert verify_files(out) == []


def test_what_came_while_another_extended_is_added_too(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing can be locked, the slower one lists again."""
    out = tmp_path / "out"
    run_score(src, out)
    write_images(src, range(10, 15))
    monkeypatch.setattr(run_module.fcntl, "flock", refuse_lock)
    freeze = extension.deal_manifest

    def be_slower(*args: Any) -> Any:
        monkeypatch.setattr(extension, "deal_manifest", freeze)
        manifest = freeze(*args)
        write_images(src, range(15, 16))
        assert run_score(src, out, extend=True).done == 16
        write_images(src, range(16, 17))
        return manifest

    monkeypatch.setattr(extension, "deal_manifest", be_slower)
    assert run_score(src, out, extend=True).done == 17
    run_score(src, tmp_path / "whole")
    assert read_rows(out) == read_rows(tmp_path / "whole")
    assert verify_files(out) == []


def test_two_that_extend_at_other_thresholds_leave_those_of_the_second(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run_score(src, out)
    write_images(src, range(10, 15))
    run_first(monkeypatch, lambda: run_score(src, out, extend=True, target_fpr=0.01))
    assert run_score(src, out, extend=True, target_fpr=0.001).done == 15
    run_score(src, tmp_path / "whole", target_fpr=0.001)
    assert read_rows(out) == read_rows(tmp_path / "whole")
    assert verify_files(out) == []

    def leave_unfinished() -> None:
        run_score(src, out, extend=True, target_fpr=0.01)
        (out / "_SUCCESS").unlink()

    run_first(monkeypatch, leave_unfinished)
    with pytest.raises(RunMismatch, match="has not finished"):
        run_score(src, out, extend=True)


def test_verdicts_stay_when_the_source_cannot_be_listed(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run_score(src, out)
    before = read_rows(out)

    def fail(*args: Any) -> None:
        raise StorageError("the store is gone")

    with monkeypatch.context() as patch:
        patch.setattr(extension, "_find_new", fail)
        with pytest.raises(StorageError, match="the store is gone"):
            run_score(src, out, extend=True, target_fpr=0.01)
    assert (out / "_SUCCESS").exists()
    assert read_rows(out) == before
    assert run_score(src, out).done == 10
    assert run_score(src, out, extend=True, target_fpr=0.01).done == 10  # nothing is new
    run_score(src, tmp_path / "whole", target_fpr=0.01)
    assert read_rows(out) == read_rows(tmp_path / "whole")


class Pause:
    """Stops the first command that comes to a step, until it may go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.step = getattr(extension, name)
        self.is_there, self.may_go_on = threading.Event(), threading.Event()
        monkeypatch.setattr(extension, name, self)

    def __call__(self, *args: Any) -> Any:
        if not self.is_there.is_set():
            self.is_there.set()
            assert self.may_go_on.wait(20)
        return self.step(*args)


@pytest.mark.parametrize("has_locks", [True, False])
def test_the_slower_of_two_extensions_ends_well_too(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_locks: bool
) -> None:
    out = tmp_path / "out"
    run_score(src, out)
    write_images(src, range(10, 15))
    monkeypatch.setattr(listed_rows, "MAX_HELD_ROWS", 1)  # so its listing lies in files
    monkeypatch.setattr(run_module.fcntl, "flock", fcntl.flock if has_locks else refuse_lock)
    pause, waits = Pause(monkeypatch, "_find_new"), threading.Event()

    def listen(line: str) -> None:
        if "waiting for another command" in line:
            waits.set()

    with ThreadPoolExecutor(2) as threads:
        slow = threads.submit(run_score, src, out, extend=True)
        assert pause.is_there.wait(20)
        fast = threads.submit(run_score, src, out, listen, extend=True)
        if has_locks:
            assert waits.wait(20)
        else:
            fast.result()
        pause.may_go_on.set()
    assert slow.result().done == fast.result().done == 15
    assert sorted(run.result().changes["new"] for run in (slow, fast)) == [0, 5]
    run_score(src, tmp_path / "whole")
    assert read_rows(out) == read_rows(tmp_path / "whole")
    assert verify_files(out) == []
    assert not list((out / "_manifest").glob(".listing-*"))


def test_other_verdicts_wait_for_an_extension(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run_score(src, out)
    write_images(src, range(10, 15))
    pause, waits = Pause(monkeypatch, "_find_new"), threading.Event()

    def listen(line: str) -> None:
        if "waiting for another command" in line:
            waits.set()

    with ThreadPoolExecutor(2) as threads:
        extending = threads.submit(run_score, src, out, extend=True, target_fpr=0.001)
        assert pause.is_there.wait(20)
        changing = threads.submit(run_score, src, out, listen, target_fpr=0.01)
        assert waits.wait(20)
        pause.may_go_on.set()
    assert extending.result().done == 15
    changed = False
    with suppress(RunMismatch):  # it is refused while the extension works, or follows it
        changed = changing.result().done == 15
    run_score(src, tmp_path / "whole", target_fpr=0.01 if changed else 0.001)
    assert read_rows(out) == read_rows(tmp_path / "whole")


def test_verdicts_that_another_command_has_changed_meanwhile_are_changed_without_scoring(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing can be locked."""
    out, num_scored, finish = tmp_path / "out", 0, StubProcessor.finish

    def count(self: StubProcessor, rows: pa.Table, prepared: Sequence[Any]) -> pa.Table:
        nonlocal num_scored
        num_scored += len(prepared)
        return finish(self, rows, prepared)

    run_score(src, out)
    write_images(src, range(10, 15))
    monkeypatch.setattr(run_module.fcntl, "flock", refuse_lock)
    monkeypatch.setattr(StubProcessor, "finish", count)
    pause = Pause(monkeypatch, "_find_new")
    with ThreadPoolExecutor(1) as threads:
        extending = threads.submit(run_score, src, out, extend=True, target_fpr=0.001)
        assert pause.is_there.wait(20)
        run_score(src, out, target_fpr=0.01)
        pause.may_go_on.set()
    assert extending.result().done == 15
    assert num_scored == 5
    run_score(src, tmp_path / "whole", target_fpr=0.001)
    assert read_rows(out) == read_rows(tmp_path / "whole")


def refuse_lock(descriptor: int, operation: int) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_a_run_that_ends_meanwhile_takes_nothing_from_an_extension(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run_score(src, out)
    (out / "_SUCCESS").unlink()
    write_images(src, range(10, 15))
    pause = Pause(monkeypatch, "describe_listing")  # when the new manifest is written, and unnamed
    with ThreadPoolExecutor(1) as threads:
        extending = threads.submit(run_score, src, out, extend=True)
        assert pause.is_there.wait(20)
        assert run_score(src, out).done == 10
        pause.may_go_on.set()
    assert extending.result().done == 15
    assert verify_files(out) == []


def test_a_manifest_that_is_gone_is_never_named(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a store a command that ends meanwhile may remove it, since nothing can be locked."""
    out = tmp_path / "out"
    run_score(src, out)
    write_images(src, range(10, 15))
    with monkeypatch.context() as patch:
        pause = Pause(patch, "describe_listing")
        pause.may_go_on.set()
        named = {file.name for file in require_run(out).manifest.files}
        patch.setattr(pause, "step", partial(remove_others, out / "_manifest", named, pause.step))
        with pytest.raises(StorageError, match=r"another command .* run the same command again"):
            run_score(src, out, extend=True)
    assert verify_files(out) == []
    assert run_score(src, out, extend=True).done == 15
    assert verify_files(out) == []


def remove_others(folder: Path, names: set[str], step: Any, *args: Any) -> Any:
    for path in folder.iterdir():
        if path.name not in names:
            path.unlink()
    return step(*args)


@pytest.mark.parametrize("ends", [True, False])
def test_a_run_that_is_extended_while_it_works_goes_on_with_the_new_keys(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: bool
) -> None:
    out, said = tmp_path / "out", list[str]()
    finish_batch = driver.finish_batch

    def extend_first(*args: Any) -> BatchSummary:
        """Another command extends the run, and ends or is interrupted, before this one ends."""
        monkeypatch.setattr(driver, "finish_batch", finish_batch if ends else interrupt)
        write_images(src, range(10, 15))
        with nullcontext() if ends else pytest.raises(KeyboardInterrupt):
            run_score(src, out, extend=True)
        monkeypatch.setattr(driver, "finish_batch", finish_batch)
        return finish_batch(*args)

    monkeypatch.setattr(driver, "finish_batch", extend_first)
    assert run_score(src, out, said.append).done == 15
    assert any("another command has extended the run; going on with it" in line for line in said)
    run_score(src, tmp_path / "whole")
    assert read_rows(out) == read_rows(tmp_path / "whole")
    assert verify_files(out) == []


def interrupt(*args: Any) -> BatchSummary:
    raise KeyboardInterrupt


@pytest.mark.parametrize("first", [None, 0.01])
def test_verdicts_and_extensions_go_together(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: float | None
) -> None:
    out, second = tmp_path / "out", 0.001 if first else None
    run_score(src, out, target_fpr=first)
    write_images(src, range(10, 13))
    run_score(src, out, target_fpr=0.01, extend=True)  # both at once
    write_images(src, range(13, 16))
    run_score(src, out, target_fpr=0.01, extend=True)
    with monkeypatch.context() as patch:
        patch.delattr(driver, "LocalPool")  # nothing is scored again
        run_score(src, out, target_fpr=second)  # of all extents
    assert verify_files(out) == []
    write_images(src, range(16, 18))
    said: list[str] = []
    run_score(src, out, said.append, target_fpr=second, extend=True)
    assert not any("deciding again" in line for line in said)
    run_score(src, tmp_path / "whole", target_fpr=second)
    assert read_rows(out) == read_rows(tmp_path / "whole")
    assert verify_files(out) == []


def test_damage_of_old_and_new_shards_is_repaired(src: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_score(src, out)
    write_images(src, range(10, 15))
    run_score(src, out, extend=True)
    before = read_rows(out)
    names = sorted(read_parts(out))
    for name in (names[0], names[-1]):
        (out / "scores" / name).write_bytes(b"PAR1")
    damage = find_damage(out)
    assert damage is not None
    assert [item.name for item in damage] == [f"scores/{names[0]}", f"scores/{names[-1]}"]
    run_verb(RepairConfig(out=str(out)), time.monotonic())
    assert verify_files(out) == []
    assert read_rows(out) == before
    file = tmp_path / "scores.parquet"
    assert export_scores(out, file, ExportConfig(src=str(out), file=str(file))) == 15


def test_the_card_for_hugging_face_names_new_shards(tmp_path: Path) -> None:
    src, out = tmp_path / "src", tmp_path / "out"
    write_images(src / "train", range(3))
    run_score(src, out)
    write_images(src / "test", range(3, 6))
    run_score(src, out, extend=True)
    card = out / ".huggingface.yaml"
    assert "split: test" in card.read_text()
    card.write_text("mine")
    write_images(src / "test", range(6, 9))
    run_score(src, out, extend=True)
    assert card.read_text() == "mine"


def test_tables_that_keep_their_order_are_extended(tmp_path: Path) -> None:
    src, out = tmp_path / "src", tmp_path / "out"
    src.mkdir()

    def write_table(name: str, numbers: range) -> None:
        images = [{"bytes": b"%d" % number, "path": f"{number}.png"} for number in numbers]
        keys = [f"k{number}" for number in numbers]
        pq.write_table(pa.table({"key": keys, "image": images}), src / name, row_group_size=2)

    write_table("a.parquet", range(5))
    run_score(src, out)
    write_table("b.parquet", range(5, 8))
    write_table("a.parquet", range(4))
    summary = run_score(src, out, extend=True)
    assert summary.changes == {"new": 3, "changed": 4, "gone": 1}
    assert [row["key"] for row in read_rows(out)] == [f"k{number}" for number in range(8)]
    assert not any(row["error"] for row in read_rows(out))
    assert verify_files(out) == []


def test_a_list_with_other_columns_or_a_key_twice_is_refused(src: Path, tmp_path: Path) -> None:
    listed, out = tmp_path / "list.csv", tmp_path / "out"
    listed.write_text("path,rating\nsrc/real/0.jpg,1\n")
    run_score(listed, out)
    for text, message in (
        ("path,rating,new\nsrc/real/0.jpg,1,2\nsrc/real/2.jpg,1,2\n", r"other columns.*new"),
        ("path,rating\nsrc/real/0.jpg,1\nsrc/real/0.jpg,1\n", "listed twice"),
        ("path,rating\nsrc/real/2.jpg,1\nsrc/real/2.jpg,1\n", "listed twice"),
    ):
        listed.write_text(text)
        with pytest.raises(UsageError, match=message):
            run_score(listed, out, extend=True)
        assert verify_files(out) == []
        assert len(read_rows(out)) == 1
    listed.write_text("path,rating\nsrc/real/0.jpg,1\nsrc/real/2.jpg,5\n")
    run_score(listed, out, extend=True)
    assert [row["rating"] for row in read_rows(out)] == ["1", "5"]


def test_an_extension_keeps_the_settings_of_its_run(src: Path, tmp_path: Path) -> None:
    run_score(src, tmp_path / "out", limit=3)
    with pytest.raises(RunMismatch, match="limit: 3 there"):
        run_score(src, tmp_path / "out", extend=True)
    for options in ({"limit": 1}, {"sample": 1}, {"dry_run": True}):
        with pytest.raises(UsageError, match="--extend scores all new images"):
            ScoreConfig(src="a", out="b", extend=True, **options)  # type: ignore[arg-type]


def test_decisions_follow_an_extension(src: Path, tmp_path: Path) -> None:
    out, decisions = tmp_path / "out", tmp_path / "decisions"
    run_score(src, out)
    settled = tmp_path / "settled.csv"
    settled.write_text("key,verdict,by\nreal/0.jpg,fake,ann\nreal/10.jpg,fake,bo\n")
    config: dict[str, Any] = {"src": str(out), "out": str(decisions), "target_fpr": 0.6}
    run_verb(DecideConfig(**config, settled=str(settled)), time.monotonic())
    write_images(src, range(10, 15))
    run_score(src, out, extend=True)
    policy = str(decisions / "policy.json")
    result, _ = run_verb(
        DecideConfig(src=str(out), out=str(decisions), policy=policy), time.monotonic()
    )
    assert (result["shards_resumed"], result["shards_total"], result["settled"]) == (3, 5, 2)
    rows = {row["key"]: row for row in pq.read_table(decisions / "decisions").to_pylist()}
    assert len(rows) == 15
    assert (rows["real/10.jpg"]["verdict"], rows["real/10.jpg"]["decided_by"]) == ("FAKE", "bo")
    assert np.isfinite(rows["real/12.jpg"]["threshold"])
