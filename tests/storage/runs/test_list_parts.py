"""Listing by workers: the same manifest whoever lists and deals, and no key twice or lost."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cifake_ray.core.schema import MANIFEST_FIELDS
from cifake_ray.errors import ImageError, StorageError, UsageError
from cifake_ray.stages.batch.local_pool import LocalPool
from cifake_ray.stages.batch.task_pool import RayPool
from cifake_ray.stages.resources import Placement
from cifake_ray.storage.runs import listed_rows, manifest
from cifake_ray.storage.runs.list_parts import (
    THIS_PROCESS,
    PartTask,
    TaskPool,
    read_record,
    write_record,
)
from cifake_ray.storage.runs.listed_rows import ListedRows
from cifake_ray.storage.runs.run import Run
from cifake_ray.storage.runs.run_plan import RunPlan
from cifake_ray.storage.sources.source import Listing, Part, batch_rows

SCHEMA = pa.schema(MANIFEST_FIELDS)
SPLITS = ("train", "val", None, "a split of another name")
NUM_PARTS, PART_SIZE = 20, 50


@dataclass
class Keys:
    """Keys in parts; a listing stops after some of them."""

    twice: str | None = None  # a key that is in the last part as well
    listed: list[Part] = field(default_factory=list)  # in this process

    def list_images(
        self, parts: Sequence[Part] | None = None, max_rows: int | None = None
    ) -> Listing:
        todo = [str(part) for part in parts or map(str, range(NUM_PARTS))]
        listing = Listing(iter(()))

        def list_rows() -> Iterator[tuple[Any, ...]]:
            for part in todo[:3] if max_rows else todo:
                self.listed.append(part)
                for n in range(int(part) * PART_SIZE, (int(part) + 1) * PART_SIZE):
                    split, source = SPLITS[n % 7 % len(SPLITS)], f"part {part}"
                    yield f"{n}.jpg", f"at/{n}", None, n, None, f"e{n}", n % 2, split, source, None
            if self.twice is not None and todo[-1] == str(NUM_PARTS - 1):
                yield self.twice, *[None] * 9
            listing.left = [*todo[3:]] if max_rows else []
            listing.left_out["sidecar"] += 1

        listing.batches = batch_rows(list_rows(), SCHEMA)
        return listing

    def read_images(self, rows: pa.Table) -> Iterator[bytes | ImageError]:
        raise AssertionError("no image is read")


def make_plan(
    out: Path,
    source: Keys,
    workers: TaskPool = THIS_PROCESS,
    log: Callable[[str], None] = lambda message: None,
    *,
    whole: bool = False,
) -> RunPlan:
    def list_source() -> Listing:
        listing = source.list_images(max_rows=None if whole else 100)
        listing.count_rows(describe=True)
        return listing

    return RunPlan(
        out=out,
        command="score",
        settings={},
        config={},
        list_source=list_source,
        shard_rows=16,
        source=source,
        workers=workers,
        needs_labels=True,
        log=log,
    )


@pytest.fixture
def undisturbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The run that one process lists at once, in memory."""
    monkeypatch.setattr(manifest, "SHARDS_PER_FILE", 8)
    return make_plan(tmp_path / "undisturbed", Keys(), whole=True).open()


def check_same(run: Run, undisturbed: Run) -> None:
    assert run.identity == undisturbed.identity
    assert run.counts == undisturbed.counts
    rows = pa.concat_tables(pq.read_table(path) for path in find_files(run))
    assert sorted(rows.column("key").to_pylist()) == sorted(
        f"{n}.jpg" for n in range(NUM_PARTS * PART_SIZE)
    )


def find_files(run: Run) -> list[Path]:
    return [Path(run.manifest_folder / file.name) for file in run.manifest.files]


def find_listed(out: Path) -> list[Path]:
    return list(out.glob("_manifest/.listing-*"))


