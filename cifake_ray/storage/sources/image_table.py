"""One Parquet file with images: our shards, and those that other programs write.

Others hold images as bytes, as the Hugging Face struct of bytes and path, or as Spark's raw pixels,
in a column of any name. Only in our own shards, which their footer tells, `error` and `sha256` mean
what they mean here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cifake_ray.core.imaging.decode import inspect_image, map_images
from cifake_ray.core.imaging.raw_pixels import RAW_FIELDS
from cifake_ray.core.labels import LabelReader, PathLabels, read_file_path
from cifake_ray.core.schema import ERROR_FIELDS, FOOTER_KEY, SEAL_KEY
from cifake_ray.errors import ImageError, StorageError, UsageError
from cifake_ray.storage.io.files import open_file, open_ranges
from cifake_ray.storage.io.paths import AnyPath, explain_errors, is_from_s3fs
from cifake_ray.storage.io.regular_file import open_regular
from cifake_ray.storage.sources.columns import (
    ColumnChoice,
    check_text,
    describe_type,
    find_column,
    find_split_column,
    find_value_type,
    is_binary,
    is_simple,
    is_text,
    make_split_reader,
    read_label_names,
    rename_columns,
)
from cifake_ray.storage.sources.held_images import HeldImages, get_bytes
from cifake_ray.storage.sources.table_stamps import stamp_table

LFS_POINTER = b"version https://git-lfs"
PIECE_ROWS = 16  # images of at most MAX_IMAGE_BYTES
MAX_HELD_BYTES = 2**30  # of a row group; what follows is read again from its start
GLANCE_ROWS = 16  # from which is seen what a column holds
GLANCE_BUFFER_BYTES = 2**20

# Encoded images, raw pixels, or the paths of files.
Content = Literal["bytes", "pixels", "paths"]


class ImageColumn(NamedTuple):
    name: str
    content: Content


class Facts(NamedTuple):
    """What the columns of some rows say of their images; parallel lists."""

    labels: list[Any]  # as written
    splits: list[str | None]
    sources: list[str | None]
    errors: list[str | None]


def open_parquet(path: AnyPath, *, glance: bool = False) -> pq.ParquetFile:
    """Open any Parquet file; from a store, only what is read is fetched. StorageError otherwise.

    For a glance at its first rows it reads page by page.
    """
    reading: dict[str, Any] = (
        {"buffer_size": GLANCE_BUFFER_BYTES} if glance else {"pre_buffer": True}
    )
    with explain_errors(path):
        if isinstance(path, Path):  # pyarrow would wait for a pipe
            open_regular(path).close()
        try:
            # pyarrow opens local files itself; from a store it merges ranges into few reads.
            file = path if isinstance(path, Path) else open_ranges(path)
            table = pq.ParquetFile(file, page_checksum_verification=True, **reading)
        except (FileNotFoundError, PermissionError):
            raise
        except (OSError, pa.ArrowException) as error:
            if is_from_s3fs(error):  # the store has failed, which says nothing of the file
                raise
            with open_file(path) as opened:
                if opened.read(len(LFS_POINTER)) == LFS_POINTER:
                    raise StorageError(
                        f"{path}: a Git LFS pointer in place of the file; run `git lfs pull`"
                    ) from error
            raise StorageError(
                f"{path}: not a readable Parquet file ({error}); `cifake-ray repair` redoes a"
                " damaged shard"
            ) from error
    if len(set(table.schema_arrow.names)) != len(table.schema_arrow.names):
        raise UsageError(f"{path}: two columns have the same name; rename one")
    return table


@contextmanager
def _explain_damage(path: AnyPath) -> Iterator[None]:
    """Turn what pyarrow raises while it reads a file into a StorageError."""
    with explain_errors(path):
        try:
            yield
        except (FileNotFoundError, PermissionError):
            raise
        except (OSError, pa.ArrowException) as error:
            if is_from_s3fs(error):  # the store has failed, which says nothing of the file
                raise
            raise StorageError(
                f"{path}: damaged, or not read by pyarrow ({error}); `cifake-ray repair` redoes a"
                " damaged shard"
            ) from error


def read_columns(
    table: pq.ParquetFile, path: AnyPath, groups: list[int], columns: Sequence[str]
) -> pa.Table:
    """Read some columns of some row groups. StorageError when the file is damaged."""
    with _explain_damage(path):
        try:
            return table.read_row_groups(groups, columns=list(columns))
        except pa.ArrowNotImplementedError:  # more than 2 GiB of images: Arrow reads only pieces
            pieces = table.iter_batches(PIECE_ROWS, row_groups=groups, columns=list(columns))
            return pa.Table.from_batches(pieces)


def read_pieces(
    table: pq.ParquetFile, path: AnyPath, group: int, columns: Sequence[str]
) -> Iterator[pa.RecordBatch]:
    """Yield a row group a few rows at a time: its pages may be a thousand times smaller.

    StorageError when the file is damaged.
    """
    with _explain_damage(path):
        yield from table.iter_batches(
            PIECE_ROWS, row_groups=[group], columns=list(columns), use_threads=False
        )


def find_content(column_type: pa.DataType) -> Content | None:
    """Return what a column of this type may hold in place of an image; None for nothing."""
    value_type = find_value_type(column_type)
    if pa.types.is_struct(value_type):
        children = {child.name: child.type for child in value_type}
        if children.keys() >= RAW_FIELDS:
            return "pixels"
        if "bytes" in children and is_binary(children["bytes"]):
            return "bytes"
        return "paths" if "path" in children and is_text(children["path"]) else None
    is_list = pa.types.is_list(value_type) or pa.types.is_large_list(value_type)
    if is_binary(value_type) or (is_list and pa.types.is_uint8(value_type.value_type)):
        return "bytes"
    return "paths" if is_text(value_type) else None


def find_image_column(path: AnyPath, choice: ColumnChoice) -> ImageColumn | None:
    """Return the column that holds the images of a file, or their paths; None if there is none.

    It is the one that is named, else `image` in any case, else the only one with images in its
    first rows, else that of the paths of a list. UsageError when the named one cannot be it, or
    several can.
    """
    with open_parquet(path, glance=True) as table:
        schema = table.schema_arrow
        contents = {f.name: content for f in schema if (content := find_content(f.type))}
        if choice.image in schema.names and choice.image not in contents:
            held = describe_type(schema.field(choice.image).type)
            raise UsageError(f"{path}: --image-column {choice.image} holds {held}, no images")
        named = [name for name in contents if name.lower() == "image"]
        if choice.image is not None or "image" in named:
            named = [name for name in contents if name == (choice.image or "image")]
        found = [ImageColumn(n, _look_into(table, path, n, contents[n])) for n in named]
        if choice.image is None and not named:
            found = [
                ImageColumn(name, content)
                for name, content in contents.items()
                if _has_images(table, path, name, content)
            ]
    if len(found) > 1:
        raise UsageError(
            f"{path}: several columns hold images: {', '.join(column.name for column in found)};"
            " choose one with --image-column"
        )
    texts = [name for name in schema.names if contents.get(name) == "paths" or name == choice.path]
    listed = rename_columns(texts, choice.path, choice.label)
    is_list = choice.path in schema.names or (choice.path in listed and not found)
    if is_list and choice.image is None and all(column.content == "paths" for column in found):
        return ImageColumn(choice.path, "paths")
    return found[0] if found else None


def _glance(table: pq.ParquetFile, path: AnyPath, column: str) -> list[Any]:
    """Return the first values of a column. StorageError when the file is damaged."""
    with _explain_damage(path):
        batches = table.iter_batches(GLANCE_ROWS, columns=[column], use_threads=False)
        batch = next(iter(batches), None)
    values = [] if batch is None else batch.column(column).to_pylist()
    return [value for value in values if value is not None]


def _look_into(table: pq.ParquetFile, path: AnyPath, column: str, content: Content) -> Content:
    """Return what a column of images holds: a struct with bytes may have only paths in it."""
    if content != "bytes" or FOOTER_KEY in (table.schema_arrow.metadata or {}):
        return content
    values = [value for value in _glance(table, path, column) if isinstance(value, dict)]
    has_bytes = any(value["bytes"] is not None for value in values)
    has_paths = any(value.get("path") for value in values)
    return "paths" if has_paths and not has_bytes else content


def _has_images(table: pq.ParquetFile, path: AnyPath, column: str, content: Content) -> bool:
    """Return whether the first values of a column are images."""
    if content != "bytes":
        return content == "pixels"
    images = [get_bytes(value) or b"" for value in _glance(table, path, column)]
    headers = map_images(inspect_image, images)
    unlike = ("not_an_image", "empty")
    return any(not isinstance(each, ImageError) or each.error not in unlike for each in headers)


class ImageTable:
    """An open Parquet file with a column of images."""

    def __init__(self, path: AnyPath, name: str, choice: ColumnChoice) -> None:
        """Open a file whose path below the root of its data set is `name`."""
        self.path, self.name, self.choice = path, name, choice
        self.file = open_parquet(path)
        self.schema = self.file.schema_arrow
        self.is_ours = FOOTER_KEY in (self.schema.metadata or {})
        self.columns = [name for name in self.schema.names if name not in choice.drop]
        self.label = find_column(self.columns, choice.label)
        may_be = (f.name for f in self.schema if is_simple(f.type) or f.name == "split")
        self.split = find_split_column(name for name in may_be if name in self.columns)
        self.source = find_column(self.columns, choice.source)
        self.of_path = read_file_path(name, choice.class_names)
        if self.is_ours:  # rows without a label have none
            self.of_path = PathLabels(split=self.of_path.split)
        self.image = choice.image or "image"

    def __enter__(self) -> ImageTable:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close(force=True)

    @property
    def has_images(self) -> bool:
        """Whether the column of images is there. StorageError if another one may hold them."""
        if self.image in self.schema.names:
            if find_content(self.schema.field(self.image).type) in ("bytes", "pixels"):
                return True
        elif not any(find_content(f.type) in ("bytes", "pixels") for f in self.schema):
            return False
        raise StorageError(
            f"{self.path}: no images in a column {self.image!r}; its columns are"
            f" {', '.join(self.schema.names)}: take files with different columns one by one, with"
            " --image-column"
        )

    @cached_property
    def stamp(self) -> str | None:
        """What rows are compared by: the stamp of the file; None for our shards of before.

        Of our shards it is the hash that their footer holds, so that one which `repair` has made
        again is the same.
        """
        if not self.is_ours:
            return stamp_table(self.path)
        seal = (self.file.metadata.metadata or {}).get(SEAL_KEY)
        return None if seal is None else hashlib.sha256(seal).hexdigest()[:32]

    def read(self, groups: list[int], columns: Sequence[str]) -> pa.Table:
        """Read some columns of some row groups."""
        return read_columns(self.file, self.path, groups, columns)

    def read_text(self, rows: pa.Table, column: str) -> list[str | None]:
        """Return a column of simple values as text. UsageError, with its name, for others."""
        check_text(self.schema.field(column), self.path)
        values = rows.column(column)
        try:
            values = values.cast(find_value_type(values.type)).cast(pa.string())
        except pa.ArrowException as error:
            raise StorageError(f"{self.path}: the column {column!r} is no text: {error}") from error
        texts: list[str | None] = values.to_pylist()
        return texts

    def read_facts(self, groups: list[int]) -> Facts:
        """Read what is known of the images of some row groups, in the order of the rows."""
        wanted = [self.label, self.split, self.source]
        wanted += [f.name for f in ERROR_FIELDS if self.is_ours]
        names = [name for name in self.columns if name in wanted]
        rows = self.read(groups, names) if names else None
        num_rows = sum(self.file.metadata.row_group(group).num_rows for group in groups)

        def texts(name: str | None) -> list[str | None]:
            if name is None or name not in names:
                return [None] * num_rows
            return self.read_text(rows, name)

        _, of_path_split, of_path_source = self.of_path
        read_split = make_split_reader(self.split)
        return Facts(
            labels=self._read_labels(rows, num_rows),
            splits=[read_split(value) or of_path_split for value in texts(self.split)],
            sources=[source or of_path_source for source in texts(self.source)],
            errors=texts("error") if self.is_ours else [None] * num_rows,
        )

    def _read_labels(self, rows: pa.Table, num_rows: int) -> list[Any]:
        """Return the values of the label column; one that cannot be a label is its type."""
        if self.label is None:
            return [None] * num_rows
        column = rows.column(self.label)
        value_type = find_value_type(column.type)
        if pa.types.is_temporal(value_type) or not (is_simple(value_type) or is_binary(value_type)):
            return [describe_type(column.type)] * len(column)
        values: list[Any] = column.cast(value_type).to_pylist()
        return values

    def understand_labels(self, values: Sequence[Any], labels: LabelReader) -> list[int | None]:
        """Return what values of the label column mean; without one, what the file's path says."""
        if self.label is None:
            return [self.of_path.label] * len(values)
        names = read_label_names(self.schema, self.label)
        return [labels.read(value, names) for value in values]

    def hold_images(self, row: int) -> HeldImages:
        """Read a row of the file and those behind it in its row group, up to MAX_HELD_BYTES."""
        counts = [self.file.metadata.row_group(g).num_rows for g in range(self.file.num_row_groups)]
        ends = np.cumsum(counts)
        number = int(np.searchsorted(ends, row, side="right"))
        columns = [self.image]
        if self.is_ours:
            columns += [f.name for f in ERROR_FIELDS if f.name in self.schema.names]
        pieces, starts, size_bytes = [], [], 0
        stop = int(ends[number]) - counts[number]
        for piece in read_pieces(self.file, self.path, number, columns):
            start, stop = stop, stop + piece.num_rows
            if stop <= row:
                continue
            pieces.append(piece)
            starts.append(start)
            size_bytes += piece.nbytes
            if size_bytes > MAX_HELD_BYTES:
                break
        return HeldImages(self.name, self.stamp, starts, stop, pieces, self.image)
