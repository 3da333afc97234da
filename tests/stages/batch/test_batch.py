"""The batch spine: what --retry-errors redoes, what a stall says, what is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray import cloudpickle

from cifake_ray.config import ConvertConfig, SampleConfig
from cifake_ray.core.processing.convert import ConvertProcessor
from cifake_ray.core.schema import IMAGE_ERRORS, RETRYABLE_ERRORS
from cifake_ray.errors import ImageError, ResourceError, StorageError
from cifake_ray.stages.batch import image_batches, ray_pool
from cifake_ray.stages.batch.driver import run_batch
from cifake_ray.stages.batch.image_batches import slice_rows
from cifake_ray.stages.batch.plan import BatchPlan
from cifake_ray.stages.batch.shard_worker import (
    ShardWorker,
    WorkerOptions,
    WorkerTask,
    replace_rows,
)
from cifake_ray.stages.batch.summary import BatchSummary
from cifake_ray.stages.batch.watchdog import watch_progress
from cifake_ray.stages.convert import MakeConvertProcessor
from cifake_ray.stages.resources import ONE_WORKER
from cifake_ray.storage.datasets.sample_folder import write_sample
from cifake_ray.storage.runs.attempts import follow_attempt, write_attempt
from cifake_ray.storage.runs.manifest import Manifest
from cifake_ray.storage.runs.run import Run
from cifake_ray.storage.runs.verify import verify_files
from cifake_ray.storage.sources.open_source import open_source
from cifake_ray.storage.sources.source import Listing

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not know the tests


@dataclass(frozen=True)
class FlakySource:
    """A folder of which some images cannot be read yet; it notes what is asked for."""

    folder: Any
    errors: dict[str, str]  # key -> error
    log: Path

    def list_images(self, *parts: Any, **options: Any) -> Listing:
        listing: Listing = self.folder.list_images(*parts, **options)
        return listing

    def read_images(self, rows: pa.Table) -> Iterator[bytes | ImageError]:
        keys = rows.column("key").to_pylist()
        with open(self.log, "a") as file:
            file.writelines(f"{key}\n" for key in keys)
        for key, image in zip(keys, self.folder.read_images(rows), strict=True):
            error = self.errors.get(key)
            yield ImageError(error, "not now") if error else image


@dataclass
class Bench:
    """A convert run over a FlakySource, again and again."""

    images: Path
    out: Path
    log: Path

    def run(self, errors: dict[str, str], **options: Any) -> BatchSummary:
        on_progress = options.pop("on_progress", lambda progress: None)
        config = ConvertConfig(src=str(self.images), out=str(self.out), shard_size=20, **options)
        folder = open_source(config, self.images, self.out)
        self.log.write_text("")
        summary = run_batch(
            BatchPlan(
                command="convert",
                config=config,
                out=self.out,
                source=FlakySource(folder, errors, self.log),
                paths={},
                make_processor=MakeConvertProcessor(None),
                on_progress=on_progress,
                started_s=time.monotonic(),
                log=print,
            )
        )
        assert isinstance(summary, BatchSummary)
        return summary

    def read_keys(self) -> list[str]:
        """What was fetched in the last run."""
        return sorted(self.log.read_text().splitlines())

    def read_parts(self) -> dict[str, pa.Table]:
        return {path.name: pq.read_table(path) for path in sorted(self.out.glob("shards/part-*"))}

    def stamps(self) -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in self.out.glob("shards/part-*")}


@pytest.fixture
def bench(tmp_path: Path, ray_cluster: None) -> Bench:
    images = write_sample(SampleConfig(out=str(tmp_path / "images"), images=100))
    return Bench(images, tmp_path / "out", tmp_path / "log")


@pytest.fixture
def expected(bench: Bench) -> dict[str, pa.Table]:
    """The parts of a run in which everything could be read."""
    whole = replace(bench, out=bench.out.parent / "whole")
    whole.run({})
    return whole.read_parts()


def choose_keys(expected: dict[str, pa.Table]) -> list[str]:
    """Two of the first part, one of the third and one of the last."""
    parts = [table["key"].to_pylist() for table in expected.values()]
    return [parts[0][0], parts[0][13], parts[2][7], parts[-1][-1]]


def test_retryable_errors_are_errors() -> None:
    assert set(RETRYABLE_ERRORS) < set(IMAGE_ERRORS)


def test_only_rows_whose_error_may_pass_are_tried_again(
    bench: Bench, expected: dict[str, pa.Table]
) -> None:
    first, second, third, gone = choose_keys(expected)
    errors = {first: "io_throttled", second: "io_network", third: "denied", gone: "not_found"}
    summary = bench.run(errors)
    assert (summary.done, summary.failed) == (96, 4)
    before = bench.stamps()
    assert bench.run({}) == summary, "without the flag a finished run stays as it is"
    assert bench.read_keys() == []
    summary = bench.run({third: "io_network", gone: "not_found"}, retry_errors=True)
    assert bench.read_keys() == sorted([first, second, third])
    assert summary.errors == {"io_network": 1, "not_found": 1}
    assert (summary.listed, summary.done) == (100, 98)
    assert summary.shards_resumed == len(expected) - 2
    changed = {name for name, stamp in bench.stamps().items() if stamp != before[name]}
    assert changed == {"part-00000.parquet", "part-00002.parquet"}
    assert verify_files(bench.out) == []
    bench.run({gone: "not_found"}, retry_errors=True)
    assert bench.read_keys() == [third]
    parts = bench.read_parts()
    *others, last = expected
    for name in others:
        assert parts[name] == expected[name]
        assert parts[name].schema.metadata[b"huggingface"]
    row = parts[last].to_pylist()[-1]
    assert (row["key"], row["error"], row["image"]["bytes"]) == (gone, "not_found", None)


def make_run(out: Path) -> Run:
    return Run(out, "convert", {}, {}, Manifest((), 0, 0), {})


@dataclass
class Stream:
    """Reports that come late, as Ray's do; it notes in which thread it runs and how it ends."""

    pauses_s: list[float]
    error: Exception | None = None
    threads: set[str] = field(default_factory=set)
    is_closed: bool = False

    def read(self) -> Generator[float, None, None]:
        try:
            for pause_s in self.pauses_s:
                self.threads.add(threading.current_thread().name)
                time.sleep(pause_s)
                yield pause_s
            if self.error is not None:
                raise self.error
        finally:
            self.is_closed = True