def test_the_manifest_is_the_same_when_parts_are_listed_apart(
    tmp_path: Path, undisturbed: Run
) -> None:
    notes = list[str]()
    run = make_plan(tmp_path / "out", Keys(), log=notes.append).open()
    check_same(run, undisturbed)
    assert run.left_out == {"sidecar": 7}  # of 7 listings of 3 parts
    assert not find_listed(run.out)
    assert any("listed 1,000 keys" in note for note in notes)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_manifest_is_the_same_with_processes(
    tmp_path: Path, undisturbed: Run, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the workers do not know of it
    with LocalPool(Placement(num_workers, 1, 0)) as pool:
        run = make_plan(tmp_path / "out", Keys(), pool).open()
    whole = make_plan(tmp_path / "whole", Keys(), whole=True).open()
    check_same(run, whole)
    assert not find_listed(run.out)


@pytest.mark.cluster
def test_the_manifest_is_the_same_on_ray(tmp_path: Path, ray_cluster: None) -> None:
    import sys

    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    run = make_plan(tmp_path / "out", Keys(), RayPool(Placement(2, 1, 0))).open()
    check_same(run, make_plan(tmp_path / "whole", Keys(), whole=True).open())


@pytest.mark.parametrize("max_rows", [10, 300])
def test_the_manifest_does_not_depend_on_what_memory_holds(
    tmp_path: Path, undisturbed: Run, max_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listed_rows, "MAX_HELD_ROWS", max_rows)
    check_same(make_plan(tmp_path / "parts", Keys()).open(), undisturbed)
    check_same(make_plan(tmp_path / "whole", Keys(), whole=True).open(), undisturbed)


@dataclass
class Stopped:
    """Workers that are stopped at the start of a piece of work, or after some of its items."""

    works: list[int]  # items of each piece of work that are done before the stop
    num_workers = 1

    def map_items(self, work: Callable[[Any], Any], items: deque[Any]) -> Iterator[Any]:
        num_items = self.works.pop(0)
        for number, result in enumerate(THIS_PROCESS.map_items(work, items)):
            yield result
            if number + 1 == num_items:
                raise KeyboardInterrupt
        if num_items == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("works", [[2], [99, -1], [99, 1]], ids=["listing", "between", "dealing"])
def test_a_listing_that_was_stopped_goes_on(
    tmp_path: Path, undisturbed: Run, works: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, notes = Keys(), list[str]()
    stopped = Stopped(list(works))
    if works[-1] == -1:

        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(manifest, "plan_shards", stop)
            with pytest.raises(KeyboardInterrupt):
                make_plan(tmp_path / "out", source, stopped).open()
    else:
        with pytest.raises(KeyboardInterrupt):
            make_plan(tmp_path / "out", source, stopped).open()
    assert find_listed(tmp_path / "out")
    run = make_plan(tmp_path / "out", source, log=notes.append).open()
    check_same(run, undisturbed)
    assert not find_listed(run.out)
    assert len(source.listed) == len(set(source.listed)) == NUM_PARTS  # none a second time
    assert "going on with a listing that was stopped" in notes[0]


def test_a_key_in_two_parts_is_refused_and_nothing_stays(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"listed twice, such as '0\.jpg'"):
        make_plan(tmp_path / "out", Keys(twice="0.jpg")).open()
    assert not find_listed(tmp_path / "out")
    make_plan(tmp_path / "out", Keys()).open()  # the source was mended


def test_what_was_listed_stays_when_the_store_fails(tmp_path: Path, undisturbed: Run) -> None:
    class Failing(Keys):
        def list_images(
            self, parts: Sequence[Part] | None = None, max_rows: int | None = None
        ) -> Listing:
            if len(self.listed) >= 6:
                raise StorageError("the store does not answer")
            return super().list_images(parts, max_rows)

    source = Failing()
    with pytest.raises(StorageError, match="does not answer"):
        make_plan(tmp_path / "out", source).open()
    rest = Keys()
    check_same(make_plan(tmp_path / "out", rest).open(), undisturbed)
    assert sorted(map(int, source.listed + rest.listed)) == list(range(NUM_PARTS))


def test_two_processes_may_list_the_same_parts(tmp_path: Path) -> None:
    records = []
    for num_keys in (5, 7):  # they stop at different keys
        rows, listing = ListedRows(tmp_path / "listed"), Listing(iter(()))
        listing.left = [str(num_keys)]
        values = [(f"{n}", *[None] * 9) for n in range(num_keys)]
        for batch in batch_rows(values, SCHEMA):
            rows.add(batch)
        records.append(write_record(PartTask(["a"], 1), listing, rows))
    assert records[0] == records[1] == read_record(tmp_path / "listed", ["a"], listing)
    assert records[0].left == [["5"]]


def test_another_process_may_freeze_its_listing_first(tmp_path: Path, undisturbed: Run) -> None:
    """And remove the files of a listing that both use."""
    runs = []

    class Slow(Stopped):
        def map_items(self, work: Callable[[Any], Any], items: deque[Any]) -> Iterator[Any]:
            yield from THIS_PROCESS.map_items(work, items)
            if not runs:
                runs.append(make_plan(tmp_path / "out", Keys()).freeze())

    run = make_plan(tmp_path / "out", Keys(), Slow([])).open()
    assert run.manifest == runs[0].manifest
    check_same(run, undisturbed)
    assert not find_listed(run.out)


def test_files_of_a_listing_that_are_damaged_are_named(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        make_plan(tmp_path / "out", Keys(), Stopped([2])).open()
    folder = find_listed(tmp_path / "out")[0]
    data = next(folder.glob("*.rows"))
    content = data.read_bytes()
    data.write_bytes(content[: len(content) // 2])
    with pytest.raises(StorageError, match=r"\.rows: what was listed is damaged"):
        make_plan(tmp_path / "out", Keys()).open()
    record = next(folder.glob("*.json"))
    record.write_text(record.read_text().replace('"rows": [[', '"rows": [[1], ['))
    with pytest.raises(StorageError, match="not a record of a listing"):
        make_plan(tmp_path / "out", Keys()).open()
