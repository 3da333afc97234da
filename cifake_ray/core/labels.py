"""Read labels, splits and sources from paths and values."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from textwrap import shorten
from typing import NamedTuple

from cifake_ray.core.schema import FAKE, LABEL_NAMES, REAL
from cifake_ray.errors import UsageError

# The words, and what they mean, are those of Hugging Face `datasets.data_files.SPLIT_KEYWORDS`.
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
MAX_COUNTED_VALUES = 1000  # of a label column, one by one
MAX_SHOWN_VALUES = 8
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


def find_split(path: str) -> str | None:
    """Return the split that a file of a data set has by its path, as the Hugging Face hub reads it.

    The innermost folder that has a word for one split decides, else the name of the file; within
    `data/` the hub takes any word before `-00000-of-00001`.
    """
    *folders, name = path.split("/")
    for part in (*reversed(folders), name):
        words = re.split("[-._ 0-9]+", part.lower())
        splits = {SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES}
        if len(splits) == 1:
            return splits.pop()
    numbered = re.match(r"(.+)-\d{5}-of-\d{5}", name) if folders[-1:] == ["data"] else None
    return parse_split(numbered[1]) if numbered else None


class LabelReader:
    """Reads the values of a label column, and counts what they were taken for.

    Values mean what `class_names` says, in any case. As long as these do not turn them round, 0 and
    false mean REAL, 1 and true FAKE. Every other value is unknown.
    """

    def __init__(self, column: str, class_names: Mapping[str, int] | None = None) -> None:
        self.column = column
        self.meanings = dict(make_class_names() if class_names is None else class_names)
        self.assumed = dict[str, int]()  # what nobody has said
        for no, yes in (("0", "1"), ("false", "true")):
            if (self.meanings.get(no, REAL), self.meanings.get(yes, FAKE)) == (REAL, FAKE):
                assumed = {no: REAL, yes: FAKE}
                self.assumed |= {k: v for k, v in assumed.items() if k not in self.meanings}
        self.meanings |= self.assumed
        self.counts: Counter[tuple[str, int | None]] = Counter()  # by value and label

    def read(self, value: object, names: Sequence[str] | None = None) -> int | None:
        """Return the label of a value, which is a number of a name if there are `names`.

        None where it is unknown, and where there is none: empty, NaN, or -1 as the hub writes it.
        """
        text = _write_label(value)
        if names is not None and text.isdecimal() and int(text) < len(names):
            text = names[int(text)].strip()
        if text.lower() in ("", "nan", "-1"):
            text = ""
        label = self.meanings.get(text.lower())
        if label is None:
            label = read_folder_name(text, self.meanings).label
        # A column of free text has endless values.
        key = (text, label) if len(self.counts) < MAX_COUNTED_VALUES else ("others", label)
        self.counts[key] += 1
        return label

    def check(self, place: object, remedy: str) -> None:
        """Raise UsageError when there were values and none was understood."""
        if {label for text, label in self.counts if text} == {None}:
            raise UsageError(f"{place}: no label is understood: {self.describe()}; {remedy}")

    def describe(self) -> str:
        """Return a line with the count of each label and the values that it was read from."""
        parts = []
        for (text, label), count in self.counts.most_common(MAX_SHOWN_VALUES):
            name = "unknown" if label is None else LABEL_NAMES[label]
            shown = "" if text.upper() == name else f" ({shorten(repr(text), 40)})"
            parts.append(f"{count:,} {name}{shown}" if text else f"{count:,} without")
        more = len(self.counts) - MAX_SHOWN_VALUES
        line = f"labels from the column `{self.column}`: {', '.join(parts)}"
        line += f" and {more:,} more values" if more > 0 else ""
        texts = {text.lower() for text, _ in self.counts}
        for no, yes in (("0", "1"), ("false", "true")):
            if texts & {no, yes} & self.assumed.keys():
                line += f"; if {yes} means REAL, give --real-name {yes} --fake-name {no}"
        if any(text and label is None for text, label in self.counts):
            line += "; --real-name and --fake-name tell what other values mean"
        return line


def _write_label(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "backslashreplace")
    return re.sub(r"^(-?\d+)\.0+$", r"\1", str(value).strip())  # pandas writes 1.0 beside a null


def parse_split(value: object) -> str | None:
    """Return the split's short name; other names are kept, empty means none."""
    text = "" if value is None else str(value).strip()
    return SPLIT_NAMES.get(text.lower(), text) or None
