"""Count labels, splits and sources while images are listed, and notice what goes unused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.compute as pc

from cifake_ray.core.labels import find_split_like
from cifake_ray.core.schema import LABEL_NAMES

MAX_NAMES = 1000  # that are counted one by one; a list may have a source for each image
SHOWN_NAMES = 5
MORE, NONE, UNLABELLED = "(more)", "none", "unlabelled"
_COUNTERS = ("labels", "splits", "sources", "unlabelled")


class ListingCounts:
    """Images by label, split and source; memory does not grow with their number."""

    def __init__(self) -> None:
        self.labels: Counter[str] = Counter()
        self.splits: Counter[str] = Counter()
        self.sources: Counter[str] = Counter()
        self.unlabelled: Counter[str] = Counter()  # by name of the folder
        self.split_like: dict[str, None] = {}  # names of folders of images without a split

    def add(self, batch: pa.RecordBatch) -> None:
        for row in pc.value_counts(batch.column("label")).to_pylist():
            label = row["values"]
            self.labels[UNLABELLED if label is None else LABEL_NAMES[label]] += row["counts"]
        _count(self.splits, batch.column("split"))
        _count(self.sources, batch.column("source"))
        _count(self.unlabelled, _find_folders(batch, "label", r"(?:^|/)(?P<name>[^/]+)/[^/]*$"))
        for folder in _find_folders(batch, "split", r"(?s)^(?P<name>.*)/").unique().to_pylist():
            if len(self.split_like) < SHOWN_NAMES and (name := find_split_like(folder or "")):
                self.split_like[name] = None

    def to_record(self) -> dict[str, dict[str, int]]:
        """Return all counts as JSON has them, for `merge`."""
        counters = {name: dict(getattr(self, name)) for name in _COUNTERS}
        return {**counters, "split_like": dict.fromkeys(self.split_like, 0)}

    def merge(self, record: dict[str, dict[str, int]]) -> None:
        """Add the counts of other images. ValueError when they are no such record."""
        if record.keys() != {*_COUNTERS, "split_like"}:
            raise ValueError(f"counts of {sorted(record)}")
        for name in _COUNTERS:
            counter = getattr(self, name)
            _add_counts(counter, record[name].items())
        self.split_like |= dict.fromkeys(record["split_like"])
        self.split_like = dict.fromkeys([*self.split_like][:SHOWN_NAMES])

    def to_dict(self) -> dict[str, dict[str, int]]:
        """Return the counts of each column, largest first; {} for one that is empty throughout."""
        return {
            "labels": dict(_rank(self.labels)),
            **{
                name: dict(_rank(counter)) if counter.keys() - {NONE} else {}
                for name, counter in (("splits", self.splits), ("sources", self.sources))
            },
        }

    def describe_unused(self) -> list[str]:
        """Say which images have no label, and which names look like splits but are not used."""
        notes = []
        missing = [name for name in LABEL_NAMES if not self.labels[name]]
        if num_unlabelled := self.labels[UNLABELLED]:
            folders = [(n, c) for n, c in _rank(self.unlabelled) if n not in (NONE, MORE)]
            places = ", ".join(f"{name!r} ({n:,})" for name, n in folders[:SHOWN_NAMES])
            notes.append(
                f"{num_unlabelled:,} of {self.labels.total():,} images have no label"
                + f" and none is labelled {' or '.join(missing)}" * bool(missing)
                + f"; their folders: {places}" * bool(places)
                + ("..." if len(folders) > SHOWN_NAMES else "")
                + "; name the folders that mean a class with --real-name and --fake-name, or the"
                " column of a table with --label-column"
            )
        if self.split_like:
            notes.append(
                f"folders named {', '.join(map(repr, self.split_like))} look like splits but are"
                " not used as such: their images have no split, so `train` may use them; rename"
                " the folders (train, val, test)"
            )
        return notes


def add_counts(
    *listings: tuple[dict[str, dict[str, int]], int],
) -> dict[str, dict[str, int]]:
    """Return the sum of counts as `ListingCounts.to_dict` gives them, each with its images.

    A column that is empty throughout in one of them counts as NONE.
    """
    total: dict[str, dict[str, int]] = {}
    for name in dict.fromkeys(name for counts, _ in listings for name in counts):
        found = [(counts.get(name), num_images) for counts, num_images in listings]
        counter = Counter[str]()
        for values, num_images in found if any(values for values, _ in found) else ():
            counter.update(values or {NONE: num_images})
        total[name] = dict(counter)
    return total


def _count(counter: Counter[str], values: pa.Array) -> None:
    counts = pc.value_counts(values).to_pylist()
    _add_counts(counter, ((row["values"], row["counts"]) for row in counts))


def _add_counts(counter: Counter[str], counts: Iterable[tuple[str | None, int]]) -> None:
    """Add to a counter, which keeps the first MAX_NAMES names by their alphabet.

    So what it keeps does not depend on the order in which images are listed.
    """
    for name, count in counts:
        counter[NONE if name is None else name] += count
    if len(counter) > MAX_NAMES:
        for name in sorted(counter.keys() - {NONE, MORE})[MAX_NAMES:]:
            counter[MORE] += counter.pop(name)


def _rank(counter: Counter[str]) -> list[tuple[str, int]]:
    """Return names and counts, largest first; those of one count by name."""
    return sorted(counter.items(), key=lambda item: (-item[1], item[0]))


def _find_folders(batch: pa.RecordBatch, column: str, pattern: str) -> pa.Array:
    """Return what `name` matches in the keys of the rows where a column is null."""
    keys = batch.column("key").filter(pc.is_null(batch.column(column)))
    return pc.struct_field(pc.extract_regex(keys, pattern=pattern), "name")
