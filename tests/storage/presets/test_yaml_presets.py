"""Recipes and search spaces are found by name or read from YAML."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from wrong_values import WRONG_KINDS

from cifake_ray.config import POLICIES, TrainConfig
from cifake_ray.core.search.space import parse_space, sample_space, to_train_options
from cifake_ray.errors import CifakeError, UsageError
from cifake_ray.storage.presets.augmentation import read_augmentation
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


def nest_aliases(opening: str, levels: int = 12) -> str:
    """Ten aliases a level: 10**12 values in a few hundred bytes."""
    lines = ["a0: &a0 {x: 1}"]
    for n in range(1, levels + 1):
        closing = "}" * len(opening[:1])
        lines.append(f"a{n}: &a{n} {opening}[{', '.join([f'*a{n - 1}'] * 10)}]{closing}")
    return "\n".join(lines)


HOSTILE_TEXTS = {
    "aliases": nest_aliases(""),
    "merge keys": nest_aliases("{<<: "),
    "an alias within itself": "augment: &a [*a]",
    "a mapping within itself": "augment: &a {flip: *a}",
    "a tag of Python": "lr: !!python/object/apply:os.system [touch ran]",
    "a tag of a name": "lr: !!python/name:os.system",
    "an unknown tag": "lr: !x 1",
    "a date that is none": "lr: !!timestamp x",
    "a number that is none": "lr: !!int x",
    "a float that is none": "lr: !!float x",
    "a truth that is none": "lr: !!bool x",
    "bytes that are none": "lr: !!binary x",
    "pairs that are none": "lr: !!pairs [1]",
    "a name twice": "lr: 1\nlr: 2",
    "a name twice below": "augment: {flip: 0.1, flip: 0.2}",
    "a name twice by a dash": "batch-size: 1\nbatch_size: 2",
    "a list as a name": "? [a]\n: 1",
    "deep": "lr: " + "[" * 50_000,
    "deep mappings": "lr: " + "{a: " * 20_000,
    "long": "lr: 1 #" + "x" * 2**20,
    "binary": "\x00\x01\x02",
    "two documents": "a: 1\n---\nb: 2",
    "a number of many digits": "lr: " + "9" * 100_000,
}


@pytest.mark.parametrize("text", HOSTILE_TEXTS.values(), ids=HOSTILE_TEXTS)
def test_what_nobody_writes_is_refused_at_once_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    # What other tests left would be collected where the stack is full, and fail this one.
    gc.collect()
    started_s = time.monotonic()
    for read in (read_recipe, lambda path: read_searches((str(path),))):
        with pytest.raises(UsageError, match=r"mine\.yaml: ") as refusal:
            read(path)
        assert len(str(refusal.value)) < 400
    assert time.monotonic() - started_s < 60
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", WRONG_KINDS.values(), ids=WRONG_KINDS)
def test_a_file_may_be_no_file(tmp_path: Path, kind: Callable[[Path], Any]) -> None:
    kind(tmp_path / "mine.yaml")
    policy = TrainConfig(shards="-", run="-", augment=str(tmp_path / "mine.yaml"))
    for read in (
        lambda: read_mapping(find_preset(str(tmp_path / "mine.yaml"), RECIPES)),
        lambda: read_augmentation(policy),
    ):
        with pytest.raises(CifakeError, match=r"mine\.yaml"):
            read()


def test_sections_may_share_values_and_dates_are_text(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("train: &a {epochs: 2, model: 2024-01-01}\ntune: {<<: *a, epochs: 3}\n")
    assert read_mapping(path) == {
        "train": {"epochs": 2, "model": "2024-01-01"},
        "tune": {"epochs": 3, "model": "2024-01-01"},
    }
