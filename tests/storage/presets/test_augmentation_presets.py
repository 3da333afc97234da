"""Augmentation policies are found by name or read from YAML."""

from __future__ import annotations

from pathlib import Path

import pytest

from cifake_ray.config import POLICIES, Augmentation, TrainConfig
from cifake_ray.storage.presets.augmentation import read_augmentation


def read(augment: str) -> Augmentation:
    return read_augmentation(TrainConfig(shards="s", run="r", augment=augment, fit="crops"))


@pytest.mark.parametrize("name", POLICIES)
def test_a_name_is_its_policy(name: str) -> None:
    assert read(name) == POLICIES[name]


def test_a_mapping_is_the_policy_it_says() -> None:
    assert read('{"flip": 0.25, "shift": 0.1}') == Augmentation(flip=0.25, shift=0.1)
    assert read("{flip: 0.25}") == Augmentation(flip=0.25)
    with pytest.raises(ValueError, match="no step flop"):
        read("{flop: 1}")


def test_a_file_is_the_policy_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("flip: 0.25\nblur: 1.5\nblur_share: 0.2\n")
    assert read(str(path)) == Augmentation(flip=0.25, blur=1.5, blur_share=0.2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flip: [", "not readable as YAML"),
        ("- flip\n", "holds no mapping"),
        ("", "holds no steps"),
        ("flop: 1\n", "no step flop; it has flip"),
        ("flip: 7\n", "flip is 7; give 0 to 1"),
    ],
)
def test_a_file_that_holds_none_is_refused_with_its_name(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as refusal:
        read(str(path))
    assert str(path) in str(refusal.value)


def test_a_name_that_is_none_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="no such policy or file; there are none, flip, shift, seed"
    ):
        read(str(tmp_path / "wild"))
