"""Trials as a table: the best, and what the options were worth."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cifake_ray.core.search.trial_table import find_best, measure_importance, to_axis, to_row


def make_history(*accuracies: float) -> list[dict[str, Any]]:
    return [
        {
            "epoch": epoch,
            "step": 10 * epoch,
            "train_s": 1.5,
            "val_accuracy": accuracy,
            "val_loss": 1 - accuracy,
        }
        for epoch, accuracy in enumerate(accuracies, start=1)
    ]


def test_a_row_shows_the_best_epoch_and_all_the_work() -> None:
    row = to_row(3, {"lr": 0.1}, "stopped by asha", 99, make_history(0.5, 0.9, 0.8), "val_accuracy")
    assert row == {
        "trial": 3,
        "end": "stopped by asha",
        "epochs": 3,
        "val_accuracy": 0.9,
        "best_epoch": 2,
        "num_parameters": 99,
        "steps": 30,
        "train_s": 4.5,
        "lr": 0.1,
    }
    assert to_row(0, {}, None, None, [], "val_loss")["val_loss"] is None


def test_the_best_is_the_lowest_loss_and_of_equals_the_first() -> None:
    rows = [
        to_row(n, {}, None, 1, make_history(accuracy), "val_loss")
        for n, accuracy in enumerate((0.5, 0.9, 0.9))
    ]
    best = find_best([*rows, to_row(9, {}, "failed", 1, [], "val_loss")], "val_loss")
    assert best is not None
    assert best["trial"] == 1
    assert find_best([to_row(9, {}, "failed", 1, [], "val_loss")], "val_loss") is None


def test_the_option_that_matters_explains_most() -> None:
    rng = np.random.default_rng(0)
    rows = [
        {
            "val_accuracy": 0.5 + 0.4 * float(lr),
            "lr": float(lr),
            "flip": float(rng.random()),
            "model": "cnn",
        }
        for lr in rng.random(24)
    ]
    found = measure_importance(rows, ["flip", "lr", "model"], "val_accuracy")
    assert next(iter(found)) == "lr"
    assert found["lr"] > 0.8
    assert sum(found.values()) == pytest.approx(1)
    assert "model" not in found  # all had the same


def test_too_few_trials_explain_nothing() -> None:
    rows = [{"val_accuracy": n / 10, "lr": n} for n in range(7)]
    assert measure_importance(rows, ["lr"], "val_accuracy") == {}
    equal = [{"val_accuracy": 0.5, "lr": n} for n in range(20)]
    assert measure_importance(equal, ["lr"], "val_accuracy") == {}


@pytest.mark.parametrize(
    ("values", "places", "marks"),
    [
        ([1, 3, 1], [0, 1, 0], {0.0: "1", 1.0: "3"}),
        (["b", "a", None], [1, 0.5, 0], {0.0: "None", 0.5: "a", 1.0: "b"}),
        ([5, 5], [0.5, 0.5], {0.5: "5"}),
        ([0.1 * n for n in range(1, 8)], [n / 6 for n in range(7)], None),
        ([10.0**n for n in range(7)], [n / 6 for n in range(7)], None),
    ],
)
def test_values_have_places_on_an_axis(values: Any, places: Any, marks: Any) -> None:
    found, named = to_axis(values)
    assert found.tolist() == pytest.approx(places)
    assert marks is None or named == marks
