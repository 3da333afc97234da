"""Labels, splits and sources: what words and paths mean."""

from __future__ import annotations

import pytest

from cifake_ray.core.labels import (
    LabelReader,
    find_split_like,
    make_class_names,
    parse_split,
    read_file_path,
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
        # Words written as one, and what else people call a split.
        ("trainset/real", (REAL, "train", None)),
        ("TestSet/fakeimages", (FAKE, "test", None)),
        ("validset/RealPhotos", (REAL, "val", None)),
        ("tst/realfaces", (REAL, "test", None)),
        ("validate/fake", (FAKE, "val", None)),
        ("trainval/real", (REAL, "train", None)),
        ("test-dev/real", (REAL, "test", None)),
        ("private_test/fake", (FAKE, "test", None)),
        ("split=test/label=fake", (FAKE, "test", None)),
        # A split beside other words, above the class, if no other folder is a split.
        ("progan_train/airplane/0_real", (REAL, "train", "airplane")),
        ("progan_val/1_fake", (FAKE, "val", "progan_val")),
        ("CNN_synth_testset/progan/0_real", (REAL, "test", "progan")),
        ("test_unseen", (None, "test", None)),
        ("testB/real", (REAL, "test", "testB")),
        ("contest/latest/real", (REAL, None, "contest")),
        ("train/crossval_test/real", (REAL, "train", "crossval_test")),
        ("real/coco_val2017", (REAL, None, "coco_val2017")),
        ("train_test_split/val/fake", (FAKE, "val", "train_test_split")),
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
        ("real/bullet_train", "bullet_train"),
        ("a/b/CNN_testset", "CNN_testset"),
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
        ([None, "", "  ", float("nan"), "NaN", -1, -1.0, "-1", "None", "NULL", "N/A"], None),
    ],
)
def test_labels_are_read_in_any_case_and_type(values: list[object], label: int | None) -> None:
    reader = LabelReader("label")
    assert [reader.read(value) for value in values] == [label] * len(values)
    reader.check("here", "remedy")


@pytest.mark.parametrize("column", ["is_real", "isReal", "REAL", "real_image"])
def test_a_column_that_is_called_real_means_it(column: str) -> None:
    reader = LabelReader(column)
    values = [1, "True", "yes", 0, False, "no", "FAKE"]
    assert [reader.read(value) for value in values] == [REAL] * 3 + [FAKE] * 4
    assert "4 FAKE" not in reader.describe()  # each value by itself
    assert "--real-name" not in reader.describe()


@pytest.mark.parametrize(
    ("column", "is_told"),
    [
        ("fake", False),
        ("is_ai", False),
        ("label", True),
        ("real_or_fake", True),
        ("not_real", True),
    ],
)
def test_a_number_means_fake_and_is_told_where_the_column_does_not_say(
    column: str, is_told: bool
) -> None:
    reader = LabelReader(column)
    assert [reader.read(value) for value in (0, 1)] == [REAL, FAKE]
    assert ("--real-name 1 --fake-name 0" in reader.describe()) == is_told


def test_what_the_user_says_counts_before_the_name_of_the_column() -> None:
    reader = LabelReader("is_real", make_class_names(real=["0"], fake=["1"]))
    assert [reader.read(value) for value in (0, 1)] == [REAL, FAKE]


@pytest.mark.parametrize(
    ("path", "facts"),
    [
        ("train-00000-of-00001.parquet", (None, "train", None)),
        ("FAKE/sdxl/0000.parquet", (FAKE, None, "sdxl")),
        ("real.parquet", (REAL, None, None)),
        ("fake_images-00003.parquet", (FAKE, None, None)),
        ("test/ai/0.parquet", (FAKE, "test", None)),
        ("generated.csv", (None, None, None)),  # rather by a program
        ("real.txt", (REAL, None, None)),
        ("real_vs_fake.parquet", (None, None, None)),
        ("fake_or_real-train-00001.tar", (None, "train", None)),
        ("not_fake.txt", (None, None, None)),
        ("FAKE/ai_train.parquet", (FAKE, "train", None)),
        ("lists/val.csv.gz", (None, "val", None)),
        ("data/holdout-00000-of-00002.parquet", (None, "holdout", None)),
    ],
)
def test_the_path_of_a_file_of_many_images_tells_what_folders_do(
    path: str, facts: tuple[int | None, str | None, str | None]
) -> None:
    assert read_file_path(path, NAMES) == facts


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
