"""The page and the terminal on a grid: the worst first, what cannot be known as a dash."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from cifake_ray.config.grid import Grid
from cifake_ray.core.evaluation.grid import measure_grid
from cifake_ray.report.grid import describe_grid, draw_grid_figures, list_grid_rows

GRID: Grid = {
    "jpeg_50": {"jpeg": 50},
    "jpeg_90": {"jpeg": 90},
    "dark": {"brightness": 0.5},
    "bright": {"brightness": 1.5},
    "web": {"max_side": 768, "jpeg": 60},
    "lone": {"blur": 1},
    "impossible": {"webp": 50},
    "also": {"webp": 80},
}


@pytest.fixture(params=["both", "real"])
def grid(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Each cell is worse than the one before, but for `impossible`, which no image has."""
    rng = np.random.default_rng(5)
    label = np.arange(300) % 2 if request.param == "both" else np.zeros(300, np.int64)
    clean = rng.normal(size=300) + 6 * (label - 0.5)
    logits = {
        name: clean + number * rng.normal(size=300) * 2 for number, name in enumerate(GRID, start=1)
    }
    logits["impossible"] = np.full(300, np.nan)
    return measure_grid(GRID, clean, logits, label, temperature=1.0, threshold=0.5)


def test_clean_comes_first_then_the_worst(grid: dict[str, Any]) -> None:
    rows = list_grid_rows(grid)
    accuracies = [grid["cells"][name.split(":")[0]]["accuracy"]["value"] for name, _ in rows]
    assert rows[0][0] == "clean"
    assert rows[1][0].split(":")[0] == grid["worst_cell"]
    assert accuracies[1:-1] == sorted(accuracies[1:-1])
    assert rows[-1] == ("impossible: webp 50", ["-"] * 6)


def test_a_name_that_does_not_say_its_steps_is_followed_by_them(grid: dict[str, Any]) -> None:
    names = {name for name, _ in list_grid_rows(grid)}
    assert {"jpeg_50", "dark: brightness 0.5", "web: max_side 768, jpeg 60"} <= names


def test_every_number_of_a_row_is_that_of_its_cell() -> None:
    cell = {
        "steps": {"jpeg": 50},
        "accuracy": {"value": 0.9, "low": 0.8, "high": 0.95},
        "tpr": {"value": 0.7, "low": 0.6, "high": 0.75},
        "fpr": {"value": 0.1, "low": 0.05, "high": 0.2},
        "fpr_drift": -0.034,
        "flips": {"value": 0.3, "low": 0.2, "high": 0.35},
        "auroc": {"value": 0.987, "low": 0.97, "high": 0.99},
    }
    assert list_grid_rows({"cells": {"a": cell}})[0][1] == [
        *("90.0% (80.0-95.0)", "70.0% (60.0-75.0)", "10.0% (5.0-20.0)"),
        *("-3.4", "30.0% (20.0-35.0)", "0.987 (0.970-0.990)"),
    ]


def test_a_curve_is_drawn_for_each_step_with_two_strengths(grid: dict[str, Any]) -> None:
    figures = draw_grid_figures(grid)
    assert list(figures) == ["grid", "grid_jpeg", "grid_brightness"]
    assert figures == draw_grid_figures(grid)


def test_the_points_of_a_curve_are_in_the_order_of_strength_with_clean_at_its_place() -> None:
    label = np.arange(100) % 2
    logit = label - 0.5
    grid = measure_grid(
        GRID, logit, dict.fromkeys(GRID, logit), label, temperature=1.0, threshold=0.5
    )
    figures = draw_grid_figures(grid)
    for stem, names in (
        ("grid_brightness", ["0.5", "clean", "1.5"]),
        ("grid_jpeg", ["50", "90", "clean"]),
    ):
        texts = re.findall(r">([^<>]+)</text>", figures[stem].decode())
        assert texts[:3] == names


def test_the_sentence_names_the_worst_cell_and_the_mean(grid: dict[str, Any]) -> None:
    (sentence,) = describe_grid(grid)
    assert f"Under 8 perturbations at p_fake >= 0.5: worst {grid['worst_cell']}," in sentence
    assert f"mean {100 * grid['mean_accuracy']:.1f}%" in sentence
    assert describe_grid(None) == describe_grid({**grid, "worst_cell": None}) == []
