"""Labels, splits and sources: what words and paths mean."""

from __future__ import annotations

import pytest

from cifake_ray.core.labels import LabelReader, make_class_names, parse_split, read_path
from cifake_ray.core.schema import FAKE, REAL
from cifake_ray.errors import UsageError

NAMES = make_class_names()


@pytest.mark.parametrize(
    ("folders", "facts"),
    [
        ([], (None, None, None)),
        (["real"], (REAL, None, None)),
        (["FAKE"], (FAKE, None, None)),
        (["0_real"], (REAL, None, None)),
        (["1_Fake"], (FAKE, None, None)),
        (["train", "real"], (REAL, "train", None)),
        (["Valid", "real"], (REAL, "val", None)),
        (["validation", "fake", "sdxl"], (FAKE, "val", "sdxl")),
        (["other", "fake"], (FAKE, None, None)),
        (["train", "other", "fake"], (FAKE, None, None)),
        (["fake", "train"], (FAKE, None, "train")),
        (["fake", "real", "x"], (FAKE, None, "real")),
        (["train", "test", "fake"], (FAKE, "test", None)),
        (["train"], (None, None, None)),
        (["fakes"], (None, None, None)),
        (["0"], (None, None, None)),
        (["really"], (None, None, None)),
    ],
)
def test_the_first_class_folder_decides_and_its_neighbours_say_the_rest(
    folders: list[str], facts: tuple[int | None, str | None, str | None]
) -> None:
    assert read_path(folders, NAMES) == facts


def test_names_of_your_own_join_the_known_ones_in_any_case() -> None:
    names = make_class_names(real=["Nature"], fake=["AI", "ai"])
    assert read_path(["NATURE"], names).label == REAL
    assert read_path(["Ai"], names).label == FAKE
    assert read_path(["real"], names).label == REAL


@pytest.mark.parametrize(
    ("real", "fake"), [(["x"], ["X"]), (["fake"], []), ([], ["Real"]), (["1_fake"], [])]
)
def test_a_name_cannot_mean_both(real: list[str], fake: list[str]) -> None:
    with pytest.raises(ValueError, match="both REAL and FAKE"):
        make_class_names(real, fake)


@pytest.mark.parametrize(
    ("values", "label"),
    [
        (["REAL", "real", " Real ", b"real", 0, "0", 0.0, "0.0", False, "false"], REAL),
        (["FAKE", "fake", "Fake\n", 1, "1", 1.0, "1.0", True, "True"], FAKE),
        ([None, "", "  ", float("nan"), "NaN", -1, -1.0, "-1"], None),
    ],
)
def test_labels_are_read_in_any_case_and_type(values: list[object], label: int | None) -> None:
    reader = LabelReader("label")
    assert [reader.read(value) for value in values] == [label] * len(values)
    reader.check("here", "remedy")


@pytest.mark.parametrize("value", [2, -2, 0.5, "maybe", "01", "fake!", "yes", b"cat", "1" * 5000])
def test_anything_else_is_unknown_and_counted(value: object) -> None:
    reader = LabelReader("label")
    assert reader.read(value) is None
    with pytest.raises(UsageError, match=r"here: no label is understood: .*1 unknown.*; remedy"):
        reader.check("here", "remedy")


@pytest.mark.parametrize(
    ("value", "split"),
    [
        ("train", "train"),
        ("VALID", "val"),
        (" validation ", "val"),
        ("Test", "test"),
        ("holdout", "holdout"),
        ("Fold 3", "Fold 3"),
        ("", None),
        ("  ", None),
        (None, None),
    ],
)
def test_splits_have_short_names_and_your_own_are_kept(value: object, split: str | None) -> None:
    assert parse_split(value) == split
