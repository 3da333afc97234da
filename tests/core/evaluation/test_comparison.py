"""Paired tests against scikit-learn and scipy, and against a bootstrap that is written out."""

from __future__ import annotations

from unittest.mock import ANY

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import accuracy_score, roc_auc_score

from cifake_ray.core.evaluation.comparison import average_seeds, compare_pair, compare_seeds

Scores = tuple[np.ndarray, np.ndarray]


def make_scores(num: int, seed: int, shift: float, ties: bool = False) -> tuple[np.ndarray, Scores]:
    """Logits of two noisy views of the same images, the second better by `shift`."""
    rng = np.random.default_rng(seed)
    label = (np.arange(num) % 3 == 0).astype(np.int64)
    hidden = label + rng.normal(size=num)
    logits = [hidden + rng.normal(scale=0.5, size=num), hidden + shift * label]
    return label, tuple(np.round(logit) if ties else logit for logit in logits)  # type: ignore[return-value]


def score(logit: np.ndarray) -> Scores:
    return logit, stats.logistic.cdf(logit - 0.5).astype(np.float32)


@pytest.mark.parametrize("ties", [False, True])
def test_differences_are_those_of_scikit_learn(ties: bool) -> None:
    label, (first, second) = make_scores(400, 1, 0.4, ties)
    found = compare_pair(label, score(second), score(first), 50)
    auroc = roc_auc_score(label, second) - roc_auc_score(label, first)
    assert found["auroc"]["value"] == pytest.approx(auroc, abs=1e-12)
    called = [score(logit)[1] >= 0.5 for logit in (second, first)]
    accuracy = accuracy_score(label, called[0]) - accuracy_score(label, called[1])
    assert found["accuracy"]["value"] == pytest.approx(accuracy, abs=1e-12)


def test_mcnemar_is_the_exact_binomial_test() -> None:
    label, (first, second) = make_scores(300, 2, 0.5)
    found = compare_pair(label, score(second), score(first), 10)
    right = [(score(logit)[1] >= 0.5) == label for logit in (second, first)]
    b, c = np.sum(right[0] & ~right[1]), np.sum(~right[0] & right[1])
    assert (found["only_ours_right"], found["only_baseline_right"]) == (b, c)
    assert b != c
    assert found["p_value"] == stats.binomtest(int(b), int(b + c), 0.5).pvalue
    alike = compare_pair(label, score(first), score(first), 10)
    assert alike["p_value"] == 1.0
    assert alike["auroc"] == {"value": 0.0, "low": 0.0, "high": 0.0}


@pytest.mark.parametrize("ties", [False, True])
def test_the_interval_is_that_of_a_bootstrap_that_draws_images(ties: bool) -> None:
    label, (first, second) = make_scores(240, 3, 0.4, ties)
    found = compare_pair(label, score(second), score(first), 2000)
    rng = np.random.default_rng(9)
    classes = [np.flatnonzero(label == value) for value in (0, 1)]
    draws = []
    for _ in range(2000):
        rows = np.concatenate([rng.choice(own, len(own)) for own in classes])
        draws.append(
            [roc_auc_score(label[rows], logit[rows]) for logit in (second, first)]
            + [np.mean((score(logit)[1][rows] >= 0.5) == label[rows]) for logit in (second, first)]
        )
    drawn = np.array(draws)
    for name, ours in (("auroc", 0), ("accuracy", 2)):
        differences = drawn[:, ours] - drawn[:, ours + 1]
        expected = np.percentile(differences, (2.5, 97.5))
        spread = expected[1] - expected[0]
        assert found[name]["low"] == pytest.approx(expected[0], abs=0.12 * spread)
        assert found[name]["high"] == pytest.approx(expected[1], abs=0.12 * spread)
        unpaired = np.percentile(drawn[:, 0] - rng.permutation(drawn[:, 1]), (2.5, 97.5))
        if name == "auroc":
            assert found[name]["high"] - found[name]["low"] < 0.9 * (unpaired[1] - unpaired[0])


def test_images_of_one_class_have_no_auroc() -> None:
    label, (first, second) = make_scores(60, 4, 0.4)
    found = compare_pair(np.zeros_like(label), score(second), score(first), 20)
    assert found["auroc"]["value"] is None
    assert "FAKE" in found["auroc"]["reason"]
    assert found["accuracy"]["low"] <= found["accuracy"]["value"] <= found["accuracy"]["high"]


def test_seeds_have_students_interval() -> None:
    values = [0.91, 0.94, 0.92, 0.95]
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    found = average_seeds(values)
    expected = {"value": np.mean(values), "low": low, "high": high}
    assert found == pytest.approx(expected)
    assert average_seeds([0.9]) == {"value": 0.9, "low": None, "high": None}
    assert average_seeds([0.9, None])["value"] is None
    assert average_seeds([0.99, 0.9]) == {"value": pytest.approx(0.945), "low": ANY, "high": 1.0}
    assert average_seeds([0.01, 0.1])["low"] == 0.0, "there is no rate below 0"


def test_variants_of_several_seeds_have_welchs_interval() -> None:
    ours, theirs = [0.95, 0.96, 0.94], [0.91, 0.94]
    expected = stats.ttest_ind(ours, theirs, equal_var=False)
    interval = expected.confidence_interval(0.95)
    found = compare_seeds(ours, theirs)
    assert found["value"] == pytest.approx(np.mean(ours) - np.mean(theirs))
    assert (found["low"], found["high"]) == pytest.approx((interval.low, interval.high))
    assert found["p_value"] == pytest.approx(expected.pvalue)
    assert compare_seeds(ours, [0.9])["low"] is None
    assert compare_seeds([0.9, 0.9], [0.8, 0.8])["low"] is None
