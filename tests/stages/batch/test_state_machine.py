"""The life of a batch run: hypothesis runs, kills, damages, verifies and repairs one output.

Everything is real but Ray, the detector, the child process of the quarantine, and the disk, which
can kill the process that writes to it (`computer`). The model knows the rows that each shard must
hold. CIFAKE_TEST_EXAMPLES=2000 makes a long, random search.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from computer import Computer, Killed, Trigger
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from PIL import Image
from upath import UPath

from cifake_ray import pipeline
from cifake_ray.config import ConvertConfig, RepairConfig, ScoreConfig, fields
from cifake_ray.core.processing.convert import ConvertProcessor
from cifake_ray.core.processing.processor import assemble_rows
from cifake_ray.core.schema import RETRYABLE_ERRORS, SCHEMA_VERSION, SCORE_FIELDS
from cifake_ray.errors import ImageError, RunMismatch, StorageError
from cifake_ray.stages import convert, score
from cifake_ray.stages.batch import shard_worker
from cifake_ray.stages.batch.summary import BatchSummary
from cifake_ray.stages.resources import Placement
from cifake_ray.storage.bundles.bundle import BundleInfo
from cifake_ray.storage.io.files import check_writable
from cifake_ray.storage.io.paths import AnyPath
from cifake_ray.storage.runs.run_plan import RunPlan
from cifake_ray.storage.runs.verify import DamagedFile, verify_files

NUM_KEYS, SHARD_SIZE = 8, 3  # 3 shards
GOOD, EMPTY, WORDS, CRASH = "good", "empty", "words", "crash"  # what a file may hold
EXAMPLES = int(os.environ.get("CIFAKE_TEST_EXAMPLES", "0"))

Rows = list[dict[str, Any]]


@cache
def make_content(number: int, kind: str) -> bytes:
    """The bytes of an image, each of another size."""
    buffer = io.BytesIO()
    Image.new("RGB", (number + 1, 3), (number, 0, 0)).save(buffer, "PNG")
    tail = b"CRASH" if kind == CRASH else b""
    return {EMPTY: b"", WORDS: b"words" * (number + 1)}.get(kind, buffer.getvalue() + tail)


def make_key(number: int) -> str:
    return f"{('real', 'fake')[number % 2]}/{number}.png"


class World:
    """The images as they are now, and what happens to a process that touches them."""

    def __init__(self, root: Path, kinds: Sequence[str]) -> None:
        self.root = root
        self.errors: dict[str, str] = {}  # key -> error of the store, for now
        self.decoder_crashes = True
        self.images: dict[str, tuple[int, bytes]] = {}  # key -> version and bytes
        self.asked: set[str] = set()
        self.computer = Computer()
        self.kinds = kinds
        for number in range(len(kinds)):
            self.write_version(number, 1)

    def write_version(self, number: int, version: int) -> None:
        kind = self.kinds[number] if version == 1 else WORDS
        self.write(make_key(number), make_content(number + 10 * version, kind), version)

    def write(self, key: str, data: bytes, version: int) -> None:
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        os.utime(path, ns=(version, version))
        self.images[key] = version, data

    def remove(self, key: str) -> None:
        (self.root / key).unlink(missing_ok=True)
        self.images.pop(key, None)

    def read(self, key: str, listed_version: int) -> bytes | ImageError:
        """What a run must get for a key that it has listed."""
        if key in self.errors:
            return ImageError(self.errors[key], "not now")
        version, data = self.images.get(key, (0, b""))
        if not version:
            return ImageError("not_found", "the file is gone")
        if version != listed_version:
            return ImageError("changed", "the file changed after it was listed")
        return self.quarantine(data)

    def quarantine(self, image: bytes | ImageError) -> bytes | ImageError:
        """The image itself, or what it gets when it kills the process that decodes it."""
        if isinstance(image, ImageError) or not image.endswith(b"CRASH"):
            return image
        if not self.decoder_crashes:
            return image
        return ImageError("worker_crash", "the decoder died with signal 11")

    def decode(self, images: Any) -> list[bytes | ImageError]:
        """What every processor of these tests does first."""
        taken = list(images)
        if any(image is not self.quarantine(image) for image in taken):
            self.computer.kill_process()
        return taken


@dataclass(frozen=True)
class FlakySource:
    """A source of which some keys cannot be read now; it notes what is asked for."""

    source: Any
    world: World

    def list_images(self, *parts: Any, **options: Any) -> Any:
        return self.source.list_images(*parts, **options)

    def read_images(self, rows: pa.Table) -> Iterator[bytes | ImageError]:
        keys = rows.column("key").to_pylist()
        for key, image in zip(keys, self.source.read_images(rows), strict=True):
            self.world.asked.add(key)
            error = self.world.errors.get(key)
            yield ImageError(error, "not now") if error else image


class StubQuarantine:
    """Tries images without a child process."""

    world: World

    def __init__(self, *, decodes: bool, timeout_s: float) -> None:
        pass

    def __enter__(self) -> StubQuarantine:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def try_images(
        self, images: Sequence[bytes | ImageError], on_step: Callable[[], None]
    ) -> list[bytes | ImageError]:
        return [self.world.quarantine(image) for image in images]


class StubScoreProcessor:
    """A detector whose score is a pure function of the bytes."""

    batch_size = 2
    decodes = True
    image_bytes = 1

    def __init__(self) -> None:
        self.footer = {"bundle": "stub"}
        self.prepare: Any = list

    def finish(self, rows: pa.Table, prepared: Sequence[bytes | ImageError]) -> pa.Table:
        errors = [
            image
            if isinstance(image, ImageError)
            else (None if image else ImageError("empty", "zero bytes"))
            for image in prepared
        ]
        logit = [
            None if error else float(hashlib.sha256(image).digest()[0])
            for error, image in zip(errors, prepared, strict=True)
        ]
        columns = {"logit": logit, "p_fake": logit, "is_fake": [x and x > 99 for x in logit]}
        return assemble_rows(SCORE_FIELDS, rows, columns, [None] * len(errors), errors)

    def count_unlike(self, rows: pa.Table) -> dict[str, int]:
        count = sum(1 for logit in rows.column("logit").to_pylist() if logit and logit > 50)
        return {"size": count, "format": 0, "jpeg_quality": 0, "any": count}


# What takes milliseconds and is always the same.
read_bundle_info = cache(score.read_bundle_info)
doc_of = cache(fields.doc_of)


def read_default_bundle(path: AnyPath, **options: Any) -> BundleInfo:
    return read_bundle_info(path)


def read_table(data: bytes) -> pa.Table:
    return pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)


def cut_footer(data: bytes) -> bytes:
    """The footer of a Parquet file, with its length and the magic bytes behind it."""
    return data[-8 - int.from_bytes(data[-8:-4], "little") :]


def list_manifest(files: dict[str, bytes]) -> list[str]:
    """The files of the listing that was frozen."""
    return [
        f"_manifest/{file['name']}" for file in json.loads(files["_run.json"])["manifest"]["files"]
    ]


def read_summary(files: dict[str, bytes]) -> BatchSummary:
    record = json.loads(files["_SUCCESS"])
    return BatchSummary(**{name: record[name] for name in BatchSummary.__dataclass_fields__})


@dataclass
class Plan:
    """What was frozen: the manifest rows of each shard, and the version of each key."""

    shards: list[pa.Table]
    versions: dict[str, int]


EVENTS = ("kill_command", "kill_process", "fill_disk", "break_disk", "lose_names", "lose_bytes")
# The n-th change of a folder, or of the files that lie directly in the output.
PLACES = st.one_of(
    st.tuples(st.just(""), st.integers(1, 12)),
    st.tuples(st.just("results"), st.integers(1, 8)),
    st.tuples(st.just("attempts"), st.integers(1, 12)),
    st.tuples(st.just("manifest"), st.integers(1, 5)),
)
CHANGES = st.one_of(
    st.tuples(st.sampled_from(RETRYABLE_ERRORS[:3]), st.integers(0, NUM_KEYS - 1)),
    st.tuples(
        st.sampled_from(["heal", "change", "restore", "remove"]), st.integers(1, NUM_KEYS - 1)
    ),
    st.tuples(st.sampled_from(["mend decoder", "break decoder", "add"]), st.just(0)),
)


class BatchRunMachine(RuleBasedStateMachine):
    """One output, many commands. `good` is the last thing that a run has committed."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.folder = Path(tempfile.mkdtemp())
        self.plan: Plan | None = None
        self.good: dict[int, bytes] = {}  # shard -> what was committed
        self.rows: dict[int, Rows] = {}  # shard -> what that must hold
        self.committed: list[bytes] = []  # the shards of a finished run
        self.summary: BatchSummary | None = None  # of a finished run

    @initialize(
        verb=st.sampled_from(["convert", "score"]),
        is_bucket=st.booleans(),
        kinds=st.lists(
            st.sampled_from([GOOD, EMPTY, WORDS, CRASH]), min_size=NUM_KEYS, max_size=NUM_KEYS
        ),
    )
    def set_up(self, verb: str, is_bucket: bool, kinds: list[str]) -> None:
        self.world = world = World(self.folder / "images", kinds)
        self.computer = world.computer
        self.computer.install(self.patch)
        self.out: AnyPath = UPath("memory://bucket/out") if is_bucket else self.folder / "out"
        self.config: Any = {"convert": ConvertConfig, "score": ScoreConfig}[verb]
        self.results = {"convert": "shards", "score": "scores"}[verb]
        self.make_processor = {"convert": ConvertProcessor, "score": StubScoreProcessor}[verb]

        def make_processor(placement: Placement) -> Any:
            processor = self.make_processor()
            processor.batch_size, processor.prepare = 2, world.decode
            return processor

        if is_bucket:  # a run refuses memory, which its workers do not share
            self.patch.setattr(RunPlan, "check_new", lambda plan: check_writable(plan.out))
        for module in (convert, score):
            opener = module.open_source
            self.patch.setattr(
                module, "open_source", lambda *a, opener=opener: FlakySource(opener(*a), world)
            )
        self.patch.setattr(convert, "MakeConvertProcessor", lambda reencoder: make_processor)
        self.patch.setattr(score, "MakeScoreProcessor", lambda **options: make_processor)
        self.patch.setattr(score, "read_bundle_info", read_default_bundle)
        self.patch.setattr(fields, "doc_of", doc_of)
        self.patch.setattr(shard_worker, "faulthandler", Mock())  # it would end these tests
        self.patch.setattr(shard_worker, "MAX_HEARTBEAT_S", 0.0)  # every beat writes the heartbeat
        self.patch.setattr(shard_worker, "Quarantine", StubQuarantine)
        self.patch.setattr(StubQuarantine, "world", world, raising=False)
        self.patch.setattr(pipeline, "ProgressLine", lambda verb: lambda progress: None)
        self.patch.setattr(pipeline, "log", lambda message: None)

    def teardown(self) -> None:
        self.patch.undo()
        shutil.rmtree(self.folder)

    # --- what is there ---------------------------------------------------------------------------

    def read_files(self) -> dict[str, bytes]:
        """Every file of the output."""
        if isinstance(self.out, Path):
            paths = [path for path in self.out.rglob("*") if path.is_file()]
            return {path.relative_to(self.out).as_posix(): path.read_bytes() for path in paths}
        paths = self.out.fs.find(self.out.path)
        return {name.partition("/out/")[2]: self.out.fs.cat_file(name) for name in paths}

    def stamp_files(self) -> dict[str, Any]:
        """What would change if a file was written again."""
        if isinstance(self.out, Path):
            paths = [self.out, *self.out.rglob("*")] if self.out.exists() else []
            return {str(path): (path.stat().st_mtime_ns, path.stat().st_ino) for path in paths}
        return {name: self.out.fs.store[name].modified for name in self.out.fs.store}

    def write_file(self, name: str, data: bytes | None) -> None:
        path = self.out / name
        if data is not None:
            path.write_bytes(data)
        elif path.exists():
            path.unlink()

    def shard_name(self, shard: int) -> str:
        return f"{self.results}/part-{shard:05d}.parquet"

    def find_keys(self, shard: int) -> list[str]:
        assert self.plan is not None
        keys: list[str] = self.plan.shards[shard]["key"].to_pylist()
        return keys

    @property
    def shards(self) -> range:
        return range(len(self.plan.shards)) if self.plan else range(0)

    # --- what must be there ----------------------------------------------------------------------

    def make_rows(self, shard: int) -> Rows:
        """The rows of a shard that is made now."""
        assert self.plan is not None
        rows = self.plan.shards[shard]
        images = [self.world.read(key, self.plan.versions[key]) for key in self.find_keys(shard)]
        made: Rows = self.make_processor().finish(rows, images).to_pylist()
        return made

    def retry_rows(self, shard: int) -> Rows:
        """The rows of a shard whose errors are tried again now."""
        old, new = self.rows[shard], self.make_rows(shard)
        pairs = zip(old, new, strict=True)
        return [now if was["error"] in RETRYABLE_ERRORS else was for was, now in pairs]

    def find_success(self, files: dict[str, bytes]) -> bool | None:
        """Whether the run has finished; None when `_SUCCESS` is damaged."""
        if "_SUCCESS" not in files:
            return False
        return files["_SUCCESS"].startswith(b"{") or None

    def check_unchanged(self, command: Callable[[], Any]) -> Any:
        before = self.read_files(), self.stamp_files()
        result = command()
        assert (self.read_files(), self.stamp_files()) == before
        return result

    # --- commands --------------------------------------------------------------------------------

    def start(self, config: Any) -> BatchSummary:
        """Run a command to its end."""
        with self.computer.start_process():
            summary: BatchSummary = pipeline.run_verb(config, time.monotonic())[0]
            return summary

    @cache  # noqa: B019 - checking the options of a config takes milliseconds
    def make_config(self, **options: Any) -> Any:
        places = {"src": str(self.world.root), "out": str(self.out)}
        return self.config(**places, shard_size=SHARD_SIZE, **options)

    def do(self, config: Any, trigger: Trigger | None = None, second: Any = None) -> bool:
        """Run a command and compare what it leaves with the model; tell if it was disturbed.

        `second` is another command that the trigger runs on the same output meanwhile.
        """
        before = self.read_files()
        is_repair = isinstance(config, RepairConfig)
        retries = not is_repair and config.retry_errors
        success = self.find_success(before)
        if success is None and not is_repair:
            with pytest.raises(StorageError):
                self.check_unchanged(lambda: self.start(config))
            return False
        if success and not is_repair and not (retries and self.has_retryable()):
            assert self.check_unchanged(lambda: self.start(config)) == self.summary
            return False
        if is_repair and self.is_whole(before):
            result: Any = self.check_unchanged(lambda: self.start(config))
            assert self.summary is not None
            assert (result["rows"], result["damaged"]) == (self.summary.listed, {})
            return False
        flipped = {shard for shard in self.shards if self.is_flipped(shard, before)}
        stale = {
            shard
            for shard in self.shards
            if before.get(self.shard_name(shard), b"gone") != self.good.get(shard)
            or (is_repair and success and self.is_damaged(shard, before))
        }
        if not is_repair:  # a run reads footers; only shards with work to do are read whole
            stale -= {n for n in flipped if not (retries and self.has_retryable_rows(n))}
        self.world.asked.clear()
        self.computer.trigger = trigger
        summary = None
        try:
            summary = self.start(config)
        except Killed:
            assert trigger is not None
        except StorageError:  # of a full or broken disk, and of nothing else
            if trigger is None or not trigger.may_fail or self.computer.trigger is not None:
                raise
        is_disturbed = trigger is not None and self.computer.trigger is None
        self.computer.trigger = None
        after = self.read_files()
        if self.freeze(after):
            stale = set(self.shards)
        both = retries or bool(is_disturbed and getattr(second, "retry_errors", False))
        for shard in self.shards:
            self.check_shard(
                shard,
                before.get(self.shard_name(shard)),
                after.get(self.shard_name(shard)),
                is_stale=shard in stale,
                is_mended={retries, both},
                is_flipped=shard in flipped,
                is_whole=summary is not None,
                may_be_gone=is_repair and shard in stale,
            )
        if summary is None:
            self.check_broken_off(before, after, is_repair=is_repair)
        else:
            last = read_summary(after) if second else summary  # the other command may end later
            assert (last.done, last.errors) == (summary.done, summary.errors)
            self.check_finished(
                last, after, may_leave_files=bool(is_disturbed and trigger and trigger.may_fail)
            )
            if not is_disturbed:
                known = {self.shard_name(n): self.good[n] for n in flipped - stale}
                self.check_work(summary, stale, retries, before | known)
        return is_disturbed

    def check_shard(
        self,
        shard: int,
        before: bytes | None,
        after: bytes | None,
        *,
        is_stale: bool,
        is_mended: set[bool],
        is_flipped: bool,
        is_whole: bool,
        may_be_gone: bool,
    ) -> None:
        """A shard is what it was before, or whole and as it must be: never half a file."""
        if after == before and (not is_whole or (is_flipped and not is_stale)):
            return
        if after is None:
            assert not is_whole
            assert may_be_gone
            self.good.pop(shard, None)
            return
        rows = read_table(after).to_pylist()
        if is_stale or is_flipped:
            assert rows == self.make_rows(shard)
        else:
            assert rows in [self.retry_rows(shard) if x else self.rows[shard] for x in is_mended]
            assert rows != self.rows[shard] or after == before, "the same rows, other bytes"
        self.good[shard], self.rows[shard] = after, rows

    def is_flipped(self, shard: int, files: dict[str, bytes]) -> bool:
        """Whether a shard has changed where only reading it whole shows it."""
        data, good = files.get(self.shard_name(shard)), self.good.get(shard)
        if data is None or good is None or data == good:
            return False
        return len(data) == len(good) and cut_footer(data) == cut_footer(good)

    def has_retryable_rows(self, shard: int) -> bool:
        return any(row["error"] in RETRYABLE_ERRORS for row in self.rows[shard])

    def has_retryable(self) -> bool:
        return bool(self.summary and set(self.summary.errors) & set(RETRYABLE_ERRORS))

    def freeze(self, files: dict[str, bytes]) -> bool:
        """Learn how the listing was dealt, each key that was there once; False if it was known."""
        if self.plan is not None or "_run.json" not in files:
            return False
        tables = [pq.ParquetFile(pa.BufferReader(files[name])) for name in list_manifest(files)]
        shards = [
            t.read_row_group(n, use_threads=False) for t in tables for n in range(t.num_row_groups)
        ]
        self.plan = Plan(shards, {key: version for key, (version, _) in self.world.images.items()})
        keys = [key for shard in self.shards for key in self.find_keys(shard)]
        assert sorted(keys) == sorted(self.world.images)
        return True

    def check_broken_off(
        self, before: dict[str, bytes], after: dict[str, bytes], *, is_repair: bool
    ) -> None:
        """A command that broke off has withdrawn `_SUCCESS`, or changed nothing, or was done."""
        if "_SUCCESS" not in after:
            return
        if after["_SUCCESS"] == before.get("_SUCCESS"):
            names = ["_files.parquet", *map(self.shard_name, self.shards)]
            assert is_repair or all(before.get(name) == after.get(name) for name in names)
            return
        self.check_finished(read_summary(after), after, may_leave_files=True)

    def check_finished(
        self, summary: BatchSummary, files: dict[str, bytes], *, may_leave_files: bool = False
    ) -> None:
        """The closing account: every listed key once, and nothing else is there."""
        assert self.plan is not None
        self.committed = [
            self.good[shard] if self.is_flipped(shard, files) else files[self.shard_name(shard)]
            for shard in self.shards
        ]
        tables = list(map(read_table, self.committed))
        rows = [row for table in tables for row in table.to_pylist()]
        assert sorted(row["key"] for row in rows) == sorted(self.plan.versions)
        errors = Counter(row["error"] for row in rows if row["error"])
        assert summary.errors == errors
        assert summary.listed == len(rows) == summary.done + summary.failed
        assert summary.failed == sum(errors.values())
        assert summary.unlike_training == self.count_unlike(tables)
        assert (summary.shards_total, summary.left_out) == (len(self.shards), {})
        for table in tables:
            assert b"huggingface" in table.schema.metadata
        record = json.loads(files["_SUCCESS"])
        assert record.pop("finished_at").endswith(" UTC")
        assert len(record.pop("run")) == 64
        assert record == {"schema_version": SCHEMA_VERSION, **asdict(summary)}
        assert read_table(files["_files.parquet"]).to_pylist() == [
            {
                "name": self.shard_name(shard),
                "size_bytes": len(data),
                "sha256": hashlib.sha256(cut_footer(data)).hexdigest(),
                "rows": table.num_rows,
                "errors": table.num_rows - table["error"].null_count,
            }
            for shard, (data, table) in enumerate(zip(self.committed, tables, strict=True))
        ]
        self.summary, self.files_data = summary, files["_files.parquet"]
        named = [
            f"_manifest/{f['name']}" for f in json.loads(files["_run.json"])["manifest"]["files"]
        ]
        wanted = {"_run.json", ".huggingface.yaml", "_files.parquet", "_SUCCESS", *named}
        wanted |= {self.shard_name(shard) for shard in self.shards}
        if not may_leave_files:
            assert sorted(set(files) ^ wanted) == []
            assert not (self.out / "_attempts").exists()
        assert set(files) >= wanted

    def count_unlike(self, tables: list[pa.Table]) -> dict[str, int]:
        counts: Counter[str] = Counter()
        for table in tables:
            counts.update(self.make_processor().count_unlike(table))
        return dict(counts)

    def check_work(
        self, summary: BatchSummary, stale: set[int], retries: bool, before: dict[str, bytes]
    ) -> None:
        """No more is done than is needed."""
        retried = set()
        asked = {key for shard in stale for key in self.find_keys(shard)}
        if retries:
            for shard in set(self.shards) - stale:
                old = read_table(before[self.shard_name(shard)])
                is_old = pc.fill_null(pc.is_in(old["error"], pa.array(RETRYABLE_ERRORS)), False)
                keys = old["key"].filter(is_old).to_pylist()
                asked |= set(keys)
                retried |= {shard} if keys else set()
        assert self.world.asked == asked
        assert summary.shards_resumed == len(self.shards) - len(stale) - len(retried)

    def is_damaged(self, shard: int, files: dict[str, bytes]) -> bool:
        """Whether `verify` must name a shard."""
        if not self.committed or files.get("_files.parquet") != self.files_data:
            return False
        return files.get(self.shard_name(shard)) != self.committed[shard]

    def is_whole(self, files: dict[str, bytes]) -> bool:
        """Whether all is as it was committed."""
        return (
            bool(self.find_success(files))
            and files.get("_files.parquet") == self.files_data
            and self.find_damage(files) == []
        )

    # --- rules: commands -------------------------------------------------------------------------

    @precondition(lambda self: not self.find_success(self.read_files()) or self.has_retryable())
    @rule(retry=st.booleans(), event=st.sampled_from([None, *EVENTS, "run_second"]), place=PLACES)
    def run(self, retry: bool, event: str | None, place: tuple[str, int]) -> None:
        """Run, or resume: what is left to do is done, unless something happens meanwhile.

        A second command on the same output is told to retry errors only where the first one is: a
        command that has read a shard does not notice that another one has retried its errors.
        """
        config = self.make_config(retry_errors=retry or bool(self.find_success(self.read_files())))
        if event != "run_second":
            self.do(config, self.make_trigger(event, place))
            return
        self.do_both(config, self.make_config(retry_errors=retry), place)

    def do_both(self, config: Any, second: Any, place: tuple[str, int]) -> bool:
        """Run a command while another one on the same output begins and ends."""

        def run_second() -> None:
            process, self.computer.process = self.computer.process, None
            self.start(second)
            self.computer.process = process

        return self.do(config, Trigger(*place, run_second), second)

    def make_trigger(self, event: str | None, place: tuple[str | None, int]) -> Trigger | None:
        if event is None:
            return None
        is_full = event == "fill_disk"
        may_fail = is_full or event == "break_disk"
        return Trigger(*place, getattr(self.computer, event), is_full, may_fail)

    def lose_power_at_rest(self) -> None:
        """Nothing that `_SUCCESS` stands for is lost with the power.

        `_SUCCESS` may be, if the process was killed as it wrote it: then the run is ended again.
        """
        before = self.read_files()
        with self.computer.start_process(), pytest.raises(Killed):
            self.computer.lose_names()
        lost = before.items() - self.read_files().items()
        assert lost <= {("_SUCCESS", before["_SUCCESS"])}

    @precondition(lambda self: self.summary)
    @rule(retry=st.booleans())
    def run_again(self, retry: bool) -> None:
        """Run, whatever there is, and be refused with other settings."""
        self.do(self.make_config(retry_errors=retry))
        with pytest.raises(RunMismatch, match="exclude"):
            self.check_unchanged(lambda: self.start(self.make_config(exclude=("*.txt",))))

    @precondition(lambda self: self.good)
    @rule(event=st.sampled_from([None, *EVENTS, "lose_source"]), place=PLACES)
    def repair(self, event: str | None, place: tuple[str, int]) -> None:
        config = RepairConfig(out=str(self.out))
        if event != "lose_source":
            self.do(config, self.make_trigger(event, place))
            return
        before = self.read_files()
        if self.is_whole(before):
            return
        self.world.root.rename(self.folder / "elsewhere")
        with pytest.raises(StorageError, match="no such file or folder"):
            self.start(config)
        before = {name: data for name, data in before.items() if ".aside-" not in name}
        assert before.items() <= self.read_files().items()
        (self.folder / "elsewhere").rename(self.world.root)

    @invariant()
    def verify(self) -> None:
        """`verify` names the shards that are not what was committed, and no others."""
        if self.plan is None:
            return
        files = self.read_files()
        error = {False: "has not finished", None: "_SUCCESS: "}.get(self.find_success(files))
        if error is None and files.get("_files.parquet") != self.files_data:
            error = r"_files\.parquet: "
        if error:
            with pytest.raises(StorageError, match=error):
                self.check_unchanged(lambda: verify_files(self.out))
            return
        assert self.check_unchanged(lambda: verify_files(self.out)) == self.find_damage(files)

    def find_damage(self, files: dict[str, bytes]) -> list[DamagedFile]:
        """What `verify` must find in a finished run."""
        wanted = []
        for name, committed in zip(map(self.shard_name, self.shards), self.committed, strict=True):
            data = files.get(name)
            if data is None:
                wanted.append(DamagedFile(name, "missing"))
            elif len(data) != len(committed):
                reason = f"{len(data)} bytes, not {len(committed)}"
                wanted.append(DamagedFile(name, reason))
            elif data != committed:
                wanted.append(DamagedFile(name, "sha256 differs"))
        return wanted

    # --- rules: what happens to the output -------------------------------------------------------

    @precondition(lambda self: self.good)
    @rule(
        data=st.data(),
        kind=st.sampled_from(["flip", "flip", "truncate", "delete", "foreign", "other run"]),
        where=st.floats(0, 0.999),
        also=st.sampled_from([None, None, "_SUCCESS", "_files.parquet"]),
    )
    def damage_shard(self, data: st.DataObject, kind: str, where: float, also: str | None) -> None:
        """Damage a shard, and perhaps remove what says that the run has finished."""
        shard = data.draw(st.sampled_from(sorted(self.good)))
        good = self.good[shard]
        table = read_table(good)
        bad: bytes | None = None
        if kind == "flip":  # at the end of a column chunk, where page checksums reach
            group = pq.ParquetFile(pa.BufferReader(good)).metadata.row_group(0)
            column = group.column(int(where * group.num_columns))
            start = column.dictionary_page_offset or column.data_page_offset
            end = start + column.total_compressed_size - 1
            bad = good[:end] + bytes([good[end] ^ 1]) + good[end + 1 :]
        elif kind == "truncate":
            bad = good[: int(len(good) * where)]
        elif kind != "delete":
            metadata = dict(table.schema.metadata)
            footer = json.loads(metadata.pop(b"cifake_ray"))
            if kind == "other run":
                metadata[b"cifake_ray"] = json.dumps({**footer, "run": "0" * 64}).encode()
            sink = pa.BufferOutputStream()
            pq.write_table(table[::-1].replace_schema_metadata(metadata), sink)
            bad = sink.getvalue().to_pybytes()
        self.write_file(self.shard_name(shard), bad)
        if also:
            self.write_file(also, None)

    @precondition(lambda self: self.summary)
    @rule(
        name=st.sampled_from(["_files.parquet", "_SUCCESS"]),
        data=st.sampled_from([None, b"", b"PAR1 half a fi"]),
    )
    def damage_papers(self, name: str, data: bytes | None) -> None:
        self.write_file(name, data)

    # --- rules: what happens to the images -------------------------------------------------------

    @rule(change=CHANGES)
    def change_world(self, change: tuple[str, int]) -> None:
        kind, number = change
        if kind == "heal":
            self.world.errors.clear()
        elif kind in ("change", "restore"):
            self.world.write_version(number, 2 if kind == "change" else 1)
        elif kind == "remove":  # key 0 is always there
            self.world.remove(make_key(number))
        elif kind == "add":
            self.world.write("real/new.png", make_content(0, GOOD), 1)
        elif kind.endswith("decoder"):
            self.world.decoder_crashes = kind == "break decoder"
        else:
            self.world.errors[make_key(number)] = kind


