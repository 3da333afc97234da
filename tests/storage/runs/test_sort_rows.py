"""Sorting on disk gives what sorting in memory gives, for any number of runs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest

from cifake_ray.errors import UsageError
from cifake_ray.storage.runs import sort_rows as sort_module
from cifake_ray.storage.runs.sort_rows import SortKeys, sort_rows

SOURCES = ["a", "b", None]


def make_tables(count: int, *, seed: int = 0) -> list[pa.Table]:
    """Tables of different lengths, with ties, nulls and NaN."""
    rng = np.random.default_rng(seed)
    keys = [f"{n:05d}" for n in rng.permutation(count)]
    value = rng.integers(0, 40, count).astype(np.float32)
    value[rng.random(count) < 0.05] = np.nan
    source = [SOURCES[n] for n in rng.integers(0, 3, count)]
    table = pa.table(
        {
            "key": keys,
            "value": pa.array(value, mask=rng.random(count) < 0.1),
            "source": pa.array(source, pa.string()),
        }
    )
    ends = np.sort(rng.integers(0, count, 9))
    return [table.slice(a, b - a) for a, b in zip([0, *ends], [*ends, count], strict=True)]


@pytest.fixture(params=["in memory", "on disk"])
def _place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "on disk":
        monkeypatch.setattr(sort_module, "RUN_ROWS", 100)
        monkeypatch.setattr(sort_module, "BATCH_ROWS", 7)


@pytest.mark.usefixtures("_place")
@pytest.mark.parametrize("keys", [[("value", "ascending")], [("value", "descending")]])
@pytest.mark.parametrize("top", [None, 1, 20, 500, 5000])
def test_the_order_is_that_of_one_table(keys: SortKeys, top: int | None) -> None:
    tables = make_tables(2000)
    whole = pa.concat_tables(tables).sort_by([*keys, ("key", "ascending")]).slice(0, top)
    assert join(sort_rows(tables, keys, top)).column("key").equals(whole.column("key"))


@pytest.mark.usefixtures("_place")
@pytest.mark.parametrize("top", [1, 30, 5000])
def test_the_first_of_each_value_are_those_of_each_alone(top: int) -> None:
    tables, keys = make_tables(2000, seed=1), [("value", "descending")]
    whole = pa.concat_tables(tables).sort_by([*keys, ("key", "ascending")]).to_pylist()
    wanted = []
    for source in SOURCES:
        wanted += [row["key"] for row in whole if row["source"] == source][:top]
    found = join(sort_rows(tables, keys, top, "source")).column("key").to_pylist()
    assert sorted(found) == sorted(wanted)
    assert found == [row["key"] for row in whole if row["key"] in set(wanted)]


def test_the_first_few_never_reach_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sort_module, "RUN_ROWS", 100)
    monkeypatch.setattr(sort_module, "_spill", None)
    assert join(sort_rows(make_tables(2000), [("value", "ascending")], 10)).num_rows == 10


def test_rows_in_memory_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows there are, no table is larger than a run and what was just read."""
    monkeypatch.setattr(sort_module, "RUN_ROWS", 100)
    monkeypatch.setattr(sort_module, "BATCH_ROWS", 7)
    sizes = []
    find_order = sort_module._find_order

    def watch(rows: pa.Table, keys: SortKeys) -> pa.Array:
        sizes.append(rows.num_rows)
        return find_order(rows, keys)

    monkeypatch.setattr(sort_module, "_find_order", watch)
    tables = (table.slice(n, 10) for table in make_tables(3000) for n in range(0, len(table), 10))
    assert sum(1 for _ in sort_rows(tables, [("value", "ascending")])) > 1
    assert max(sizes) < 600


def test_no_rows_are_no_rows() -> None:
    assert list(sort_rows([], [("value", "ascending")])) == []
    empty = make_tables(20)[0].slice(0, 0)
    assert join(sort_rows([empty], [("value", "ascending")], 3, "source")).num_rows == 0


def test_a_column_without_an_order_is_named() -> None:
    table = pa.table({"key": ["a", "b"], "tags": [["x"], ["y"]]})
    with pytest.raises(UsageError, match=r"--sort tags \(list<"):
        list(sort_rows([table], [("tags", "ascending")]))


def join(tables: Iterator[pa.Table]) -> pa.Table:
    found = list(tables)
    assert all(table.num_rows <= sort_module.OUTPUT_ROWS for table in found)
    return pa.concat_tables(found)
