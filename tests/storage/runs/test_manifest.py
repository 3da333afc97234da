"""The manifest: every key once, dealt the same way whatever the order of the listing."""

from __future__ import annotations

import pickle
import tracemalloc
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from write_manifest import write_manifest

from cifake_ray.core.schema import MANIFEST_FIELDS
from cifake_ray.errors import NothingToDo, StorageError
from cifake_ray.storage.runs import listed_rows
from cifake_ray.storage.runs.list_parts import THIS_PROCESS, TaskPool, list_rows
from cifake_ray.storage.runs.manifest import (
    SHARDS_PER_FILE,
    Manifest,
    choose_shard_rows,
    deal_manifest,
    read_manifest_shard,
)
from cifake_ray.storage.runs.run import Run
from cifake_ray.storage.sources.source import (
    MAX_SHARD_BYTES,
    MAX_SHARD_ROWS,
    MIN_SHARD_ROWS,
    Listing,
    batch_rows,
)

SCHEMA = pa.schema(MANIFEST_FIELDS)


def batch_of(keys: Iterable[str], size_bytes: int | None = 1000) -> pa.RecordBatch:
    rows = [(key, key, None, size_bytes, 1, *[None] * 5) for key in keys]
    return next(batch_rows(rows, SCHEMA))


def list_keys(keys: list[str], num_rows: int = 100) -> Listing:
    starts = range(0, len(keys), num_rows)
    return Listing(batch_of(keys[start : start + num_rows]) for start in starts)


def read_shards(folder: Path, manifest: Manifest) -> list[list[str]]:
    return [
        read_manifest_shard(folder, file, shard).column("key").to_pylist()
        for file in manifest.files
        for shard in range(file.first_shard, file.first_shard + file.num_shards)
    ]


KEYS = [f"train/{n % 7}/\u00e9 {n}.jpg" for n in range(1000)]


def test_every_key_is_in_one_shard_once(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path, "run", list_keys(KEYS), 64)
    shards = read_shards(tmp_path, manifest)
    assert Counter(key for shard in shards for key in shard) == Counter(KEYS)
    assert manifest.num_rows == 1000
    assert manifest.size_bytes == 1000 * 1000
    assert manifest.num_shards == 16
    assert [len(shard) for shard in shards] == [64] * 15 + [40]


def test_the_order_of_the_listing_does_not_matter(tmp_path: Path) -> None:
    shuffled = list(np.random.default_rng(1).permutation(np.array(KEYS, object)))
    one = write_manifest(tmp_path / "one", "run", list_keys(KEYS), 64)
    two = write_manifest(tmp_path / "two", "run", list_keys(shuffled, num_rows=333), 64)
    assert one == two


def test_rows_are_sorted_by_key_in_a_shard(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path, "run", list_keys(KEYS[::-1]), 64)
    for shard in read_shards(tmp_path, manifest):
        assert shard == sorted(shard, key=str.encode)


def test_a_shard_is_a_random_sample_of_the_source(tmp_path: Path) -> None:
    keys = [f"{'REAL' if n < 500 else 'FAKE'}/{n:04}" for n in range(1000)]
    manifest = write_manifest(tmp_path, "run", list_keys(keys), 100)
    for shard in read_shards(tmp_path, manifest):
        assert 25 < sum(key.startswith("REAL") for key in shard) < 75


def test_what_is_known_of_a_key_stays_with_it(tmp_path: Path) -> None:
    schema = pa.schema([*MANIFEST_FIELDS, pa.field("n", pa.int16())])
    rows = [
        (f"{n}", f"at/{n}", n, n + 1, n + 2, f"e{n}", n % 2, "val", f"s{n}", None, n)
        for n in range(300)
    ]
    manifest = write_manifest(tmp_path, "run", Listing(batch_rows(rows, schema)), 50)
    found = [
        row
        for file in manifest.files
        for shard in range(file.num_shards)
        for row in read_manifest_shard(tmp_path, file, shard).to_pylist()
    ]
    assert len(found) == 300
    for row in found:
        n = row["n"]
        assert row == {
            "key": f"{n}",
            "location": f"at/{n}",
            "row": n,
            "size_bytes": n + 1,
            "mtime_ns": n + 2,
            "etag": f"e{n}",
            "label": n % 2,
            "split": "val",
            "source": f"s{n}",
            "error": None,
            "n": n,
        }


