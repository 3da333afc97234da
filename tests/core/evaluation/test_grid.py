"""The numbers of a grid, against scikit-learn and against counting."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from cifake_ray.core.evaluation.calibration import compute_p_fake
from cifake_ray.core.evaluation.grid import measure_auroc, measure_grid
from cifake_ray.core.evaluation.metrics import compute_metrics

RNG = np.random.default_rng(3)
LABEL = np.arange(400) % 2
CLEAN = (RNG.normal(size=400) + 4 * (LABEL - 0.5)).astype(np.float32)
WORSE = (CLEAN + 2 * RNG.normal(size=400) + 1).astype(np.float32)
GRID = {"worse": {"jpeg": 30}, "same": {"jpeg": 100}}


def measure(**logits: np.ndarray) -> dict:  # type: ignore[type-arg]
    return measure_grid(GRID, CLEAN, logits, LABEL, temperature=1.5, threshold=0.4)


def test_every_number_is_what_counting_gives() -> None:
    found = measure(worse=WORSE, same=CLEAN)
    cell = found["cells"]["worse"]
    before, after = (compute_p_fake(logit, 1.5) >= 0.4 for logit in (CLEAN, WORSE))
    real, fake = LABEL == 0, LABEL == 1
    assert cell["num_images"] == 400
    assert cell["steps"] == {"jpeg": 30}
    assert cell["accuracy"]["value"] == pytest.approx(np.mean(after == fake))
    assert cell["tpr"]["value"] == pytest.approx(after[fake].mean())
    assert cell["fpr"]["value"] == pytest.approx(after[real].mean())
    assert cell["fpr_drift"] == pytest.approx(after[real].mean() - before[real].mean())
    assert cell["flips"]["value"] == pytest.approx(np.mean(before != after))
    assert cell["auroc"]["value"] == pytest.approx(roc_auc_score(LABEL, WORSE))
    assert found["worst_cell"] == "worse"
    assert found["worst_accuracy"] == cell["accuracy"]
    same = found["cells"]["same"]
    assert same["flips"]["value"] == same["fpr_drift"] == 0
    mean = (cell["accuracy"]["value"] + same["accuracy"]["value"]) / 2
    assert found["mean_accuracy"] == pytest.approx(mean)
    assert found["clean_accuracy"] == found["cells"]["clean"]["accuracy"] == same["accuracy"]


def test_an_image_without_a_logit_counts_neither_before_nor_after() -> None:
    holes = WORSE.copy()
    holes[:100] = np.nan
    cell = measure(worse=holes)["cells"]["worse"]
    real = LABEL[100:] == 0
    before, after = (compute_p_fake(logit[100:], 1.5) >= 0.4 for logit in (CLEAN, WORSE))
    assert cell["num_images"] == 300
    assert cell["flips"]["value"] == pytest.approx(np.mean(before != after))
    assert cell["fpr_drift"] == pytest.approx(after[real].mean() - before[real].mean())


def test_a_cell_without_an_image_is_not_the_worst() -> None:
    found = measure(worse=np.full(400, np.nan, np.float32), same=CLEAN)
    assert found["cells"]["worse"]["accuracy"]["value"] is None
    assert found["worst_cell"] == "same"
    none = measure(worse=np.full(400, np.nan, np.float32))
    assert none["worst_cell"] is none["worst_accuracy"] is none["mean_accuracy"] is None


@pytest.mark.parametrize("label", [0, 1])
def test_with_one_class_what_needs_the_other_is_undefined(label: int) -> None:
    some = label == LABEL
    found = measure_grid(
        GRID, CLEAN[some], {"worse": WORSE[some]}, LABEL[some], temperature=1.5, threshold=0.4
    )
    cell = found["cells"]["worse"]
    assert cell["auroc"]["value"] is None
    assert cell[("tpr", "fpr")[label]]["value"] is None
    assert cell["accuracy"]["value"] is not None
    assert (cell["fpr_drift"] is None) == (label == 1)


def test_the_interval_of_the_auroc_is_near_that_of_the_bootstrap() -> None:
    ties = WORSE.round()
    found = measure_auroc(ties, LABEL)
    drawn = compute_metrics(ties, LABEL, temperature=1.0, threshold=0.5)["auroc"]
    assert found["value"] == pytest.approx(roc_auc_score(LABEL, ties))
    for end in ("low", "high"):
        assert found[end] == pytest.approx(drawn[end], abs=0.006)


def test_a_perfect_ranking_has_no_value_above_one() -> None:
    found = measure_auroc(LABEL + np.linspace(0, 0.1, 400), LABEL)
    assert found == {"value": 1.0, "low": 1.0, "high": 1.0}
