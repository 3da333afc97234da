"""Find the rows of shards that train and validate, and the twins of their images."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from cifake_ray.config import TrainConfig
from cifake_ray.core.labels import LabelReader, parse_split
from cifake_ray.core.schema import FAKE, LABEL_NAMES, REAL
from cifake_ray.errors import ImageError, UsageError
from cifake_ray.storage.datasets.twins import find_twins
from cifake_ray.storage.io.digest import stamp_file
from cifake_ray.storage.io.paths import AnyPath, resolve_path
from cifake_ray.storage.sources.columns import ColumnChoice
from cifake_ray.storage.sources.held_images import get_bytes
from cifake_ray.storage.sources.image_table import ImageTable
from cifake_ray.storage.sources.parquet import HINT_CONVERT, choose_columns, open_tables

MIN_GROUP_BYTES = 2**20  # that a row group counts as: a footer may say anything
USES = ("to train on", "to validate on", "left out")
Digests = dict[str, np.ndarray]


@dataclass(frozen=True)
class TrainingRows:
    """The labelled rows of the shards that train or validate; parallel arrays."""

    groups: list[tuple[AnyPath, int]]  # (file, row group)
    group_rows: np.ndarray  # int64[G]: all rows of each row group
    group_bytes: np.ndarray  # int64[G], of all columns
    group: np.ndarray  # int32[N]: number of the row group
    row: np.ndarray  # int32[N]: row inside it
    label: np.ndarray  # int64[N]
    is_val: np.ndarray  # bool[N]
    num_in_both: int = 0  # rows whose bytes are also those of a row with the other label
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)  # rows by use and split
    choice: ColumnChoice = ColumnChoice()  # noqa: RUF009 - frozen
    twin_of: np.ndarray | None = None  # int64[N]: the row that each is a twin of, else -1
    source: np.ndarray | None = None  # int32[N]: number of each's source, with --balance-sources
    notes: tuple[str, ...] = ()  # how labels of others were read, for the user
    # uint64 of all rows of the files that do not say them, by the stamp of each: `_read_digests`
    digests: Digests = field(default_factory=dict)

    def __str__(self) -> str:
        return "; ".join(
            f"{sum(splits.values()):,} {use} ("
            + ", ".join(f"{n:,} {s}" if len(splits) > 1 else s for s, n in splits.items())
            + ")"
            for use in USES
            if (splits := {split: n for (u, split), n in self.counts.items() if u == use})
        )

    @property
    def slots(self) -> np.ndarray:
        """Return the position of each row among all rows of the files, int64[N]."""
        starts: np.ndarray = np.cumsum(self.group_rows) - self.group_rows
        slots: np.ndarray = starts[self.group] + self.row
        return slots

    def read_group(self, number: int) -> pa.ChunkedArray:
        """Read the images of a row group."""
        path, group = self.groups[number]
        with ImageTable(path, path.name, self.choice) as table:
            return table.read([group], [table.image]).column(table.image)

    def read_errors(self, number: int) -> list[str | None]:
        """Read the errors of the rows of a row group."""
        path, group = self.groups[number]
        with ImageTable(path, path.name, self.choice) as table:
            return table.read_facts([group]).errors

    def hash_rows(self) -> str:
        """Return the sha256 of which rows train and validate, their labels and used sources."""
        digest = hashlib.sha256()
        for column in (self.group, self.row, self.label, self.is_val, self.twin_of, self.source):
            if column is not None:
                digest.update(column.tobytes())
        return digest.hexdigest()

    def hash_files(self) -> str:
        """Return a sha256 that changes when a file does."""
        digest = hashlib.sha256()
        for path in dict.fromkeys(path for path, _ in self.groups):
            digest.update(f"{path}|{stamp_file(path)}\n".encode())
        return digest.hexdigest()


def read_training_rows(config: TrainConfig, kept: Digests | None = None) -> TrainingRows:
    """Find the training and validation rows, and the twins of their REAL images.

    Files that do not say the digests of their images are read as a whole, unless `kept` has them.
    UsageError for a source that is not there, and when either side has none of a class.
    """
    root = resolve_path(config.shards, config.store)
    choice, left_out = choose_columns(root), Counter[str]()
    labels, is_foreign = LabelReader(choice.label, choice.class_names), False
    groups: list[tuple[AnyPath, int]] = []
    group_rows: list[int] = []
    group_bytes: list[int] = []
    parts: list[tuple[np.ndarray, ...]] = []
    counts: Counter[tuple[str, str]] = Counter()
    sources: dict[str | None, int] = {None: 0}  # the number of each, as they are met
    digests: Digests = {}
    for table in open_tables(root, choice, left_out):
        is_foreign |= not table.is_ours
        for number, hashed in enumerate(_read_digests(table, kept or {}, digests)):
            columns = _read_group_rows(table, number, hashed, labels, config, counts, sources)
            parts.append((np.full(len(columns[0]), len(groups), np.int32), *columns))
            groups.append((table.path, number))
            facts = table.file.metadata.row_group(number)
            group_rows.append(facts.num_rows)
            group_bytes.append(max(facts.total_byte_size, MIN_GROUP_BYTES))
    for source in config.exclude_source:
        if not counts[USES[2], f"of the source {source}"]:
            raise UsageError(f"--exclude-source {source}: {root} has no labelled image of it")
    for source in config.val_source_names:
        if source not in sources:
            known = ", ".join(sorted(filter(None, sources))) or "no source at all"
            raise UsageError(
                f"--val-sources {source}: {root} has no labelled image of it to train on; it has"
                f" {known}"
            )
    group, row, label, is_val, source_number, digest = map(np.concatenate, zip(*parts, strict=True))
    in_both = np.intersect1d(digest[label == REAL], digest[label == FAKE])
    num_in_both = int(np.isin(digest, in_both).sum())
    labels.check(root, HINT_CONVERT)
    rows = TrainingRows(
        groups,
        np.array(group_rows),
        np.array(group_bytes),
        group,
        row,
        label,
        is_val,
        num_in_both,
        counts,
        choice,
        source=None if config.balance_sources is None else source_number,
        notes=(labels.describe(),) if is_foreign and labels.counts else (),
        digests=digests,
    )
    if config.twins is not None:
        rows = _add_twins(rows, config)
    check_usable(rows, np.ones(len(rows.label), bool), config)
    return rows


def _add_twins(rows: TrainingRows, config: TrainConfig) -> TrainingRows:
    """Return the rows and behind them those of the twins of training images.

    None validates: epoch, threshold and temperature are chosen on genuine images.
    """
    images = np.flatnonzero((rows.label == REAL) & ~rows.is_val)
    twins = find_twins(rows.groups, rows.group[images], rows.row[images], config)
    twin_of = images[twins.twin_of]
    return replace(
        rows,
        groups=rows.groups + twins.groups,
        group_rows=np.append(rows.group_rows, twins.group_rows),
        group_bytes=np.append(rows.group_bytes, twins.group_bytes),
        group=np.append(rows.group, len(rows.groups) + np.array(twins.group, np.int32)),
        row=np.append(rows.row, np.array(twins.row, np.int32)),
        label=np.append(rows.label, np.full(len(twin_of), FAKE)),
        is_val=np.append(rows.is_val, np.zeros(len(twin_of), bool)),
        twin_of=np.append(np.full(len(rows.label), -1), twin_of),
        source=None if rows.source is None else np.append(rows.source, rows.source[twin_of]),
        notes=(*rows.notes, f"{twins}"),
    )


def check_usable(rows: TrainingRows, usable: np.ndarray, config: TrainConfig) -> None:
    """Raise UsageError when a class has no usable image to train or to validate on.

    Also when `--balance-sources` or `--twin-share` has nothing to draw from.
    """
    for name, side in (("training", ~rows.is_val), ("validation", rows.is_val)):
        for value in (REAL, FAKE):
            if not (rows.label[side & usable] == value).any():
                if config.val_sources:
                    which = "of" if name == "validation" else "beside"
                    raise UsageError(
                        f"--val-sources {','.join(config.val_source_names)}: no labelled"
                        f" {LABEL_NAMES[value]} image {which} these sources that decodes; {name}"
                        " needs both classes, REAL and FAKE: name other sources"
                    )
                raise UsageError(
                    f"{config.shards}: no labelled {LABEL_NAMES[value]} image for {name} that"
                    f" decodes; of its rows, {rows}; training takes those with split `train` or"
                    " none (--val-fraction, --val-split choose among them); `convert` takes names"
                    " of classes by --real-name and --fake-name"
                    + "".join(f"; {note}" for note in rows.notes)
                )
    trained = usable & ~rows.is_val
    if config.balance_sources and rows.source is not None and not rows.source[trained].any():
        raise UsageError(
            f"--balance-sources {config.balance_sources:g}: no image of {config.shards} has a"
            " source; --balance-sources 0 balances REAL and FAKE only"
        )
    if config.twin_share is not None and rows.twin_of is not None:
        is_twin = rows.twin_of[trained] >= 0
        if config.twin_share > 0 and not is_twin.any():
            raise UsageError(
                f"--twin-share {config.twin_share:g}: no image that is trained on has a twin that"
                " decodes; give 0"
            )
        if config.twin_share < 1 and not (~is_twin & (rows.label[trained] == FAKE)).any():
            raise UsageError(
                f"--twin-share {config.twin_share:g}: all FAKE images that are trained on are"
                " twins; give 1, or leave it out"
            )


def _read_digests(table: ImageTable, kept: Digests, used: Digests) -> Iterator[np.ndarray]:
    """Yield uint64 of each row group: the first 8 bytes of the sha256 of its images, 0 for none.

    Take from `kept` what else would take reading the images; add to `used` what may be kept.
    """
    groups = range(table.file.num_row_groups)
    if table.is_ours and "sha256" in table.columns:
        for number in groups:
            yield _to_numbers(table.read([number], ["sha256"]).column("sha256").to_pylist())
        return
    size_bytes, version = stamp_file(table.path)
    stamp = "|".join(map(str, (table.path, table.image, size_bytes, version)))
    key = hashlib.sha256(stamp.encode()).hexdigest()
    digests = kept.get(key)
    if digests is None or len(digests) != table.file.metadata.num_rows:
        parts = [np.empty(0, np.uint64)]
        for number in groups:
            cells = table.read([number], [table.image]).column(table.image).to_pylist()
            images = map(read_bytes_of, cells)
            parts.append(_to_numbers([i and hashlib.sha256(i).digest() for i in images]))
        digests = np.concatenate(parts)
    if version:  # else the file could change, and nothing would show it
        used[key] = digests
    counts = [table.file.metadata.row_group(number).num_rows for number in groups]
    yield from np.split(digests, np.cumsum(counts))[:-1]


def _to_numbers(hashes: list[bytes | None]) -> np.ndarray:
    numbers = [int.from_bytes(each[:8], "big") if each else 0 for each in hashes]
    return np.array(numbers, np.uint64)


def _read_group_rows(
    table: ImageTable,
    number: int,
    digests: np.ndarray,
    labels: LabelReader,
    config: TrainConfig,
    counts: Counter[tuple[str, str]],
    sources: dict[str | None, int],
) -> tuple[np.ndarray, ...]:
    """Return row, label, is_val, source and digest of the usable rows of one row group.

    Count all rows, and number the sources of the usable ones.
    """
    facts = table.read_facts([number])
    val_split, val_sources = parse_split(config.val_split), set(config.val_source_names)
    chosen: list[tuple[int, int, bool, int, int]] = []
    understood = table.understand_labels(facts.labels, labels)
    cells = understood, facts.splits, facts.sources, facts.errors, digests.tolist()
    for row, (label, split, source, error, digest) in enumerate(zip(*cells, strict=True)):
        name = f"of split {split}" if split else "without a split"
        if label is None or error is not None or not digest:
            name = "with an error" if label is not None or error is not None else "without a label"
            counts[USES[2], name] += 1
            continue
        is_val = val_split is not None and split == val_split
        if not is_val and split not in (None, "train"):
            counts[USES[2], name] += 1
            continue
        if source in config.exclude_source:
            counts[USES[2], f"of the source {source}"] += 1
            continue
        # By the image's bytes, so that duplicates are never on both sides.
        if digest >= (1 - config.test_fraction) * 2**64:
            counts[USES[2], "for a test"] += 1
            continue
        number_of_source = sources.setdefault(source, len(sources))
        if val_sources:
            is_val = source in val_sources
        elif val_split is None:
            is_val = digest < config.val_fraction * 2**64
        counts[USES[is_val], name] += 1
        chosen.append((row, label, is_val, number_of_source, digest))
    types = (np.int32, np.int64, bool, np.int32, np.uint64)
    lists = [list(column) for column in zip(*chosen, strict=True)] or [[]] * len(types)
    return tuple(np.array(column, kind) for column, kind in zip(lists, types, strict=True))


def read_bytes_of(value: Any) -> bytes | None:
    """Return the encoded image in a value of a column of images, None when there is none."""
    try:
        return get_bytes(value)
    except ImageError:
        return None
