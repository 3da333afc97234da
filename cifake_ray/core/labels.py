"""Read labels, splits and sources from paths and values."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

from cifake_ray.core.schema import FAKE, REAL
from cifake_ray.errors import UsageError

# The words, and what they mean, are those of Hugging Face `datasets.data_files.SPLIT_KEYWORDS`.
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
SAFEST_FIRST = ("test", "val", "train")  # of several split folders: never train on a test image
# FAKE where no other folder of the path means a class: `AI/Real` may be a collection's own name.
WEAK_FAKE_WORDS = frozenset({"ai", "aigc", "generated", "synthetic", "deepfake"})
# Words that change nothing: `training_set`, `RealArt`, `fake images 2`.
_FILLERS = """
set sets data dataset split image images img imgs photo photos picture pictures pic pics face faces
art sample samples shard shards part parts chunk chunks batch
"""
FILLERS = frozenset(_FILLERS.split())
# Without dev and eval, which are common in names of models (FLUX.1-dev).
SPLIT_LIKE_WORDS = SPLIT_NAMES.keys() - {"dev", "eval"} | {"holdout", "hold", "held", "fold"}
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[^\W\d_A-Za-z]+")


class PathLabels(NamedTuple):
    label: int | None = None
    split: str | None = None
    source: str | None = None


def make_class_names(real: Iterable[str] = (), fake: Iterable[str] = ()) -> dict[str, int]:
    """Map lower-case folder names to labels. UsageError when one name means both."""
    names = {"real": REAL, "0_real": REAL, "fake": FAKE, "1_fake": FAKE}
    for label, extra in ((REAL, real), (FAKE, fake)):
        for name in extra:
            if names.setdefault(name.lower(), label) != label:
                raise UsageError(f"the folder name {name!r} cannot mean both REAL and FAKE")
    return names


class FolderName(NamedTuple):
    """What the name of a folder says of the images below it."""

    label: int | None = None
    split: str | None = None
    is_weak: bool = False  # the label holds only if no other folder says more


def _split_words(name: str) -> list[str]:
    """Return the words of `training_set`, `RealArt` or `val2017` in lower case, without numbers."""
    return [word.lower() for word in _WORDS.findall(name)]


def read_folder_name(name: str, class_names: dict[str, int]) -> FolderName:
    """Return label and split of a folder's name: all of it or, but for fillers, each of its words.

    `train_real`, `Testing` and `fake images 2` mean something; `bullet_train` and `real_estate`
    have a word that is neither class, split nor filler, and `real_vs_fake` is both classes.
    """
    whole = name.lower()
    if whole in class_names:
        return FolderName(class_names[whole])
    labels, splits, is_weak = set(), set(), False
    for word in _split_words(name):
        if word in class_names:
            labels.add(class_names[word])
        elif word in SPLIT_NAMES:
            splits.add(SPLIT_NAMES[word])
        elif word in WEAK_FAKE_WORDS:
            labels.add(FAKE)
            is_weak = True
        elif word not in FILLERS:
            return FolderName()
    if len(labels) > 1 or len(splits) > 1:
        return FolderName()
    return FolderName(next(iter(labels), None), next(iter(splits), None), is_weak)


def read_path(folders: Sequence[str], class_names: dict[str, int]) -> PathLabels:
    """Return label, split and source from the folders above an image, outermost first.

    The label is that of the first folder that means a class. The split may be anywhere; of several
    the one furthest from training counts. The source is the first folder that is neither: below
    the class, else below the split, else at the top (no `images` or `data`). It is None where the
    label is.
    """
    names = [read_folder_name(folder, class_names) for folder in folders]
    classes = [i for i, name in enumerate(names) if name.label is not None]
    strong = [i for i in classes if not names[i].is_weak]
    splits = {name.split: i for i, name in reversed([*enumerate(names)]) if name.split}
    split = next((split for split in SAFEST_FIRST if split in splits), None)
    if not classes:
        return PathLabels(None, split, None)
    at_class = (strong or classes)[0]
    others = [
        i
        for i, folder in enumerate(folders)
        if i > at_class or (i < at_class and not FILLERS.issuperset(_split_words(folder)))
        if names[i].split is None
    ]
    starts = (at_class, splits[split] if split else -1, -1)
    source = next((i for start in starts for i in others if i > start), None)
    return PathLabels(names[at_class].label, split, None if source is None else folders[source])


@lru_cache(maxsize=1024)
def find_split_like(folder: str) -> str | None:
    """Return the first name in a path `a/b/c` that has a word for a split in it, if any has."""
    for name in folder.split("/"):
        if not SPLIT_LIKE_WORDS.isdisjoint(_split_words(name)):
            return name
    return None


def parse_label(value: object) -> int | None:
    """Parse REAL, FAKE, 0 or 1 in any case or type; empty means unknown. UsageError otherwise."""
    if value is None:
        return None
    text = str(value).strip().lower()
    labels = {"": None, "nan": None, "real": REAL, "fake": FAKE}
    labels |= {"0": REAL, "1": FAKE, "0.0": REAL, "1.0": FAKE, "false": REAL, "true": FAKE}
    if text not in labels:
        raise UsageError(f"label {value!r} is none of REAL, FAKE, 0, 1")
    return labels[text]


def read_class_label(value: object, class_names: Sequence[str] | None) -> int | None:
    """Parse a label of a Parquet file, by the class names of its footer if it has them.

    Hugging Face writes -1 for "unknown". Where no name means REAL or FAKE the label is unknown.
    UsageError for a number beyond the names.
    """
    if class_names is None or not isinstance(value, int):
        return parse_label(value)
    if value < 0:
        return None
    if value >= len(class_names):
        raise UsageError(f"label {value} is beyond the class names {', '.join(class_names)}")
    known = make_class_names()
    if not any(name.lower() in known for name in class_names):
        return None
    return parse_label(known.get(class_names[value].lower(), class_names[value]))


def parse_split(value: object) -> str | None:
    """Return the split's short name; other names are kept, empty means none."""
    text = "" if value is None else str(value).strip()
    return SPLIT_NAMES.get(text.lower(), text) or None
