"""Read labels, splits and sources from paths and values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from cifake_ray.core.schema import FAKE, REAL
from cifake_ray.errors import UsageError

SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


class PathLabels(NamedTuple):
    label: int | None
    split: str | None
    source: str | None


def make_class_names(real: Iterable[str] = (), fake: Iterable[str] = ()) -> dict[str, int]:
    """Map lower-case folder names to labels. UsageError when one name means both."""
    names = {"real": REAL, "0_real": REAL, "fake": FAKE, "1_fake": FAKE}
    for label, extra in ((REAL, real), (FAKE, fake)):
        for name in extra:
            if names.setdefault(name.lower(), label) != label:
                raise UsageError(f"the folder name {name!r} cannot mean both REAL and FAKE")
    return names


def read_path(folders: Sequence[str], class_names: dict[str, int]) -> PathLabels:
    """Return label, split and source from the folders above an image, outermost first.

    The label is the first folder that is a class name; the folder before it is the split if it is
    train, val, valid, validation or test; the folder after it is the source.
    """
    for index, folder in enumerate(folders):
        label = class_names.get(folder.lower())
        if label is not None:
            split = SPLIT_NAMES.get(folders[index - 1].lower()) if index else None
            source = folders[index + 1] if index + 1 < len(folders) else None
            return PathLabels(label, split, source)
    return PathLabels(None, None, None)


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
