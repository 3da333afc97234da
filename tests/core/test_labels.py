"""Labels, splits and sources: what words and paths mean."""

from __future__ import annotations

import pytest

from cifake_ray.core.labels import (
    LabelReader,
    find_split_like,
    make_class_names,
    parse_split,
    read_path,
)
from cifake_ray.core.schema import FAKE, REAL
from cifake_ray.errors import UsageError

NAMES = make_class_names()


@pytest.mark.parametrize(
    ("path", "facts"),
    [
        ("", (None, None, None)),
        ("real", (REAL, None, None)),
        ("FAKE", (FAKE, None, None)),
        ("0_real", (REAL, None, None)),
        ("1_Fake", (FAKE, None, None)),
        ("train/real", (REAL, "train", None)),
        ("Valid/real", (REAL, "val", None)),
        ("validation/fake/sdxl", (FAKE, "val", "sdxl")),
        ("other/fake", (FAKE, None, "other")),
        ("fake/real/x", (FAKE, None, "real")),
        ("train", (None, "train", None)),
        ("fakes", (None, None, None)),
        ("0", (None, None, None)),
        ("really", (None, None, None)),
        # The words that people use for splits.
        ("Training/Real", (REAL, "train", None)),
        ("TESTING/Fake", (FAKE, "test", None)),
        ("eval/real", (REAL, "test", None)),
        ("Evaluation/real", (REAL, "test", None)),
        ("dev/real", (REAL, "val", None)),
        ("train2017/real", (REAL, "train", None)),
        ("val_2/real", (REAL, "val", None)),
        ("test_set/training_images/real", (REAL, "test", None)),
        ("TrainingSet/real", (REAL, "train", None)),
        # Anywhere above or below the class.
        ("fake/train", (FAKE, "train", None)),
        ("fake/sdxl/Test", (FAKE, "test", "sdxl")),
        ("train/other/fake", (FAKE, "train", "other")),
        ("train/airplane/0_real", (REAL, "train", "airplane")),
        # A class of objects may be called like a split: training must not see a test image.
        ("test/progan/train/0_real", (REAL, "test", "progan")),
        ("val/train/1_fake", (FAKE, "val", None)),
        ("train/test/fake", (FAKE, "test", None)),
        # Words in names that mean something else.
        ("real/bullet_train", (REAL, None, "bullet_train")),
        ("fake/FLUX.1-dev", (FAKE, None, "FLUX.1-dev")),
        ("real_estate", (None, None, None)),
        ("real_vs_fake", (None, None, None)),
        ("real_vs_fake/train/fake", (FAKE, "train", "real_vs_fake")),
        ("train_test/fake", (FAKE, None, "train_test")),
        # The generator: below the class, else below the split, else at the top.
        ("test/progan/cat/1_fake", (FAKE, "test", "progan")),
        ("progan/cat/1_fake", (FAKE, None, "progan")),
        ("CNN/test/crn/0_real", (REAL, "test", "crn")),
        ("imagenet_midjourney/train/ai", (FAKE, "train", "imagenet_midjourney")),
        ("Midjourney/imagenet_midjourney/val/ai", (FAKE, "val", "Midjourney")),
        ("data/train/Images/fake", (FAKE, "train", None)),
        ("shard-00012/fake", (FAKE, None, None)),
        ("dataset 2/glide/train/fake", (FAKE, "train", "glide")),
        ("A/train/fake/sdxl/deep", (FAKE, "train", "sdxl")),
        # Class and more in one name.
        ("training_real", (REAL, "train", None)),
        ("fake-test", (FAKE, "test", None)),
        ("FakeArt", (FAKE, None, None)),
        ("real images 2", (REAL, None, None)),
        ("AI", (FAKE, None, None)),
        ("ai-generated/sdxl", (FAKE, None, "sdxl")),
        ("AI/Real", (REAL, None, "AI")),  # the name of a collection, not of a class
        ("not_fake", (None, None, None)),
        ("r\u00e9al", (None, None, None)),
    ],
)
def test_folders_give_label_split_and_source(
    path: str, facts: tuple[int | None, str | None, str | None]
) -> None:
    assert read_path(path.split("/") if path else [], NAMES) == facts


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("a/bullet_train/real", "bullet_train"),
        ("train_test/fake", "train_test"),
        ("HoldOut/real", "HoldOut"),
        ("fold_3/real", "fold_3"),
        ("fake/FLUX.1-dev", None),
        ("training/real", "training"),
        ("contest/trainer/real", None),
    ],
)
def test_a_name_that_looks_like_a_split_is_found(path: str, name: str | None) -> None:
    assert find_split_like(path) == name


def test_names_of_your_own_join_the_known_ones_in_any_case() -> None:
    names = make_class_names(real=["Nature"], fake=["AI", "ai"])
    assert read_path(["NATURE"], names).label == REAL
    assert read_path(["Ai"], names).label == FAKE
    assert read_path(["real"], names).label == REAL
    assert read_path(["train_nature"], names) == (REAL, "train", None)


def test_a_name_of_your_own_beats_what_a_word_usually_means() -> None:
    names = make_class_names(real=["AI", "train"])
    assert read_path(["test", "ai"], names) == (REAL, "test", None)
    assert read_path(["test", "train"], names) == (REAL, "test", None)


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
        (
            [
                "FAKE",
                "fake",
                "Fake\n",
                "fake!",
                "AI",
                "1_fake",
                "Fake image",
                1,
                "1",
                1.0,
                "1.0",
                True,
                "True",
            ],
            FAKE,
        ),
        ([None, "", "  ", float("nan"), "NaN", -1, -1.0, "-1"], None),
    ],
)
def test_labels_are_read_in_any_case_and_type(values: list[object], label: int | None) -> None:
    reader = LabelReader("label")
    assert [reader.read(value) for value in values] == [label] * len(values)
    reader.check("here", "remedy")


@pytest.mark.parametrize("value", [2, -2, 0.5, "maybe", "01", "fakes", "yes", b"cat", "1" * 5000])
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
        ("Training", "train"),
        ("dev", "val"),
        ("eval", "test"),
        ("holdout", "holdout"),
        ("Fold 3", "Fold 3"),
        ("", None),
        ("  ", None),
        (None, None),
    ],
)
def test_splits_have_short_names_and_your_own_are_kept(value: object, split: str | None) -> None:
    assert parse_split(value) == split