def interrupt_once(
    event: str, count: int, command: str, then: Callable[[BatchRunMachine, Any], None]
) -> bool:
    """Begin a command, let an event happen at a change, then end the work; tell if it happened."""
    machine = BatchRunMachine()
    try:
        machine.set_up("convert", False, [GOOD, CRASH])
        machine.patch.setattr(shard_worker, "MAX_HEARTBEAT_S", 10.0)  # one heartbeat is enough
        config = machine.make_config(retry_errors=command == "retry")
        if command == "retry":
            machine.world.errors[make_key(0)] = RETRYABLE_ERRORS[0]
        if command != "run":
            machine.do(config)
            machine.world.errors.clear()
        if command == "repair":
            machine.write_file(machine.shard_name(0), b"PAR1")
            config = RepairConfig(out=str(machine.out))
        if event == "run_second":
            is_disturbed = machine.do_both(config, config, (None, count))
        else:
            is_disturbed = machine.do(config, machine.make_trigger(event, (None, count)))
        then(machine, config)
        machine.do(config)
        machine.verify()
        machine.lose_power_at_rest()
    finally:
        machine.teardown()
    return is_disturbed


@pytest.mark.parametrize("command", ["run", "retry", "repair"])
@pytest.mark.parametrize("event", [*EVENTS, "run_second"])
def test_anything_may_happen_at_any_change(event: str, command: str) -> None:
    """At the first change, at the second and so on; then the same command ends the work."""
    count = 1
    while interrupt_once(event, count, command, lambda machine, config: None):
        count += 1
    assert count > 10


@pytest.mark.parametrize("command", ["run", "retry", "repair"])
@pytest.mark.parametrize("change", [1, 4])
def test_power_may_be_lost_after_a_kill(change: int, command: str) -> None:
    """What a killed process has not forced to disk is not lost once another builds on it."""

    def lose_power(machine: BatchRunMachine, config: Any) -> None:
        machine.do(config, machine.make_trigger("lose_names", (None, change)))
        machine.verify()

    count = 1
    while interrupt_once("kill_command", count, command, lose_power):
        count += 1
    assert count > 10


@pytest.mark.timeout(0 if EXAMPLES else 900)  # what fails is made shorter for minutes
def test_the_life_of_a_batch_run() -> None:
    run_state_machine_as_test(
        BatchRunMachine,
        settings=settings(
            max_examples=EXAMPLES or 40,
            stateful_step_count=25,
            derandomize=not EXAMPLES,
            deadline=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        ),
    )
