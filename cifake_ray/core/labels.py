"""Read labels, splits and sources from paths and values."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from textwrap import shorten
from typing import Any, NamedTuple

from cifake_ray.core.schema import FAKE, LABEL_NAMES, REAL
from cifake_ray.errors import UsageError

# The words, and what they mean, are those of Hugging Face `datasets.data_files.SPLIT_KEYWORDS`, and
# what else people call their folders.
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "tst", "eval", "evaluation"), "test"),
}
ANSWERS = ("0", "1"), ("false", "true")
NO_LABELS = frozenset({"", "nan", "none", "null", "n/a", "<na>", "-1"})
MAX_COUNTED_VALUES = 1000  # of a label column, one by one
MAX_COUNTED_CHARS = 100  # of one of them: more is never shown
MAX_SHOWN_VALUES = 8
SAFEST_FIRST = ("test", "val", "train")  # of several split folders: never train on a test image
# FAKE where no other folder of the path means a class: `AI/Real` may be a collection's own name.
WEAK_FAKE_WORDS = frozenset({"ai", "aigc", "generated", "synthetic", "deepfake"})
# In names of a classifier's outputs. A photo is REAL only where no other word says what it is.
REAL_WORDS = frozenset(
    {"real", "realism", "human", "hum", "natural", "nature", "authentic", "genuine", "original"}
)
FAKE_WORDS = WEAK_FAKE_WORDS | {"fake", "artificial", "deepfakes"}
PHOTO_WORDS = frozenset({"photo", "photos", "photograph", "photographs", "photography"})
DENIALS = frozenset({"no", "non", "not", "without"})
# Words that change nothing: `training_set`, `RealArt`, `fake images 2`, `class=real`.
_FILLERS = """
set sets data dataset datasets split image images img imgs photo photos picture pictures pic pics
face faces art sample samples shard shards part parts chunk chunks batch label class public private
"""
FILLERS = frozenset(_FILLERS.split())
# What a split is called beside words of other kinds, as in `progan_train`. Without dev and eval,
# which are common in names of models (FLUX.1-dev).
SURE_SPLIT_WORDS = SPLIT_NAMES.keys() - {"dev", "eval"}
SPLIT_LIKE_WORDS = SURE_SPLIT_WORDS | {"holdout", "hold", "held", "fold"}
_LETTERS = re.compile(r"[^\W\d_]+")
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[^\W\d_A-Za-z]+")
_SHARD_NUMBER = re.compile(r"(^|[-_.])\d+(-of-\d+)?$")
_FILE_SUFFIX = re.compile(
    r"\.(tar(\.\w+)?|tgz|(parquet|csv|tsv|txt|jsonl|ndjson|json|lst|list)(\.gz)?)$", re.IGNORECASE
)


class PathLabels(NamedTuple):
    label: int | None = None
    split: str | None = None
    source: str | None = None

    def join(self, other: PathLabels) -> PathLabels:
        """Return these, and of the other what these lack; of two splits the safer one."""
        splits = (self.split, other.split)
        split = next((split for split in SAFEST_FIRST if split in splits), splits[0] or splits[1])
        label = other.label if self.label is None else self.label
        return PathLabels(label, split, self.source or other.source)


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
    weak_split: str | None = None  # likewise, and only above the folder of the class


@lru_cache(maxsize=64)
def _compile_words(class_names: frozenset[str]) -> re.Pattern[str]:
    own = {name for name in class_names if name.isalpha() and len(name) > 2}
    known = SPLIT_NAMES.keys() | WEAK_FAKE_WORDS | FILLERS | own
    return re.compile(f"({'|'.join(sorted(known, key=len, reverse=True))})")


def _find_words(name: str, class_names: Iterable[str] = ()) -> list[str]:
    """Return the words of `training_set`, `RealArt`, `testset` or `val2017` in lower case.

    Known words may stand together without a space between them. Numbers are left out.
    """
    known, words = _compile_words(frozenset(class_names)), []
    for letters in _LETTERS.findall(name):
        parts = known.split(letters.lower())
        if any(parts[::2]):  # there is more than known words
            words += [word.lower() for word in _WORDS.findall(letters)]
        else:
            words += parts[1::2]
    return words


def _choose_split(words: Iterable[str]) -> str | None:
    """Return the split that words mean; `trainval` is for training, and `test-dev` is not."""
    splits = {SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES}
    if len(splits) > 1 and splits >= {"train", "test"}:
        return None
    return next((split for split in ("test", "train", "val") if split in splits), None)


def read_folder_name(name: str, class_names: Mapping[str, int]) -> FolderName:
    """Return label and split of a folder's name: all of it or, but for fillers, each of its words.

    `train_real`, `Testing` and `fake images 2` mean something. `bullet_train` and `real_estate`
    have a word that is neither class, split nor filler: no class, and a split only if no other
    folder is one. `real_vs_fake` is both classes.
    """
    whole = name.lower()
    if whole in class_names:
        return FolderName(class_names[whole])
    words = _find_words(name, class_names)
    labels, is_weak = set(), False
    for word in words:
        if word in class_names:
            labels.add(class_names[word])
        elif word in WEAK_FAKE_WORDS:
            labels.add(FAKE)
            is_weak = True
        elif word not in SPLIT_NAMES and word not in FILLERS:
            return FolderName(weak_split=_choose_split(SURE_SPLIT_WORDS.intersection(words)))
    split = _choose_split(words)
    if len(labels) > 1 or (split is None and not SPLIT_NAMES.keys().isdisjoint(words)):
        return FolderName()
    return FolderName(next(iter(labels), None), split, is_weak)


def read_path(folders: Sequence[str], class_names: Mapping[str, int]) -> PathLabels:
    """Return label, split and source from the folders above an image, outermost first.

    The label is that of the first folder that means a class. The split may be anywhere; of several
    the one furthest from training counts. The source is the first folder that is neither: below
    the class, else below the split, else at the top (no `images` or `data`). It is None where the
    label is.
    """
    names = [read_folder_name(folder, class_names) for folder in folders]
    classes = [i for i, name in enumerate(names) if name.label is not None]
    strong = [i for i in classes if not names[i].is_weak]
    at_class = (strong or classes or [len(names)])[0]
    splits = {name.split: i for i, name in reversed([*enumerate(names)]) if name.split}
    if not splits:  # below the class, `coco_val2017` is rather where images are from
        weak = [*enumerate(names[:at_class])]
        splits = {name.weak_split: i for i, name in reversed(weak) if name.weak_split}
    split = next((split for split in SAFEST_FIRST if split in splits), None)
    if not classes:
        return PathLabels(None, split, None)
    others = [
        i
        for i, folder in enumerate(folders)
        if i > at_class or (i < at_class and not FILLERS.issuperset(_find_words(folder)))
        if names[i].split is None
    ]
    starts = (at_class, splits[split] if split else -1, -1)
    source = next((i for start in starts for i in others if i > start), None)
    return PathLabels(names[at_class].label, split, None if source is None else folders[source])


def _find_class(name: str, class_names: Mapping[str, int]) -> int | None:
    """Return the one class that a name has a word of: REAL for `is_real`, FAKE for `isAI`."""
    words = _find_words(name, class_names)
    words += re.split("[-_. ]+", name.lower())  # classes such as `1_fake` and `sd15`
    classes = {class_names[word] for word in (*words, name.lower()) if word in class_names}
    classes |= {FAKE for word in words if word in WEAK_FAKE_WORDS}
    is_denied = not {"no", "non", "not"}.isdisjoint(words)
    return next(iter(classes)) if len(classes) == 1 and not is_denied else None


def read_class_name(name: str) -> int | None:
    """Return what a classifier's output of this name means: FAKE for `AI-made`; None if unsure."""
    words = {*_find_words(name), *_LETTERS.findall(name.lower())}
    if words & DENIALS or (words & REAL_WORDS and words & FAKE_WORDS):
        return None
    if words & FAKE_WORDS:
        return FAKE
    return REAL if words & (REAL_WORDS | PHOTO_WORDS) else None


