"""What a `metadata.csv` or `metadata.jsonl` beside images says of them, as for `imagefolder`.

Hugging Face's loader of image folders defines them: a row for each image, `file_name` relative to
the folder of the file. Of the other columns only label, split and source are used here.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cifake_ray.core.labels import LabelReader, PathLabels
from cifake_ray.errors import CifakeError, UsageError
from cifake_ray.storage.sources.clutter import METADATA_NAMES
from cifake_ray.storage.sources.columns import find_split_column, make_split_reader
from cifake_ray.storage.sources.text_table import open_text_table

FILE_NAME = "file_name"
MAX_METADATA_BYTES = 256 * 2**20  # it is held in memory while its folder is listed


class MetadataColumns(NamedTuple):
    """What the columns of metadata are called, and what reads the labels."""

    labels: LabelReader
    source: str


class FolderMetadata(NamedTuple):
    """The metadata of a folder and what lies below it."""

    name: str  # of its file, below the root
    prefix: str  # of its folder, below the root
    labels: dict[str, PathLabels]  # by path below its folder

    def describe(self, key: str, labels: PathLabels) -> PathLabels:
        """Return the labels of an image; what the metadata does not say is that of its path."""
        known = self.labels.get(key[len(self.prefix) :], PathLabels())
        label = labels.label if known.label is None else known.label
        return PathLabels(label, known.split or labels.split, known.source or labels.source)


def read_metadata(
    root: Path, prefix: str, columns: MetadataColumns, notes: list[str], follow_symlinks: bool
) -> FolderMetadata | None:
    """Read the metadata in a folder, if there is any; a note says why it cannot be used."""
    for name in METADATA_NAMES:
        path = root / prefix / name
        try:
            status = os.stat(path, follow_symlinks=follow_symlinks)
        except OSError:
            continue
        if not stat.S_ISREG(status.st_mode):
            continue
        try:
            if status.st_size > MAX_METADATA_BYTES:
                raise UsageError(f"{path}: too large to be read along; give it as the source")
            labels = dict(_read_rows(path, columns))
        except CifakeError as error:
            notes.append(f"not used: {error}")
            continue
        return FolderMetadata(f"{prefix}{name}", prefix, labels)
    return None


def _read_rows(path: Path, columns: MetadataColumns) -> Iterator[tuple[str, PathLabels]]:
    labels = columns.labels
    table = open_text_table(path, FILE_NAME, labels.column)
    split_column = find_split_column(table.names)
    names = (FILE_NAME, labels.column, split_column, columns.source)
    places = [table.names.index(name) if name in table.names else None for name in names]
    if places[1:] == [None] * 3:
        raise UsageError(f"{path} has no column {labels.column!r}, 'split' or {columns.source!r}")
    read_split = make_split_reader(split_column)
    for _, values in table.rows:
        file_name, label, split, source = (None if p is None else values[p] for p in places)
        if file_name:
            key = os.path.normpath(file_name.replace("\\", "/"))
            yield key, PathLabels(labels.read(label), read_split(split), source or None)
