"""A summary of shards is that of all rows at once, and its memory does not grow with them."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from score_run import make_scores

from cifake_ray.core.evaluation import score_summary as module
from cifake_ray.core.evaluation.margin import find_margin
from cifake_ray.core.evaluation.score_summary import BAND_EDGES, ScoreSummary

THRESHOLD = 0.4


def make_shards(num_shards: int, num_sources: int) -> list[pa.Table]:
    rng = np.random.default_rng(1)
    shards = []
    for shard in range(num_shards):
        count = int(rng.integers(1, 80))
        label = rng.integers(0, 2, count)
        names = [None, *(f"s{n}" for n in range(num_sources - 1))]
        rows = pa.table(
            {
                "key": [f"{shard}-{n}" for n in range(count)],
                "label": pa.array(label, mask=rng.random(count) < 0.2),
                "split": pa.nulls(count, pa.string()),
                "source": pa.array(
                    [names[n] for n in rng.integers(0, num_sources, count)], "string"
                ),
            }
        )
        logit = rng.normal(label * 4.0 - 2, 3)
        logit[rng.random(count) < 0.1] = np.nan
        shards.append(make_scores(rows, logit.astype(np.float32)))
    return shards


def summarise(shards: list[pa.Table], per_group: int = 7) -> ScoreSummary:
    summary = ScoreSummary(per_group)
    for number, rows in enumerate(shards):
        summary.add(number, rows, THRESHOLD)
    return summary


def test_counts_are_those_of_all_rows() -> None:
    shards = make_shards(20, 5)
    summary = summarise(shards)
    rows = pa.concat_tables(shards).to_pylist()
    scored = [row for row in rows if row["error"] is None]
    assert (summary.images, summary.scored) == (len(rows), len(scored))
    assert summary.called_fake == sum(row["is_fake"] for row in scored)
    assert summary.errors == Counter(row["error"] for row in rows if row["error"])
    cells = Counter((r["label"], int(r["is_fake"])) for r in scored if r["label"] is not None)
    assert {(i, j): int(summary.confusion[i, j]) for i in (0, 1) for j in (0, 1)} == cells
    for name, counts, histogram in summary.list_sources():
        mine = [row for row in scored if row["source"] == name]
        assert counts["images"] == sum(row["source"] == name for row in rows)
        assert counts["called_fake"] == sum(row["is_fake"] for row in mine)
        labelled = [row for row in mine if row["label"] is not None]
        assert counts["wrong"] == sum(row["is_fake"] != row["label"] for row in labelled)
        p_fake = [row["p_fake"] for row in mine]
        assert histogram.tolist() == np.histogram(p_fake, 50, (0, 1))[0].tolist()


def test_selections_are_the_best_of_all_rows() -> None:
    shards = make_shards(20, 5)
    summary = summarise(shards)
    scored = [r for r in pa.concat_tables(shards).to_pylist() if r["error"] is None]
    wrong = [r for r in scored if r["label"] == 0 and r["is_fake"]]
    worst = sorted(wrong, key=lambda row: -row["p_fake"])[:7]
    assert [shown.row["key"] for shown in summary.mistakes.list_rows(0)] == [
        r["key"] for r in worst
    ]
    for band, (low, high) in enumerate(pairwise(BAND_EDGES)):
        rows = summary.bands.list_rows(band)
        inside = [r for r in scored if low <= r["p_fake"] < high or r["p_fake"] == high == 1]
        assert len(rows) == min(7, len(inside)) == len({shown.row["key"] for shown in rows})
        assert {shown.row["key"] for shown in rows} <= {row["key"] for row in inside}
    for shown in [*summary.uncertain.interleave(), *summary.bands.list_rows(0)]:
        assert shards[shown.shard]["key"][shown.position].as_py() == shown.row["key"]
    first = [shown.row["source"] for shown in summary.uncertain.interleave()[:5]]
    assert len(set(first)) == 5


def test_sources_without_end_are_counted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SOURCES", 3)
    monkeypatch.setattr(module, "MAX_STRATA", 2)
    shards = make_shards(20, 50)
    summary = summarise(shards)
    found = summary.list_sources()
    assert len(found) == 4
    assert sum(counts["images"] for _, counts, _ in found) == summary.images
    assert found[0][0] == "..."


def test_margin_is_symmetric_in_log_odds() -> None:
    p_fake = np.array([0.2, 0.8, 0.5, np.nan, 1.0], np.float32)
    margin = find_margin(p_fake, 0.5)
    assert margin[0] == pytest.approx(margin[1], rel=1e-6)
    assert margin[2] == 0
    assert np.isnan(margin[3])
    assert margin[4] == np.inf
