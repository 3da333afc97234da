"""Search spaces: what they take, what trial n gets, and what becomes of it."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest

from cifake_ray.config import POLICIES, Augmentation
from cifake_ray.core.search.space import (
    ParameterRange,
    list_grid,
    parse_space,
    sample_space,
    to_train_options,
)

SPACE = parse_space(
    {
        "lr": {"loguniform": [0.001, 0.1]},
        "patience": {"randint": [1, 4]},
        "batch_size": {"lograndint": [8, 64]},
        "warmup": {"uniform": [0.1, 0.3]},
        "augment.flip": [0.0, 0.5],
        "schedule": {"choice": ["cosine", "onecycle"]},
    }
)


def test_a_list_is_a_choice() -> None:
    assert SPACE["augment.flip"] == ParameterRange("choice", (0.0, 0.5))
    assert SPACE["batch_size"] == ParameterRange("lograndint", (8, 64))


def test_trial_n_gets_what_the_seed_and_n_say_and_nothing_else() -> None:
    first = [sample_space(SPACE, 0, n) for n in range(20)]
    assert first == [sample_space(SPACE, 0, n) for n in range(20)]
    assert sample_space(SPACE, 0, 7) == first[7]
    assert sample_space(SPACE, 1, 7) != first[7]
    assert len({json.dumps(chosen) for chosen in first}) == 20


def test_each_kind_stays_inside_and_reaches_all_of_it() -> None:
    drawn = [sample_space(SPACE, 0, n) for n in range(2000)]
    columns = {name: [chosen[name] for chosen in drawn] for name in SPACE}
    rates = np.array(columns["lr"])
    assert rates.min() >= 0.001
    assert rates.max() < 0.1
    assert np.median(rates) == pytest.approx(0.01, rel=0.15)  # the middle on a log scale
    assert np.mean(columns["warmup"]) == pytest.approx(0.2, abs=0.01)
    assert set(columns["patience"]) == {1, 2, 3}
    assert all(type(value) is int for value in columns["batch_size"])
    assert min(columns["batch_size"]) == 8
    assert max(columns["batch_size"]) == 63
    shares = Counter(columns["schedule"])
    assert set(shares) == {"cosine", "onecycle"}
    assert shares["cosine"] == pytest.approx(1000, abs=150)


def test_the_grid_is_every_combination_once() -> None:
    space = parse_space({"patience": [1, 2], "augment.flip": [0.0, 0.5], "lr": [0.1]})
    assert list(list_grid(space)) == [
        {"patience": patience, "augment.flip": flip, "lr": 0.1}
        for patience in (1, 2)
        for flip in (0.0, 0.5)
    ]
    with pytest.raises(ValueError, match="--searcher grid: lr is a loguniform; give a list"):
        list(list_grid(SPACE))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "searches nothing"),
        ({"learning_rate": [1]}, "learning_rate: cannot be searched; it takes"),
        ({"epochs": [1, 2]}, "epochs: cannot be searched"),
        ({"run": ["a"]}, "run: cannot be searched"),
        ({"augment.flop": [1]}, r"augment\.flop: cannot be searched"),
        ({"augment": ["flip"], "augment.flip": [0.5]}, "search either `augment` or its steps"),
        ({"lr": 0.1}, "lr: give a list of values, or one of choice, uniform"),
        ({"lr": {"normal": [0, 1]}}, "lr: give a list of values, or one of choice"),
        ({"lr": {"uniform": [0, 1], "choice": [1]}}, "lr: give a list of values"),
        ({"lr": []}, "lr: choice takes a list of values"),
        ({"lr": {"uniform": 3}}, "lr: uniform takes a list"),
        ({"lr": {"uniform": [1]}}, r"lr: uniform takes \[lowest, highest\]"),
        ({"lr": {"uniform": [2, 1]}}, r"lr: uniform takes \[lowest, highest\]"),
        ({"lr": {"uniform": ["a", "b"]}}, r"lr: uniform takes \[lowest, highest\]"),
        ({"lr": {"loguniform": [0, 1]}}, "lr: loguniform begins above 0"),
        ({"patience": {"randint": [1.5, 3]}}, "patience: randint takes whole numbers"),
        (
            {"patience": {"uniform": [1, 5]}},
            r"patience is 1\.0; give a whole number",
        ),
        ({"optimizer": ["adamw", "adam"]}, "optimizer is 'adam'; give adamw or sgd or muon"),
        ({"lr": ["0.1"]}, r"lr is '0\.1'; give a number"),
        ({"channels_last": [0, 1]}, "channels_last is 0; give true or false"),
        ({"augment.flip": ["often"]}, r"augment\.flip is 'often'; give a number"),
        ({"num_workers": ["1", "2"]}, "num_workers: cannot be searched"),
        ({"monitor": ["val_loss"]}, "monitor: cannot be searched"),
    ],
)
def test_a_space_that_cannot_be_is_refused(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_space(values)


def test_steps_are_put_into_the_policy_and_the_rest_are_options() -> None:
    chosen = {"lr": 0.1, "augment.shift": 0.25, "augment.flip": 0.0}
    options = to_train_options(chosen, POLICIES["shift"])
    assert options["lr"] == 0.1
    assert options["augment"] == Augmentation(shift=0.25)
    assert to_train_options({"lr": 0.1}, POLICIES["shift"]) == {"lr": 0.1}


@pytest.mark.parametrize(
    ("steps", "left"),
    [
        ({"jpeg_quality": 50, "jpeg_share": 0.0}, {}),
        ({"jpeg_quality": 100, "jpeg_share": 0.3}, {}),
        ({"jpeg_quality": 50, "jpeg_share": 0.3}, {"jpeg_quality": 50, "jpeg_share": 0.3}),
        ({"noise": 0, "noise_share": 0.5}, {}),
        ({"noise": 4.0}, {}),
    ],
)
def test_half_a_step_is_none(steps: dict[str, Any], left: dict[str, Any]) -> None:
    chosen = {f"augment.{name}": value for name, value in steps.items()}
    assert to_train_options(chosen, Augmentation())["augment"] == Augmentation(**left)


@pytest.mark.parametrize(
    ("domain", "value", "inside"),
    [
        (
            ParameterRange("uniform", (0.1, 0.3)),
            0.36,
            np.nextafter(0.3, 0),
        ),  # the highest is left out
        (ParameterRange("uniform", (0.1, 0.3)), 0.08, 0.1),
        (ParameterRange("loguniform", (0.1, 0.3)), 0.2, 0.2),
        (ParameterRange("randint", (1, 4)), 5, 3),
        (ParameterRange("choice", (1, 4)), 4, 4),
    ],
)
def test_a_value_is_brought_back_into_its_range(
    domain: ParameterRange, value: Any, inside: Any
) -> None:
    assert domain.clip(value) == inside
