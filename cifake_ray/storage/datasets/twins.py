"""Find the FAKE twins of REAL images in shards of their own, `--twins`.

A twin has the source and the file name of its image, whatever its suffix and the folders above:
`train/REAL/pets/7.jpg` and `dat/FAKE/pets/7.png`. Where both have a split it is the same. A twin
must also have the image's sides, since both are cut at the same place. An image may have several
twins.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np

from cifake_ray.config import TrainConfig
from cifake_ray.core.schema import FAKE, REAL
from cifake_ray.errors import UsageError
from cifake_ray.storage.io.paths import AnyPath, resolve_path
from cifake_ray.storage.sources.columns import ColumnChoice
from cifake_ray.storage.sources.image_table import ImageTable
from cifake_ray.storage.sources.parquet import find_tables

NOT_OURS = "is no output of convert, whose keys tell which images are twins; convert it first"
Name = tuple[str | None, str]


class _Facts(NamedTuple):
    """What is compared of an image."""

    name: Name  # source, and the name of the file without its suffix
    split: str | None
    label: int | None
    sides: tuple[int, ...]  # pixels, the shorter first: an orientation may swap them


@dataclass
class Twins:
    """The twins that were found: parallel lists, in the order of the files."""

    groups: list[tuple[AnyPath, int]] = field(default_factory=list)  # (file, row group)
    group_rows: list[int] = field(default_factory=list)
    group_bytes: list[int] = field(default_factory=list)
    group: list[int] = field(default_factory=list)  # index of `groups`
    row: list[int] = field(default_factory=list)  # inside it
    twin_of: list[int] = field(default_factory=list)  # place of its image among those given
    lost: Counter[str] = field(default_factory=Counter)  # rows that are no twin, by the reason

    def __str__(self) -> str:
        line = f"{len(self.row):,} twins of {len(set(self.twin_of)):,} REAL images"
        lost = ", ".join(f"{number:,} {reason}" for reason, number in self.lost.items())
        return line + (f"; left out {lost}" if lost else "")


def find_twins(
    groups: list[tuple[AnyPath, int]], group: np.ndarray, row: np.ndarray, config: TrainConfig
) -> Twins:
    """Return the twins of REAL images, which are given by the row group and the row of each.

    UsageError when there are none, when a row is not labelled FAKE, and for files of others.
    """
    assert config.twins is not None
    # All REAL images of a name, each with its place among those given, if it is one of them.
    images: dict[Name, list[tuple[_Facts, int | None]]] = defaultdict(list)
    for number, (path, inner) in enumerate(groups):
        given = np.flatnonzero(group == number)
        places = dict(zip(row[given].tolist(), given.tolist(), strict=True))
        with ImageTable(path, path.name, ColumnChoice()) as table:
            for inside, found in enumerate(_read_facts(table, inner, config.shards)):
                if found.label == REAL:
                    images[found.name].append((found, places.get(inside)))
    twins, root = Twins(), resolve_path(config.twins, config.store)
    for path in find_tables(root):
        with ImageTable(path, path.name, ColumnChoice()) as table:
            for number in range(table.file.num_row_groups):
                facts = _read_facts(table, number, config.twins)
                errors = table.read_facts([number]).errors
                for inside, (found, error) in enumerate(zip(facts, errors, strict=True)):
                    named = images.get(found.name, ())
                    owners = [
                        (image, place)
                        for image, place in named
                        if None in (image.split, found.split) or image.split == found.split
                    ]
                    if found.label != FAKE:
                        raise UsageError(
                            f"--twins {root}: {found.name[1]} of the source {found.name[0]} is not"
                            " labelled FAKE; twins are generated images, in folders named FAKE"
                        )
                    if error is not None:
                        twins.lost["with an error"] += 1
                    elif named and not owners:
                        twins.lost["of another split than their image"] += 1
                    elif not (trained := [place for _, place in owners if place is not None]):
                        twins.lost["of no image that is trained on"] += 1
                    elif len(owners) > 1:
                        twins.lost["whose name several images of a source have"] += 1
                    elif found.sides != owners[0][0].sides:
                        twins.lost["of other sides than their image"] += 1
                    else:
                        twins.group.append(len(twins.groups))
                        twins.row.append(inside)
                        twins.twin_of.append(trained[0])
                twins.groups.append((path, number))
                twins.group_rows.append(len(facts))
                twins.group_bytes.append(table.file.metadata.row_group(number).total_byte_size)
    if not twins.row:
        raise UsageError(
            f"--twins {root}: {twins}; a twin has the source and the file name of its image in"
            f" {config.shards}, suffix aside, and its sides"
        )
    return twins


def _read_facts(table: ImageTable, number: int, root: str) -> list[_Facts]:
    if not table.is_ours or "key" not in table.columns:
        raise UsageError(f"--twins: {root} {NOT_OURS}")
    names = ["key", "source", "split", "label", "width", "height"]
    columns = table.read([number], names).to_pydict()
    return [
        _Facts(
            (source, PurePosixPath(key).stem), split, label, tuple(sorted(s or 0 for s in sides))
        )
        for key, source, split, label, *sides in zip(*(columns[n] for n in names), strict=True)
    ]
