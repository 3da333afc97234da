"""Recipes and search spaces are found by name or read from YAML."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cifake_ray.config import POLICIES, TrainConfig
from cifake_ray.core.search.space import parse_space, sample_space, to_train_options
from cifake_ray.storage.presets.yaml_presets import (
    EVERYTHING,
    RECIPES,
    SEARCHES,
    find_preset,
    read_mapping,
    read_recipe,
    read_searches,
)

SPACES = sorted(path.stem for path in SEARCHES.glob("*.yaml"))


@pytest.mark.parametrize("name", [*SPACES, EVERYTHING])
def test_what_a_space_in_the_box_chooses_can_be_trained(name: str) -> None:
    space = parse_space(read_searches((name,)))
    for number in range(300):
        options = to_train_options(sample_space(space, 0, number), POLICIES["shift"])
        TrainConfig(shards="s", run="r", **options)


def test_everything_is_all_of_them_and_of_an_option_in_several_the_last_counts() -> None:
    names = {option for space in SPACES for option in read_searches((space,))}
    assert set(read_searches((EVERYTHING,))) == names
    lr = read_searches(("architecture",))["lr"]
    assert read_searches(("optimiser", "architecture"))["lr"] == lr
    assert read_searches(("architecture", "optimiser"))["lr"] != lr


def test_the_box_goes_before_a_file_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fast").write_text("epochs: 1\n")
    assert find_preset("fast", RECIPES) == RECIPES / "fast.yaml"
    assert find_preset("./fast", RECIPES) == Path("fast")
    with pytest.raises(ValueError, match="quick: no such file, and not among the built-in recipes"):
        find_preset("quick", RECIPES)


def test_a_policy_may_stand_in_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("batch-size: 8\naugment:\n  flip: 0.5\n  shift: 0.1\n")
    values = read_recipe(path)
    assert values["batch_size"] == 8
    assert json.loads(values["augment"]) == {"flip": 0.5, "shift": 0.1}


def test_numbers_with_an_exponent_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("lr: 1e-3\nweight_decay: 2E+1\nlayer_decay: .5e0\nmodel: 3e45ab\n")
    values = {"lr": 0.001, "weight_decay": 20.0, "layer_decay": 0.5, "model": "3e45ab"}
    assert read_mapping(path) == values


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "not readable as YAML"), ("- a\n", "holds no mapping")],
)
def test_a_file_that_is_no_mapping_is_refused_with_its_name(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as refusal:
        read_mapping(path)
    assert str(path) in str(refusal.value)