@pytest.mark.parametrize(
    ("num_rows", "mean_bytes", "shard_rows"),
    [
        (1, 1000, MIN_SHARD_ROWS),
        (1_000_000, 1000, MIN_SHARD_ROWS),
        (5_000_000, 1000, 5_000),
        (20_000_000, 1000, MAX_SHARD_ROWS),
        (5_000_000, 2**20, MAX_SHARD_BYTES // 2**20),
        (10, 2**30, 1),
        (0, 0, MIN_SHARD_ROWS),
        (5_000_000, 0, MIN_SHARD_ROWS),  # not known
    ],
)
def test_shards_hold_a_thousandth_between_bounds_and_a_cap_in_bytes(
    num_rows: int, mean_bytes: int, shard_rows: int
) -> None:
    assert choose_shard_rows(num_rows, num_rows * mean_bytes) == shard_rows


def test_the_size_of_shards_follows_from_the_listing_alone(tmp_path: Path) -> None:
    listing = Listing(iter([batch_of((f"{n}" for n in range(1500)), size_bytes=2**20)]))
    manifest = write_manifest(tmp_path, "run", listing, None)
    assert [len(shard) for shard in read_shards(tmp_path, manifest)] == [256] * 5 + [220]


def test_sizes_that_are_not_known_do_no_harm(tmp_path: Path) -> None:
    keys = [f"{n}" for n in range(10)]
    listing = Listing(iter([batch_of(keys[:5]), batch_of(keys[5:], size_bytes=None)]))
    manifest = write_manifest(tmp_path, "run", listing, None)
    assert (manifest.num_rows, manifest.size_bytes, manifest.num_shards) == (10, 5000, 1)


def test_a_key_that_is_listed_twice_is_refused_with_examples(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train/1/\u00e9 8\.jpg"):
        write_manifest(tmp_path, "run", list_keys([*KEYS, KEYS[8]]), 64)
    assert list(tmp_path.iterdir()) == []


def test_keys_that_differ_only_in_unicode_form_are_two(tmp_path: Path) -> None:
    keys = ["\u00e9.jpg", "e\u0301.jpg"]
    manifest = write_manifest(tmp_path, "run", list_keys(keys), None)
    assert sorted(read_shards(tmp_path, manifest)[0]) == sorted(keys)


def test_an_empty_listing_is_nothing_to_do(tmp_path: Path) -> None:
    with pytest.raises(NothingToDo):
        write_manifest(tmp_path, "run", Listing(iter(())), None)


def test_a_source_that_keeps_its_order_is_dealt_batch_by_batch(tmp_path: Path) -> None:
    keys = [["z", "a"], ["m"], ["c", "b", "y"]]
    listing = Listing(iter(map(batch_of, keys)), keeps_order=True)
    manifest = write_manifest(tmp_path, "run", listing, 1)
    assert read_shards(tmp_path, manifest) == keys


def test_many_shards_span_several_files_and_each_is_found(tmp_path: Path) -> None:
    keys = [f"{n:04}" for n in range(2 * SHARDS_PER_FILE + 10)]
    listing = Listing((batch_of([key]) for key in keys), keeps_order=True)
    manifest = write_manifest(tmp_path, "run", listing, None)
    assert [file.num_shards for file in manifest.files] == [SHARDS_PER_FILE, SHARDS_PER_FILE, 10]
    assert [file.first_shard for file in manifest.files] == [0, 256, 512]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f.name for f in manifest.files]
    run = Run(tmp_path, "score", {}, {}, manifest, {})
    for shard in (0, 1, 255, 256, 300, 511, 512, 521):
        rows = read_manifest_shard(tmp_path, run.find_file(shard), shard)
        assert rows.column("key").to_pylist() == [f"{shard:04}"]


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path, "run", list_keys(KEYS), None)
    path = tmp_path / manifest.files[0].name
    data = bytearray(path.read_bytes())
    data[len(data) // 4] ^= 1
    path.write_bytes(data)
    with pytest.raises(StorageError, match=r"run-00000\.parquet: the manifest is damaged"):
        read_manifest_shard(tmp_path, manifest.files[0], 0)
    path.unlink()
    with pytest.raises(StorageError, match=r"run-00000\.parquet"):
        read_manifest_shard(tmp_path, manifest.files[0], 0)


def generate_batches(num_keys: int) -> Iterator[pa.RecordBatch]:
    """Keys made by Arrow, so that the listing itself costs next to nothing."""
    for start in range(0, num_keys, 10_000):
        numbers = pa.array(range(start, start + 10_000)).cast(pa.string())
        keys = pc.binary_join_element_wise("train/FAKE/", numbers, ".jpg", "")
        known = {"key": keys, "location": keys}
        yield pa.RecordBatch.from_arrays(
            [known.get(f.name, pa.nulls(10_000, f.type)) for f in SCHEMA], schema=SCHEMA
        )


def measure_peaks(folder: Path, num_keys: int) -> tuple[int, int]:
    """Bytes that Python and Arrow held at most while a manifest of so many keys was written."""
    pool = pa.proxy_memory_pool(pa.default_memory_pool())
    default = pa.default_memory_pool()
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        manifest = write_manifest(folder, "run", Listing(generate_batches(num_keys)), None)
        python_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(default)
    assert manifest.num_rows == num_keys
    return python_bytes, pool.max_memory()


def test_memory_does_not_grow_with_the_number_of_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listed_rows, "MAX_HELD_ROWS", 20_000)
    measure_peaks(tmp_path / "warm", 10_000)  # what is imported and cached on first use
    few_python, few_arrow = measure_peaks(tmp_path / "few", 30_000)
    many_python, many_arrow = measure_peaks(tmp_path / "many", 300_000)
    # 270,000 more keys are 18 MB as Python strings and, with their columns, 25 MB in Arrow.
    assert many_python < few_python + 4e6
    assert many_arrow < few_arrow + 8e6


class Pickling:
    """Does the work from a copy, as other processes do, and says how large it was."""

    num_workers = 2

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def map_items(self, work: Callable[[Any], Any], items: deque[Any]) -> Iterator[Any]:
        for item in items:
            data = pickle.dumps(work)
            self.sizes.append(len(data))
            yield pickle.loads(data)(item)


@pytest.mark.parametrize("keeps_order", [True, False])
def test_workers_are_sent_where_rows_are_and_not_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keeps_order: bool
) -> None:
    monkeypatch.setattr(listed_rows, "MAX_HELD_ROWS", 20_000)

    def deal(name: str, pool: TaskPool) -> Manifest:
        listing = Listing(generate_batches(50_000), keeps_order=keeps_order)
        folder = tmp_path / name
        folder.mkdir()
        listing, rows = list_rows(
            lambda: listing, None, folder / "rows", pool, lambda line: None, describe=False
        )
        return deal_manifest(folder, "run", listing, rows, None, workers=pool)

    pool = Pickling()
    assert deal("sent", pool) == deal("here", THIS_PROCESS)
    assert pool.sizes
    assert max(pool.sizes) < 20_000