def test_a_run_that_stands_still_ends_and_names_what_it_waited_for(
    tmp_path: Path,
) -> None:
    run = make_run(tmp_path)
    write_attempt(run, replace(follow_attempt(None, 42, "mine"), rows_done=512))
    write_attempt(run, follow_attempt(None, 43, "another"))
    stream = Stream([0.0, 8.0])
    reports = watch_progress(stream.read(), run, "mine", 1.0, lambda: "2 workers")
    assert next(reports) == 0.0
    started_s = time.monotonic()
    with pytest.raises(
        ResourceError, match=r"no progress for 1 s: waiting for shard 42 \(attempt.*2 workers"
    ):
        next(reports)
    assert time.monotonic() - started_s < 7.0, "it waited for the thread"


STOPPED_DRIVER = """
import sys, time
from pathlib import Path
from cifake_ray.stages.batch.watchdog import watch_progress
sys.path.insert(0, sys.argv[2])
from test_batch import make_run

def report():
    print("started", flush=True)
    for _ in range(20):
        time.sleep(0.1)
    yield "done"

print(*watch_progress(report(), make_run(Path(sys.argv[1])), "mine", 3.0, lambda: "2 workers"))
"""


def test_a_driver_that_was_stopped_for_longer_does_not_stand_still(tmp_path: Path) -> None:
    """As by Ctrl-Z and `fg`: its workers had no time either."""
    command = [sys.executable, "-c", STOPPED_DRIVER, str(tmp_path), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "started\n"
        time.sleep(0.5)
        driver.send_signal(signal.SIGSTOP)
        time.sleep(4.0)
        driver.send_signal(signal.SIGCONT)
        assert driver.communicate(timeout=60)[0] == "done\n"


def test_a_heartbeat_that_changes_is_progress(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    attempt = follow_attempt(None, 0, "mine")

    def beat() -> None:
        for steps in range(25):
            write_attempt(run, replace(attempt, steps=steps))
            time.sleep(0.1)

    with ThreadPoolExecutor(1) as worker:
        worker.submit(beat)
        assert list(
            watch_progress(Stream([2.0]).read(), run, "mine", 1.0, lambda: "2 workers")
        ) == [2.0]


def test_reports_are_progress_and_what_follows_them_is_raised(tmp_path: Path) -> None:
    stream = Stream([0.5] * 4, StorageError("the disk is full"))
    reports = watch_progress(stream.read(), make_run(tmp_path), "mine", 1.0, lambda: "2 workers")
    assert [next(reports) for _ in range(4)] == [0.5] * 4
    with pytest.raises(StorageError, match="the disk is full"):
        next(reports)
    assert threading.current_thread().name not in stream.threads


class DyingActor:
    """Works on a shard for longer than the driver waits, then dies."""

    def __init__(self, task: WorkerTask) -> None:
        pass

    def get_ready(self) -> None:
        pass

    def report_shard(self, shard: int) -> None:
        time.sleep(3.0)
        os._exit(1)


def test_after_a_stall_no_thread_hands_out_shards_on_a_ray_that_goes_on(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []
    give = ray_pool._ActorSlot.give

    def note(slot: Any, shard: int) -> None:
        given.append(shard)
        give(slot, shard)

    monkeypatch.setattr(ray_pool, "ShardActor", DyingActor)
    monkeypatch.setattr(ray_pool._ActorSlot, "give", note)
    before = set(threading.enumerate())
    with pytest.raises(ResourceError, match="no progress for 2 s"):
        bench.run({}, num_workers=1, stall_timeout_s=2.0)
    num_given = len(given)
    left = [t for t in set(threading.enumerate()) - before if "ThreadPool" in t.name]
    time.sleep(6.0)  # in which the worker dies, and would be replaced
    assert len(given) == num_given
    assert not any(thread.is_alive() for thread in left)


def test_what_interrupts_the_reader_ends_the_stream(tmp_path: Path) -> None:
    stream = Stream([0.0, 0.0])
    reports = watch_progress(stream.read(), make_run(tmp_path), "mine", 60.0, lambda: "2 workers")
    next(reports)
    with pytest.raises(KeyboardInterrupt):
        reports.throw(KeyboardInterrupt())
    assert stream.is_closed


@pytest.mark.parametrize("places", [[], [0], [4], [1, 2], [0, 1, 2, 3, 4]])
def test_rows_are_replaced_where_they_stand(places: list[int]) -> None:
    table = pa.table({"x": [0, 1, 2, 3, 4]})
    new = pa.table({"x": [10 + place for place in places]}, schema=table.schema)
    wanted = [10 + n if n in places else n for n in range(5)]
    assert replace_rows(table, np.array(places, int), new)["x"].to_pylist() == wanted


def test_slices_are_bounded_by_rows_and_by_bytes() -> None:
    sizes = [1, 1, 1, 300 * 2**20, 1, 1, None]
    rows = pa.table({"size_bytes": pa.array(sizes, pa.int64())})
    assert [s.num_rows for s in slice_rows(rows, 2)] == [2, 1, 1, 2, 1]


class PairProcessor(ConvertProcessor):
    def __init__(self) -> None:
        super().__init__()
        self.batch_size = 2


@dataclass
class CountedReads:
    """Says how many images were asked for when each was taken."""

    taken: list[int]

    def read_images(self, rows: pa.Table) -> Iterator[bytes]:
        for _ in range(rows.num_rows):
            self.taken.append(rows.num_rows)
            yield b"x" * 10


@pytest.mark.parametrize(("max_bytes", "sizes"), [(21, [2, 2, 1]), (20, [2, 2, 1]), (9, [1] * 5)])
def test_a_shard_is_asked_for_at_once_and_worked_on_in_batches(
    monkeypatch: pytest.MonkeyPatch, max_bytes: int, sizes: list[int]
) -> None:
    """Of bounded bytes too, though the listing does not say how many there are."""
    monkeypatch.setattr(image_batches, "MAX_BATCH_BYTES", max_bytes)
    source: Any = CountedReads([])
    run: Any = SimpleNamespace(command="convert")
    task = WorkerTask(
        run=run,
        source=source,
        make_processor=lambda placement: PairProcessor(),
        placement=ONE_WORKER,
        options=WorkerOptions("", False, 60.0),
    )
    worker = ShardWorker(task)
    heartbeat: Any = SimpleNamespace(beat=lambda: None)
    rows = pa.table({"size_bytes": pa.nulls(5, pa.int64()), "row": range(5)})
    batches = list(worker._prepare(rows, heartbeat, is_suspect=False))
    assert [len(batch.prepared) for batch in batches] == sizes
    assert pa.concat_tables(batch.rows for batch in batches) == rows
    assert source.taken == [5] * 5
