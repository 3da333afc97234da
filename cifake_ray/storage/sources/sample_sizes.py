"""Look at the headers of a few images of a source before it is listed: how large are they?"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from heapq import heappop, heappush, nsmallest
from pathlib import Path
from zlib import crc32

import pyarrow as pa
import pyarrow.compute as pc

from cifake_ray.core.imaging.decode import inspect_image, map_images
from cifake_ray.core.schema import MANIFEST_FIELDS
from cifake_ray.errors import ImageError, StorageError
from cifake_ray.storage.io.paths import AnyPath
from cifake_ray.storage.sources.folder import FolderSource
from cifake_ray.storage.sources.fsspec_prefix import FsspecPrefixSource
from cifake_ray.storage.sources.glance import iterate_entries, scan_folder
from cifake_ray.storage.sources.labelled import LabelledSource
from cifake_ray.storage.sources.parquet import ParquetSource, open_tables
from cifake_ray.storage.sources.s3_prefix import S3PrefixSource
from cifake_ray.storage.sources.source import KeyFilter, Source
from cifake_ray.storage.sources.tar import TarSource

NUM_SAMPLED = 32
HEAD_BYTES = 2**16  # holds the header of nearly all images; of the others the whole is read
# No further folder is looked into once so many names were seen, or with too few images the most.
MAX_NAMES, MOST_NAMES = 10_000, 200_000
MAX_FOLDERS = 256


TryImages = Callable[[Sequence[bytes | ImageError]], list[bytes | ImageError]]


def sample_sizes(
    source: Source, place: AnyPath, uri: str, try_images: TryImages
) -> list[tuple[int, int]]:
    """Return width and height of up to NUM_SAMPLED images, the same ones wherever it is asked.

    They are chosen by a hash of their keys: of a folder from all of its files, or those of enough
    folders below it; of a bucket from the first keys; of lists, tars and Parquet files from the
    first rows. Images whose header cannot be read are left out. So are those for which
    `try_images`, which is called before this process looks at an image, returns an error.
    StorageError as from listing.
    """
    if isinstance(source, LabelledSource):
        source = source.source
    if isinstance(source, ParquetSource):
        return _sample_tables(source, try_images)
    rows = _sample_rows(source, place, uri)
    sizes = {}
    if isinstance(source, FolderSource | S3PrefixSource | FsspecPrefixSource | TarSource):
        sizes = _read_sizes(source, _cut(rows), try_images)
    others = [number for number in range(rows.num_rows) if number not in sizes]
    whole = _read_sizes(source, rows.take(pa.array(others, pa.int64())), try_images)
    return [*sizes.values(), *whole.values()]


def _sample_rows(source: Source, place: AnyPath, uri: str) -> pa.Table:
    """Return rows of the manifest, as `read_images` takes them."""
    if isinstance(source, FolderSource) and isinstance(place, Path):
        keys = nsmallest(NUM_SAMPLED, _walk(place, source.key_filter), key=_hash_key)
        return _make_rows([(key, key, *_stamp(place / key), None) for key in keys])
    if isinstance(source, S3PrefixSource) and not isinstance(place, Path):
        kept = (e for e in iterate_entries(place, uri) if not source.key_filter.find_reason(e[0]))
        chosen = nsmallest(NUM_SAMPLED, kept, key=lambda entry: _hash_key(entry[0]))
        return _make_rows(
            [(key, source.uri + key, size_bytes, None, etag) for key, size_bytes, etag in chosen]
        )
    if isinstance(source, TarSource):
        source = replace(source, min_shard_rows=2 * NUM_SAMPLED)
    first = next(iter(source.list_images().batches), None)
    if first is None:
        return _make_rows([])
    rows = pa.Table.from_batches([first])
    rows = rows.filter(pc.is_valid(rows.column("location")))
    keys = rows.column("key").to_pylist()
    return rows.take(nsmallest(NUM_SAMPLED, range(len(keys)), key=lambda n: _hash_key(keys[n])))


def _hash_key(key: str) -> tuple[int, str]:
    return crc32(key.encode(errors="surrogateescape")), key


def _walk(root: Path, key_filter: KeyFilter) -> Iterator[str]:
    """Yield the keys of a folder's images; of many in an order of folders that depends on names."""
    pending, num_names, num_folders, num_keys = [(0, "")], 0, 0, 0
    while pending and num_folders < MAX_FOLDERS:
        if num_names >= (MAX_NAMES if num_keys >= NUM_SAMPLED else MOST_NAMES):
            return
        below = heappop(pending)[1]
        num_folders += 1
        try:
            for name, is_folder in scan_folder(root, below):
                num_names += 1
                key = below + name
                if is_folder and not key_filter.find_folder_reason(f"{key}/"):
                    heappush(pending, _hash_key(f"{key}/"))
                elif not is_folder and not key_filter.find_reason(key):
                    num_keys += 1
                    yield key
        except StorageError:
            if not below:
                raise  # else the listing will tell


def _stamp(path: Path) -> tuple[int | None, int | None]:
    try:
        status = os.stat(path)
    except OSError:
        return None, None
    return status.st_size, status.st_mtime_ns


def _make_rows(facts: list[tuple[str, str, int | None, int | None, str | None]]) -> pa.Table:
    names = ("key", "location", "size_bytes", "mtime_ns", "etag")
    rows = [dict(zip(names, fact, strict=True)) for fact in facts]
    return pa.Table.from_pylist(rows, pa.schema(MANIFEST_FIELDS))


def _cut(rows: pa.Table) -> pa.Table:
    """Return rows that stand for the first HEAD_BYTES of each image."""
    size_bytes = pc.min_element_wise(rows.column("size_bytes"), HEAD_BYTES, skip_nulls=False)
    offsets = pc.fill_null(rows.column("row"), 0)
    for name, values in (("size_bytes", size_bytes), ("row", offsets)):
        at = rows.schema.get_field_index(name)
        rows = rows.set_column(at, rows.schema.field(at), values.cast(pa.int64()))
    return rows


def _read_sizes(
    source: Source, rows: pa.Table, try_images: TryImages
) -> dict[int, tuple[int, int]]:
    """Return width and height of the images whose header can be read, by their position."""
    tried = (image for one in source.read_images(rows) for image in try_images([one]))
    headers = map_images(inspect_image, tried)
    return {
        number: (header.width, header.height)
        for number, header in enumerate(headers)
        if not isinstance(header, ImageError)
    }


def _sample_tables(source: ParquetSource, try_images: TryImages) -> list[tuple[int, int]]:
    """Return sizes from the first row group that has images: from its columns, if it is ours."""
    for table in open_tables(source.root, source.choice):
        if not table.file.num_row_groups:
            continue
        num_rows = table.file.metadata.row_group(0).num_rows
        numbers = nsmallest(NUM_SAMPLED, range(num_rows), key=lambda n: _hash_key(str(n)))
        if table.is_ours:
            columns = table.read([0], ["width", "height"]).take(numbers).drop_null()
            return list(zip(*(column.to_pylist() for column in columns.columns), strict=True))
        facts = [{"location": table.name, "row": number} for number in numbers]
        rows = pa.Table.from_pylist(facts, pa.schema(MANIFEST_FIELDS))
        return list(_read_sizes(source, rows, try_images).values())
    return []
