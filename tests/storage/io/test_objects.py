"""An output in a store that lies: what was said to be written is there, once, or it is told."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import pyarrow as pa
import pytest
from lying_store import Lie, LyingStore, Request, make_xml, run_lying_store
from s3fs import S3FileSystem

from cifake_ray.config import StoreConfig
from cifake_ray.core.schema import MANIFEST_FIELDS
from cifake_ray.errors import StorageError
from cifake_ray.storage.io import objects, paths
from cifake_ray.storage.io.digest import stamp_file
from cifake_ray.storage.io.files import (
    create_bytes,
    discard,
    exists,
    find_files,
    is_file,
    list_folder,
    move,
    open_ranges,
    read_bytes,
    read_if_exists,
    remove,
    write_bytes,
    write_chunks,
)
from cifake_ray.storage.io.paths import AnyPath, resolve_path
from cifake_ray.storage.runs.finish import finish_run
from cifake_ray.storage.runs.manifest import read_manifest_shard
from cifake_ray.storage.runs.run import Run, ShardStats, is_finished, read_run
from cifake_ray.storage.runs.run_plan import RunPlan
from cifake_ray.storage.sources.glance import iterate_names
from cifake_ray.storage.sources.image_table import open_parquet, read_columns
from cifake_ray.storage.sources.source import Listing

SETTLE_S = 0.5


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, aws_env: None) -> Iterator[LyingStore]:
    quick = {**paths.S3_CONFIG, "read_timeout": 2, "retries": {"max_attempts": 0}}
    monkeypatch.setattr(paths, "S3_CONFIG", quick)
    monkeypatch.setattr(S3FileSystem, "retries", 1)
    monkeypatch.setattr(objects, "SETTLE_S", SETTLE_S)
    monkeypatch.setattr(objects, "LOOK_AGAIN_S", (0.02,) * 4)
    with run_lying_store() as store:
        yield store


@pytest.fixture
def out(store: LyingStore) -> AnyPath:
    return resolve_path("s3://b/out", StoreConfig(s3_endpoint_url=store.endpoint))


def ignore_condition(request: Request) -> None:
    """The store has never heard of If-None-Match."""
    del request.headers["If-None-Match"]


def fail(method: str, part: str, status: int, code: str, **headers: str) -> Lie:
    def lie(request: Request) -> bool | None:
        if request.command == method and request.path.endswith(part):
            return request.answer_error(status, code, **headers)
        return None

    return lie


def keep_nothing(request: Request) -> bool | None:
    return request.answer(200, ETag='"e"') if request.command == "PUT" else None


def keep_half(request: Request) -> None:
    request.body = request.body[: len(request.body) // 2]


def first(num_times: int, lie: Lie) -> Lie:
    """The lie, but only to the first requests that it would answer."""
    answered = count()
    return lambda request: next(answered) < num_times and lie(request)


def be_behind(num_times: int) -> Lie:
    """What was written is not there yet."""
    written: dict[str, int] = {}

    def lie(request: Request) -> bool | None:
        if request.command == "PUT":
            written.setdefault(request.key, num_times)
        elif request.command in ("GET", "HEAD") and written.get(request.key):
            written[request.key] -= 1
            return request.answer_error(404, "NoSuchKey")
        return None

    return lie


def one_line(error: pytest.ExceptionInfo[StorageError]) -> str:
    message = str(error.value)
    assert message.startswith("s3://b/out")
    assert "\n" not in message
    assert "\x1b" not in message
    assert len(message) < 500
    return message


def test_a_store_that_keeps_its_word_does_all_of_it(store: LyingStore, out: AnyPath) -> None:
    assert create_bytes(out / "a", b"1")
    assert not create_bytes(out / "a", b"2")
    write_bytes(out / "x/b", b"22")
    assert (read_bytes(out / "a"), read_if_exists(out / "c")) == (b"1", None)
    assert [path.name for path in list_folder(out)] == ["a", "x"]
    assert find_files(out) == ["a", "x/b"]
    assert list_folder(out / "none") == []
    move(out / "a", out / "c")
    remove(out / "x/b")
    assert store.objects == {"out/c": b"1"}
    assert (exists(out / "a"), exists(out / "c")) == (False, True)


@pytest.mark.parametrize("lies", [[], [ignore_condition]], ids=["honest", "ignores-if-none-match"])
def test_of_many_who_create_a_file_at_once_one_does(
    store: LyingStore, out: AnyPath, lies: list[Lie]
) -> None:
    num_writers = 6
    together = threading.Barrier(num_writers)

    def look_together(request: Request) -> None:
        if request.command == "HEAD" and not store.objects:
            together.wait(10)

    store.lies[:] = [look_together, *lies]
    with ThreadPoolExecutor(num_writers) as threads:
        contents = [b"%d" % n for n in range(num_writers)]
        created = list(threads.map(lambda data: create_bytes(out / "a", data), contents))
    assert created.count(True) == 1
    assert read_bytes(out / "a") == contents[created.index(True)]


def list_keys(keys: list[str]) -> Listing:
    rows = {field.name: pa.nulls(len(keys), field.type) for field in MANIFEST_FIELDS}
    rows["key"] = pa.array(keys)
    return Listing(iter([pa.record_batch(rows, schema=pa.schema(MANIFEST_FIELDS))]))


def make_plan(out: AnyPath, list_source: Callable[[], Listing]) -> RunPlan:
    return RunPlan(
        out=out,
        command="convert",
        settings={"shard_size": 2},
        config={"shard_size": 2},
        list_source=list_source,
        shard_rows=2,
    )


def finish(run: Run) -> None:
    parts = [
        ShardStats(
            n, len(read_manifest_shard(run.manifest_folder, run.find_file(n), n)), {}, {}, 1, ""
        )
        for n in range(run.manifest.num_shards)
    ]
    for n in range(run.manifest.num_shards):
        write_bytes(run.shard_path(n), b"rows")
    finish_run(run, parts, {})


@pytest.mark.parametrize("lies", [[], [ignore_condition]], ids=["honest", "ignores-if-none-match"])
def test_two_who_freeze_at_once_work_on_one_listing(
    store: LyingStore, out: AnyPath, lies: list[Lie]
) -> None:
    """Each sees other images: no row of the one may stand beside those of the other."""
    together = threading.Barrier(2)
    store.lies[:] = lies

    def open_run(number: int) -> Run:
        def list_source() -> Listing:
            together.wait(10)
            return list_keys([f"{number}/{n}" for n in range(5 + number)])

        return make_plan(out, list_source).open()

    with ThreadPoolExecutor(2) as threads:
        runs = list(threads.map(open_run, range(2)))
    assert runs[0] == runs[1]
    for run in runs:
        finish(run)
    assert is_finished(runs[0])


def test_who_freezes_far_too_late_is_not_let_end_two_runs(store: LyingStore, out: AnyPath) -> None:
    """Its request to write hung for longer than anybody waits: one of the two is refused."""
    is_late = threading.Event()

    def hang(request: Request) -> None:
        if b'"late"' in request.body and request.key == "out/_run.json":
            is_late.wait(10)

    store.lies[:] = [ignore_condition, hang]
    late = make_plan(out, lambda: list_keys(["a", "b"]))
    with ThreadPoolExecutor(1) as threads:
        late.config["who"] = "late"
        opening = threads.submit(late.open)
        run = make_plan(out, lambda: list_keys(["a", "c", "d"])).open()
        is_late.set()
        assert opening.result() != run
    with pytest.raises(StorageError, match="another process has replaced") as error:
        finish(run)
    assert "run the same command again" in one_line(error)
    finish(make_plan(out, lambda: list_keys([])).open())
    found = read_run(out)
    assert found == opening.result()
    assert is_finished(found)


@pytest.mark.parametrize(
    ("write", "lie"),
    [(write_bytes, keep_nothing), (write_bytes, keep_half), (create_bytes, keep_nothing)],
    ids=["nothing", "half", "nothing-new"],
)
def test_what_is_not_kept_is_told(
    store: LyingStore, out: AnyPath, write: Callable[[AnyPath, bytes], Any], lie: Lie
) -> None:
    store.lies[:] = [lie]
    with pytest.raises(StorageError, match="the store said that it was written") as error:
        write(out / "a", b"1234")
    assert "run the same command again" in one_line(error)


@pytest.mark.parametrize("lie", [first(1, keep_nothing), be_behind(3)], ids=["lost-once", "behind"])
def test_what_comes_late_or_is_lost_once_is_there(
    store: LyingStore, out: AnyPath, lie: Lie
) -> None:
    store.lies[:] = [lie]
    write_bytes(out / "a", b"1234")
    assert create_bytes(out / "b", b"56")
    store.lies.clear()
    assert (read_bytes(out / "a"), read_bytes(out / "b")) == (b"1234", b"56")


def test_a_run_is_frozen_and_ends_in_a_store_that_is_behind(
    store: LyingStore, out: AnyPath
) -> None:
    store.lies[:] = [be_behind(2)]
    run = make_plan(out, lambda: list_keys(["a", "b", "c"])).open()
    finish(run)
    assert is_finished(run)


STATUSES = [
    (403, "AccessDenied", "check the credentials"),
    (403, "RequestTimeTooSkewed", "set the clock of this computer"),
    (503, "SlowDown", "run the same command again"),
    (500, "InternalError", "run the same command again"),
    (501, "NotImplemented", "run the same command again"),
    (301, "PermanentRedirect", "run the same command again"),
    (307, "TemporaryRedirect", "run the same command again"),
    (418, "\x1b[2J" + "long\n" * 1000, "run the same command again"),
]


@pytest.mark.parametrize("name", ["_run.json", "_SUCCESS"])
@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_a_record_that_is_refused_is_told_and_not_taken_for_missing(
    store: LyingStore, out: AnyPath, method: str, name: str
) -> None:
    plan = make_plan(out, lambda: list_keys(["a", "b"]))
    if method == "GET":
        finish(plan.open())
    kept = dict(store.objects)
    with run_lying_store() as elsewhere:
        location = f"{elsewhere.endpoint}/b/out/{name}"
        for status, code, remedy in STATUSES:
            store.lies[:] = [fail(method, f"/{name}", status, code, Location=location)]
            with pytest.raises(StorageError) as error:
                is_finished(plan.open()) if method == "GET" else finish(plan.open())
            assert remedy in one_line(error), code
            assert f"out/{name}" in one_line(error)
            assert kept.items() <= store.objects.items()
        assert elsewhere.seen == []  # a redirect is not followed
    store.lies.clear()
    finish(plan.open())
    run = read_run(out)
    assert run is not None
    assert is_finished(run)


@pytest.mark.parametrize("status", [301, 307])
def test_a_bucket_in_another_region_is_asked_there(
    store: LyingStore, out: AnyPath, status: int
) -> None:
    def move(request: Request) -> bool | None:
        if "eu-west-1" in request.headers["Authorization"]:
            return None
        elsewhere = {"Location": "http://127.0.0.1:9/", "x_amz_bucket_region": "eu-west-1"}
        return request.answer_error(status, "PermanentRedirect", **elsewhere)

    store.lies[:] = [move]
    write_bytes(out / "a", b"1")
    assert read_bytes(out / "a") == b"1"


def answer_list(body: bytes) -> Lie:
    return lambda request: "list-type" in request.path and request.answer(200, body)


ENTRY = ("out/a", "1", "e")
LISTINGS = {
    "same-token": make_xml([ENTRY], token="t"),
    "no-token": make_xml([ENTRY], is_truncated="true"),
    "outside": make_xml([("elsewhere/a", "1", "e")]),
    "no-size": make_xml([("out/a", "many", "e")]),
    "html": b"<html><body>Sign in</body></html>",
    "truncated": make_xml([ENTRY])[:-20],
    "bomb": b'<!DOCTYPE a [<!ENTITY a "'
    + b"a" * 1000
    + b'">'
    + b"".join(b'<!ENTITY %c "%s">' % (98 + n, b"&%c;" % (97 + n) * 30) for n in range(6))
    + b"]><a>&g;</a>",
}


@pytest.mark.parametrize("list_names", [list_folder, find_files])
def test_a_listing_that_is_none_or_has_no_end_is_told(
    store: LyingStore, out: AnyPath, list_names: Callable[[AnyPath], Any]
) -> None:
    for name, body in LISTINGS.items():
        store.lies[:] = [answer_list(body)]
        with pytest.raises(StorageError) as error:
            pytest.fail(f"{name}: {list_names(out)}")
        one_line(error)


PARTS: dict[str, tuple[Lie, str]] = {
    "garbage": (lambda r: r.answer(206, b"PAR1" * 3), "damaged or missing"),
    "busy": (lambda r: r.answer_error(503, "SlowDown"), "run the same command again"),
    "denied": (lambda r: r.answer_error(403, "AccessDenied"), "check the credentials"),
    "broken": (
        lambda r: r.answer(206, b"PAR1", Content_Length="1000"),
        "check the network",
    ),
}


def test_a_part_of_parquet_that_does_not_come_is_not_a_damaged_file(
    store: LyingStore, out: AnyPath
) -> None:
    run = make_plan(out, lambda: list_keys(["a", "b", "c"])).open()
    path = run.manifest_folder / run.manifest.files[0].name
    table = open_parquet(path)
    for name, (lie, words) in PARTS.items():
        store.lies[:] = [lambda r, lie=lie: bool(r.headers.get("Range")) and lie(r)]
        for step in (lambda: open_parquet(path), lambda: read_columns(table, path, [0], ["key"])):
            with pytest.raises(StorageError) as error:
                step()
            message = one_line(error)
            assert ("repair" in message) == (name == "garbage"), message
            assert name == "garbage" or words in message


def test_a_part_of_a_manifest_that_does_not_come_is_not_a_damaged_manifest(
    store: LyingStore, out: AnyPath
) -> None:
    run = make_plan(out, lambda: list_keys(["a", "b", "c"])).open()
    for name, (lie, words) in PARTS.items():
        store.lies[:] = [lambda r, lie=lie: bool(r.headers.get("Range")) and lie(r)]
        with pytest.raises(StorageError) as error:
            read_manifest_shard(run.manifest_folder, run.manifest.files[0], 0)
        assert words in one_line(error), name


def say(status: int, body: bytes = b"", **headers: str) -> Lie:
    return lambda request: request.answer(status, body, **headers)


LISTING = "<ListBucketResult><IsTruncated>false</IsTruncated>{}</ListBucketResult>"
NONSENSE: dict[str, Lie] = {
    "no-length": say(200, Transfer_Encoding="identity"),
    "length-of-5000-digits": say(200, Content_Length="9" * 5000),
    "length-of-words": say(200, Content_Length="many"),
    "date": say(200, b"x", Last_Modified="yesterday"),
    "number": say(200, b"x", x_amz_missing_meta="many"),
    "header-of-300-kb": say(200, b"x", A="a" * 300_000),
    "status-600": say(600),
    "not-modified": say(304),
    "no-key": say(200, LISTING.format("<Contents><Size>1</Size></Contents>").encode()),
    "no-prefix": say(200, LISTING.format("<CommonPrefixes/>").encode()),
    "key-count": say(200, LISTING.format("<KeyCount>many</KeyCount>").encode()),
    "nested-error": say(400, b"<Error><Code><a/></Code></Error>"),
    "error-of-another-encoding": say(400, b"<?xml version='1.0' encoding='x'?><Error/>"),
    "error-of-html": say(502, b"<html><body>Bad gateway<br></body></html>"),
}
STEPS: dict[str, Callable[[AnyPath], Any]] = {
    "exists": lambda out: exists(out / "a"),
    "is_file": lambda out: is_file(out / "a"),
    "read": lambda out: read_bytes(out / "a"),
    "list": list_folder,
    "find": find_files,
    "stamp": lambda out: stamp_file(out / "a"),
    "write": lambda out: write_bytes(out / "a", b"1"),
    "create": lambda out: create_bytes(out / "b", b"1"),
    "remove": lambda out: remove(out / "a"),
    "discard": lambda out: discard(out / "a"),
    "move": lambda out: move(out / "a", out / "b"),
    "chunks": lambda out: write_chunks(out / "c", [b"1"]),
    "open": lambda out: open_ranges(out / "a"),
    "glance": lambda out: list(iterate_names(out, str(out))),
}


@pytest.mark.parametrize("lie", NONSENSE.values(), ids=NONSENSE)
def test_an_answer_that_is_not_s3s_is_one_line(store: LyingStore, out: AnyPath, lie: Lie) -> None:
    """No exception of a library gets out, at whatever step the answer comes."""
    store.lies[:] = [lie]
    num_told = 0
    for step in STEPS.values():
        try:
            step(out)
        except StorageError as error:
            num_told += 1
            message = str(error)
            assert message.startswith("s3://b/out")
            assert "\n" not in message
            assert len(message) < 500
    assert num_told
