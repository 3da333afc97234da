"""A matched part has as many REAL as FAKE of everything that was matched."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow as pa

from cifake_ray.core.audit.match_classes import choose_unmatched


def make_rows(num_rows: int = 400) -> pa.Table:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, num_rows)
    return pa.table(
        {
            "key": [f"{n}.jpg" for n in range(num_rows)],
            "label": pa.array(labels),
            "split": [("train", "test", None)[n % 3] for n in range(num_rows)],
            "error": pa.nulls(num_rows, pa.string()),
            "width": [32 + 32 * int(v) for v in rng.integers(0, 2 + labels)],
            "height": [32] * num_rows,
            "format": [("JPEG", "PNG")[int(v)] for v in rng.random(num_rows) < 0.2 + labels / 2],
            "mode": ["RGB"] * num_rows,
            "quantization": pa.nulls(num_rows, pa.string()),
            "subsampling": pa.nulls(num_rows, pa.string()),
            "is_progressive": [False] * num_rows,
        }
    )


def test_both_classes_have_the_same_cells_in_each_split() -> None:
    rows = make_rows()
    dropped = set(choose_unmatched(rows, ["size", "quality"], (), 0))
    kept = [row for row in rows.to_pylist() if row["key"] not in dropped]
    cells: dict[int, Counter[object]] = {0: Counter(), 1: Counter()}
    for row in kept:
        cells[row["label"]][row["split"], row["width"], row["format"]] += 1
    assert len(kept) > 100
    assert cells[0] == cells[1]
    by_size = set(choose_unmatched(rows, ["size"], (), 0))
    assert len(by_size) < len(dropped)


def test_the_choice_depends_on_the_seed_and_not_on_the_order() -> None:
    rows = make_rows()
    shuffled = rows.take(np.random.default_rng(1).permutation(rows.num_rows))
    chosen = set(choose_unmatched(rows, ["size"], (), 0))
    assert set(choose_unmatched(shuffled, ["size"], (), 0)) == chosen
    assert set(choose_unmatched(rows, ["size"], (), 1)) != chosen


def test_rows_that_cannot_be_matched_go_and_those_that_went_count_no_more() -> None:
    rows = pa.table(
        {
            "key": ["real", "fake", "fake-2", "unlabelled", "broken"],
            "label": pa.array([0, 1, 1, None, 0]),
            "split": pa.nulls(5, pa.string()),
            "error": [None, None, None, None, "truncated"],
            "width": [8, 8, 8, 8, None],
            "height": [8, 8, 8, 8, None],
        }
    )
    assert len(set(choose_unmatched(rows, ["size"], (), 0)) & {"fake", "fake-2"}) == 1
    assert {"unlabelled", "broken"} < set(choose_unmatched(rows, ["size"], (), 0))
    assert set(choose_unmatched(rows, ["size"], {"real"}, 0)) == set(
        rows.column("key").to_pylist()
    ) - {"real"}