def split_file_name(path: str, class_names: Mapping[str, int]) -> Iterator[str]:
    """Yield what the path of a file of many images says of them, as if each were a folder.

    `imagenet_midjourney-train-000.tar` is in `imagenet_midjourney/train`, and
    `data/train-00000-of-00002.parquet` in `data/train`.
    """
    *folders, name = path.split("/")
    yield from folders
    name = _SHARD_NUMBER.sub("", _FILE_SUFFIX.sub("", name))
    known = set(SURE_SPLIT_WORDS)
    if _find_class(name, class_names) is not None:  # `real_vs_fake` is none
        known |= class_names.keys()
    words = "|".join(map(re.escape, known))
    for part in re.split(rf"(?:^|[-_.])({words})(?=[-_.]|$)", name, flags=re.IGNORECASE):
        yield _SHARD_NUMBER.sub("", part).strip("-_.")


def read_file_path(path: str, class_names: Mapping[str, int]) -> PathLabels:
    """Return label, split and source from the path of a file of many images.

    Within `data/` the Hugging Face hub takes any word before `-00000-of-00001` for a split. A word
    like `generated` in the file's own name is no class.
    """
    names = [
        name
        for name in split_file_name(path, class_names)
        if name.lower() in class_names or not FILLERS.issuperset(_find_words(name))
    ]
    labels = read_path(names, class_names)
    folders, _, name = path.rpartition("/")
    if read_folder_name(_FILE_SUFFIX.sub("", name), class_names).is_weak:
        of_folders = read_path(folders.split("/"), class_names)
        labels = of_folders.join(PathLabels(split=labels.split))
    numbered = re.search(r"(?:^|/)data/([^/]+)-\d{5}-of-\d{5}[^/]*$", path)
    return labels._replace(split=labels.split or parse_split(numbered and numbered[1]))


