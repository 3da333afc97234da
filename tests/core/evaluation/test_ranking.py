"""Groups ranked against each other: the numbers are scikit-learn's, the intervals honest."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from cifake_ray.core.evaluation.metrics import RATES, compute_metrics
from cifake_ray.core.evaluation.ranking import Ranking


def make_logits(num: int, seed: int, decimals: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.round(rng.normal(0, 1.5, num), decimals).astype(np.float32)


@pytest.mark.parametrize("decimals", [1, 7])
def test_two_groups_have_the_numbers_of_scikit_learn(decimals: int) -> None:
    logit = make_logits(9000, 0, decimals)
    fake, real = np.arange(0, 700), np.arange(2500, 9000)
    ranking = Ranking(logit, num_bootstrap=20)
    found = ranking.compare(ranking.group(fake), ranking.group(real))
    label = np.repeat([1, 0], [len(fake), len(real)])
    score = np.concatenate([logit[fake], logit[real]])
    fpr, tpr, _ = roc_curve(label, score, drop_intermediate=False)
    expected = {
        "auroc": roc_auc_score(label, score),
        "average_precision": average_precision_score(label, score),
        **{name: tpr[fpr <= rate].max() for name, rate in RATES.items()},
    }
    assert {name: one["value"] for name, one in found.items()} == pytest.approx(expected)
    for one in found.values():
        assert one["low"] <= one["value"] <= one["high"]
        assert one["low"] < one["high"]


def test_intervals_are_those_of_the_whole_report() -> None:
    rng = np.random.default_rng(3)
    label = rng.integers(0, 2, 3000)
    logit = (rng.normal(label * 2.0, 1.5)).astype(np.float32)
    ranking = Ranking(logit, num_bootstrap=800)
    groups = [ranking.group(np.flatnonzero(label == value)) for value in (0, 1)]
    found = ranking.compare(groups[1], groups[0])
    whole = compute_metrics(logit, label, temperature=1.0, threshold=0.5, num_bootstrap=800)
    for name in ("auroc", "average_precision", "tpr_at_fpr_1pct"):
        assert found[name]["value"] == pytest.approx(whole[name]["value"])
        widths = [one[name]["high"] - one[name]["low"] for one in (found, whole)]
        assert widths[0] == pytest.approx(widths[1], rel=0.2), name
    assert found["tpr_at_fpr_0.1pct"] == whole["tpr_at_fpr_0.1pct"]  # no number, one reason


def test_groups_of_one_size_do_not_draw_alike() -> None:
    """Else a group against its double would have an AUROC of 0.5 in every replicate."""
    ranking = Ranking(np.tile(make_logits(200, 1, 7), 2), num_bootstrap=50)
    found = ranking.compare(ranking.group(np.arange(200)), ranking.group(np.arange(200, 400)))
    assert found["auroc"]["value"] == 0.5
    assert found["auroc"]["high"] - found["auroc"]["low"] > 0.05


def test_a_few_images_have_values_and_no_interval() -> None:
    ranking = Ranking(make_logits(1000, 2, 7), num_bootstrap=50)
    found = ranking.compare(ranking.group(np.arange(4)), ranking.group(np.arange(4, 1000)))
    assert 0 < found["auroc"]["value"] < 1
    assert found["auroc"]["low"] is None
    assert found["tpr_at_fpr_1pct"]["reason"] == "needs 5 FAKE images, there are 4"
    empty = ranking.compare(ranking.group(np.arange(0)), ranking.group(np.arange(4, 1000)))
    assert empty["auroc"]["reason"] == "there are no FAKE images"
