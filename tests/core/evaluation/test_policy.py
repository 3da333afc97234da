"""Thresholds from REAL images: what is promised holds, and what is decided follows from it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import binomtest

from cifake_ray.core.evaluation.fit_policy import (
    count_needed,
    find_least_fpr,
    fit_cut,
    measure_interval,
)
from cifake_ray.core.evaluation.policy import Cut, Policy, find_verdicts
from cifake_ray.errors import UsageError


def draw(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(count).astype(np.float32)


def make_cut(threshold: float, unsure_from: float) -> Cut:
    return Cut(threshold, unsure_from, 100, 1, (0.0, 0.1))


POLICY = Policy(
    bundle="b",
    precision="float32",
    target_fpr=0.01,
    confidence=0.95,
    overall=make_cut(0.5, 0.25),
    by="source",
    groups={"a": make_cut(0.75, 0.5), "b": make_cut(0.25, 0.125)},
)


@pytest.mark.parametrize("target_fpr", [0.001, 0.01, 0.05, 0.3])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
@pytest.mark.parametrize("count", [1, 59, 300, 3000])
def test_as_many_are_above_as_the_clopper_pearson_bound_allows(
    target_fpr: float, confidence: float, count: int
) -> None:
    def bound(hits: int) -> float:
        two_sided = 2 * confidence - 1
        return binomtest(hits, count).proportion_ci(two_sided, "exact").high if two_sided else 0.0

    cut = fit_cut(draw(count), target_fpr, confidence)
    assert (cut is None) == (count < count_needed(target_fpr, confidence))
    if cut is not None and confidence > 0.5:
        assert bound(cut.num_above) <= target_fpr < bound(cut.num_above + 1)
        assert cut.fpr_interval == pytest.approx(
            binomtest(cut.num_above, count).proportion_ci(confidence, "exact")
        )
    if cut is not None:
        assert np.sum(draw(count) >= cut.threshold) == cut.num_above
        assert 0 <= cut.unsure_from <= cut.threshold < 1


@pytest.mark.parametrize("count", [59, 300, 2000])
def test_both_ends_fail_no_more_often_than_the_confidence_says(count: int) -> None:
    """Scores are uniform, so the true rate above a threshold t is 1 - t."""
    cuts = [fit_cut(draw(count, seed), 0.05, 0.9) for seed in range(1500)]
    limit = 0.1 + 3 * np.sqrt(0.1 * 0.9 / len(cuts))
    assert np.mean([1 - cut.threshold > 0.05 for cut in cuts if cut]) <= limit
    assert np.mean([1 - cut.unsure_from < 0.05 for cut in cuts if cut]) <= limit


def test_the_smallest_number_and_the_smallest_rate_belong_together() -> None:
    assert [count_needed(rate, 0.95) for rate in (0.05, 0.01, 0.001)] == [59, 299, 2995]
    assert find_least_fpr(299, 0.95) <= 0.01 < find_least_fpr(298, 0.95)
    assert find_least_fpr(0, 0.95) == 1.0
    assert measure_interval(0, 10, 0.95)[0] == 0.0
    assert measure_interval(10, 10, 0.95)[1] == 1.0


def test_equal_scores_are_never_divided() -> None:
    tied = np.repeat(np.array([0.25, 0.5], np.float32), [190, 10])
    cut = fit_cut(tied, 0.04, 0.95)  # 3 may be above, and 10 are equal
    assert cut is not None
    assert (cut.num_above, cut.threshold) == (0, 0.75)
    assert fit_cut(np.ones(500, np.float32), 0.05, 0.95) is None  # no threshold is above 1
    assert fit_cut(np.empty(0, np.float32), 0.05, 0.95) is None


def test_a_wider_band_of_unsure_begins_lower() -> None:
    scores = draw(2000)
    cuts = [fit_cut(scores, 0.01, 0.95, rate) for rate in (None, 0.05, 0.2)]
    assert len({cut.threshold for cut in cuts if cut}) == 1
    lows = [cut.unsure_from for cut in cuts if cut]
    assert lows == sorted(lows, reverse=True)
    assert np.mean(scores >= lows[2]) > 0.2


def test_images_of_no_group_are_called_what_all_thresholds_call_them() -> None:
    rows = [("a", 0.75), ("a", 0.7), ("a", 0.4), ("b", 0.3), ("b", 0.2), ("b", 0.1)]
    rows += [("c", 0.8), ("c", 0.3), ("c", 0.1), (None, 0.74), ("a", None), ("c", None)]
    expected = [True, None, False, True, None, False, True, None, False, None, None, None]
    columns = zip(*rows, strict=True)
    table = pa.table(dict(zip(("source", "p_fake"), map(list, columns), strict=True)))
    table = table.set_column(1, "p_fake", table.column("p_fake").cast(pa.float32()))
    assert find_verdicts(table, 0.0, POLICY).to_pylist() == expected
    coded = table.set_column(0, "source", table.column("source").dictionary_encode())
    assert find_verdicts(coded, 0.0, POLICY).to_pylist() == expected
    with pytest.raises(UsageError, match="'source'"):
        find_verdicts(table.drop_columns("source"), 0.0, POLICY)
    lists = table.set_column(0, "source", pa.array([["x"]] * len(rows)))
    with pytest.raises(UsageError, match="list"):
        find_verdicts(lists, 0.0, POLICY)


def test_a_column_of_numbers_has_groups_too() -> None:
    table = pa.table({"width": pa.array([32, 64, None]), "p_fake": pa.array([0.3] * 3, "float32")})
    policy = replace(POLICY, by="width", groups={"32": make_cut(0.25, 0.2)})
    assert find_verdicts(table, 0.0, policy).to_pylist() == [True, None, None]


def test_the_id_is_that_of_all_that_decides() -> None:
    others = [
        replace(POLICY, bundle="c"),
        replace(POLICY, overall=make_cut(0.5, 0.24)),
        replace(POLICY, groups={}),
    ]
    assert len({policy.id for policy in (POLICY, *others)}) == 4
    with pytest.raises(ValueError, match="unsure_from"):
        replace(POLICY, overall=make_cut(0.2, 0.3))
