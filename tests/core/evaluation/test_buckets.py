"""Columns become named slices: words as they are, numbers in buckets."""

from __future__ import annotations

from collections import Counter
from datetime import date
from typing import Any

import pyarrow as pa
import pytest

from cifake_ray.core.evaluation.buckets import MISSING, check_slices, name_buckets
from cifake_ray.errors import UsageError


def find_buckets(name: str, **columns: Any) -> list[str]:
    table = pa.table(columns)
    check_slices((name,), table.schema)
    codes, names = name_buckets(table, name)
    return [names[code] for code in codes]


def test_sizes_are_sorted_by_the_longer_side() -> None:
    width, height = [32, 64, 1024, 640, None, 9000], [32, 10, 1023, 1025, 7, 1]
    found = find_buckets("size", width=width, height=height)
    expected = ["under 64", "64-127", "1,024-2,047", "1,024-2,047", MISSING, "4,096 or more"]
    assert found == expected
    megapixels = find_buckets("megapixels", width=width, height=height)
    assert megapixels == ["under 0.1", "under 0.1", "1-2", "0.5-1", MISSING, "under 0.1"]


def test_a_column_of_the_table_wins_over_what_is_derived() -> None:
    assert find_buckets("size", size=["L", "S"], width=[1, 2], height=[1, 2]) == ["L", "S"]


def test_qualities_have_fixed_edges_and_null_has_a_name() -> None:
    column = pa.array([49, 50, 95, 100, None], pa.int16())
    found = find_buckets("jpeg_quality", jpeg_quality=column)
    assert found == ["under 50", "50-74", "95 or more", "95 or more", MISSING]


@pytest.mark.parametrize("is_text", [False, True])
def test_many_numbers_become_buckets_of_as_many_images_each(is_text: bool) -> None:
    values: list[Any] = [*range(100), None]
    column = pa.array([v if v is None else str(v) for v in values]) if is_text else values
    found = Counter(find_buckets("score", score=column))
    names = ["under 20", "20-39", "40-59", "60-79", "80 or more"]
    assert found == dict.fromkeys(names, 20) | {MISSING: 1}


def test_few_numbers_words_and_truth_values_stay_as_they_are() -> None:
    assert find_buckets("grade", grade=[3, 1, 3]) == ["3", "1", "3"]
    assert find_buckets("is_face", is_face=[True, None]) == ["true", MISSING]
    assert find_buckets("day", day=[date(2026, 1, 2)]) == ["2026-01-02"]
    assert find_buckets("label", label=[1, 0, None]) == ["FAKE", "REAL", MISSING]
    words = pa.array(["a", "b", "a"]).dictionary_encode()
    assert find_buckets("kind", kind=words) == ["a", "b", "a"]
    assert find_buckets("odd", odd=pa.array([float("nan"), float("inf"), 1.0] * 4)).count("1") == 4


def test_numbers_that_are_not_finite_are_none_of_the_buckets() -> None:
    found = find_buckets("odd", odd=[float("nan"), float("inf"), *map(float, range(20))])
    assert found[:2] == [MISSING, MISSING]
    assert MISSING not in found[2:]


def test_what_cannot_be_sliced_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="--slice nothing: no such column; there are size, mega"):
        find_buckets("nothing", width=[1], height=[1])
    with pytest.raises(UsageError, match="--slice size: no such column"):
        find_buckets("size", width=[1])
    with pytest.raises(UsageError, match="--slice mask: its values are list"):
        find_buckets("mask", mask=[[1], [2]])
    with pytest.raises(UsageError, match="--slice key: 1,001 different values"):
        find_buckets("key", key=[f"k{n}" for n in range(1001)])
    assert len(set(find_buckets("source", source=[f"k{n}" for n in range(1001)]))) == 1001