@lru_cache(maxsize=1024)
def find_split_like(folder: str) -> str | None:
    """Return the first name in a path `a/b/c` that has a word for a split in it, if any has."""
    for name in folder.split("/"):
        if not SPLIT_LIKE_WORDS.isdisjoint(_find_words(name)):
            return name
    return None


class LabelReader:
    """Reads the values of a label column, and counts what they were taken for.

    Values mean what `class_names` says, in any case. As long as these do not turn them round, 0 and
    false mean REAL, 1 and true FAKE; in a column like `is_real` they mean what its name says, and
    so do no and yes. Every other value is unknown.
    """

    def __init__(self, column: str, class_names: Mapping[str, int] | None = None) -> None:
        self.column = column
        self.meanings = dict(make_class_names() if class_names is None else class_names)
        self.assumed = dict[str, int]()  # what nobody has said
        named = _find_class(column, self.meanings)
        for no, yes in ANSWERS if named is None else (*ANSWERS, ("no", "yes")):
            taken = {no: FAKE, yes: REAL} if named == REAL else {no: REAL, yes: FAKE}
            if taken.items() <= (taken | self.meanings).items():
                self.assumed |= {} if named is not None else taken.items() - self.meanings.items()
                self.meanings |= taken
        self.counts: Counter[tuple[str, int | None]] = Counter()  # by value and label
        # Millions of rows have a few values.
        self._read_words = lru_cache(MAX_COUNTED_VALUES)(
            lambda text: read_folder_name(text, self.meanings).label
        )

    def read(self, value: object, names: Sequence[str] | None = None) -> int | None:
        """Return the label of a value, which is a number of a name if there are `names`.

        None where it is unknown, and where there is none: empty, NaN, null, or -1 as the hub writes
        it.
        """
        text = _write_label(value)
        if names is not None and text.isdecimal() and int(text) < len(names):
            text = names[int(text)].strip()
        if text.lower() in NO_LABELS:
            text = ""
        label = self.meanings.get(text.lower())
        if label is None:
            label = self._read_words(text)
        self._count(text, label, 1)
        return label

    def to_record(self) -> list[list[Any]]:
        """Return what was read, as JSON has it, for `merge`."""
        return [[text, label, count] for (text, label), count in self.counts.items()]

    def merge(self, record: Iterable[Sequence[Any]]) -> None:
        """Add what another reader of the column has read. ValueError when it is no such record."""
        for text, label, count in record:
            if (type(text), type(count)) != (str, int) or label not in (None, REAL, FAKE):
                raise ValueError(f"the label {text!r}, {label!r}, {count!r} times")
            self._count(text, label, count)

    def _count(self, text: str, label: int | None, count: int) -> None:
        # A column of free text has endless values.
        shown = text[:MAX_COUNTED_CHARS] if len(self.counts) < MAX_COUNTED_VALUES else "others"
        self.counts[shown, label] += count

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
        for no, yes in ANSWERS:
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
