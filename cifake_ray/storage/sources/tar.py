"""The images in tars: shards of WebDataset and img2dataset, or any archive. Nothing is unpacked.

A key is TAR/MEMBER. Listing reads headers and labels. Images keep the order of their tar, and
neighbours are read at once.
"""

from __future__ import annotations

import os
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from cifake_ray.core.imaging.decode import MAX_IMAGE_BYTES
from cifake_ray.core.labels import LabelReader, split_file_name
from cifake_ray.core.schema import LABEL_NAMES, MANIFEST_FIELDS
from cifake_ray.errors import ImageError, StorageError, UsageError
from cifake_ray.storage.io.paths import AnyPath, explain_errors
from cifake_ray.storage.io.read_ahead import take_turns
from cifake_ray.storage.sources.folder import FolderSource, read_local_file
from cifake_ray.storage.sources.fsspec_prefix import FsspecPrefixSource, stamp_entry
from cifake_ray.storage.sources.s3_prefix import S3PrefixSource
from cifake_ray.storage.sources.source import (
    KEEP_ALL,
    MAX_SHARD_BYTES,
    MIN_SHARD_ROWS,
    KeyFilter,
    Listing,
    Part,
    batch_rows,
    escape_key,
    make_label_reader,
)
from cifake_ray.storage.sources.tar_images import (
    IMAGE_SUFFIXES,
    ReadLabel,
    list_images,
    read_sidecar,
)
from cifake_ray.storage.sources.tar_members import ReadAt

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
LISTING_THREADS = 16
# The next header is read alone or, where it is near, with what lies before and behind it: a store
# sends NEAR_BYTES in about the time that it takes to answer.
SMALL_READ_BYTES, LARGE_READ_BYTES, NEAR_BYTES = 2**16, 2**22, 2**20
MAX_SPAN_BYTES = 2**22  # of neighbours that are read at once
MAX_GAP_BYTES = 2**17  # between them: headers and sidecars
DETAILS = {
    "bad_key": "the name is not valid UTF-8; rename the file",
    "truncated": "the tar was cut off: the rest of it is missing; fetch or write it again",
    "decode_failed": "bytes of the tar that should be a header are none: members may be missing",
    "format_not_allowed": "a sparse member or a part of one; write the tar without --sparse",
    "not_found": "a link to nothing",
    "not_an_image": "the tar was listed as a file; start again in a new folder",
}


class Tar(NamedTuple):
    """A tar as it was listed: its name below the source, and where and from when it is."""

    name: str
    location: str | None  # None if the name is not valid UTF-8
    size_bytes: int | None  # None if the name is a link to nothing
    mtime_ns: int | None
    etag: str | None


@dataclass
class _Span:
    """Neighbours in a tar, which are read at once."""

    tar: Tar
    start: int
    end: int
    images: list[ImageError | slice]  # of its bytes

    def covers(self, tar: Tar, start: int, end: int) -> bool:
        """Return whether it may be extended to these bytes."""
        is_near = self.end <= start <= self.end + MAX_GAP_BYTES
        return tar == self.tar and is_near and end - self.start <= MAX_SPAN_BYTES


class _Window:
    """Reads from a tar in reads that are large where headers are near each other."""

    def __init__(self, read: ReadAt, size_bytes: int, large_bytes: int) -> None:
        self.read, self.size_bytes, self.large_bytes = read, size_bytes, large_bytes
        self.start, self.data = -NEAR_BYTES, b""

    def read_at(self, offset: int, size_bytes: int) -> bytes:
        start = offset - self.start
        if not 0 <= start <= start + size_bytes <= len(self.data):
            left_bytes = self.size_bytes - offset
            if size_bytes <= 0 or left_bytes <= 0:
                return b""
            is_near = 0 <= start < len(self.data) + NEAR_BYTES
            ahead_bytes = self.large_bytes if is_near else SMALL_READ_BYTES
            self.data = self.read(offset, min(max(size_bytes, ahead_bytes), left_bytes))
            self.start, start = offset, 0
        return self.data[start : start + size_bytes]


def stamp_tar(place: AnyPath, uri: str) -> Tar:
    """Return one tar as a listing of its folder would. StorageError when it is not there."""
    with explain_errors(place):
        if isinstance(place, Path):
            status = place.stat()
            return Tar(place.name, str(place), status.st_size, status.st_mtime_ns, None)
        info = place.fs.info(place.path)
    scheme = uri.partition("://")[0]
    location = uri if scheme == "s3" else f"{scheme}://{place.path.removeprefix('/')}"
    return Tar(place.name, location, info["size"], None, stamp_entry(info))


def holds_tars(names: Iterable[str]) -> bool:
    """Return whether these are tars of images: no images, and no Parquet but that of img2dataset.

    That is called as its tar is.
    """
    tars, tables = set(), set()
    for name in names:
        stem, suffix = posixpath.splitext(name.lower())
        if suffix in IMAGE_SUFFIXES:
            return False
        if name.lower().endswith(TAR_SUFFIXES):
            tars.add(stem)
        elif suffix == ".parquet":
            tables.add(stem)
    return bool(tars & tables if tables else tars)


@dataclass(frozen=True)
class TarSource:
    """Every image in the tars below a folder of any store, or in one tar."""

    files: FolderSource | S3PrefixSource | FsspecPrefixSource  # the tars, among others
    class_names: dict[str, int]
    key_filter: KeyFilter = KEEP_ALL
    label_column: str = "label"
    min_shard_rows: int | None = None
    only: Tar | None = None  # instead of all below `files`

    def list_images(
        self, parts: Sequence[Part] | None = None, max_rows: int | None = None
    ) -> Listing:
        listing = Listing(iter(()), Counter(), keeps_order=True)
        listing.batches = self._list_batches(listing)
        return listing

    def _list_batches(self, listing: Listing) -> Iterator[pa.RecordBatch]:
        left_out, labels = listing.left_out, LabelReader(self.label_column, self.class_names)
        tars = [self.only] if self.only else self._find_tars(left_out, listing.notes)
        max_rows = self.min_shard_rows or MIN_SHARD_ROWS
        shard: list[tuple[Any, ...]] = []
        num_bytes = 0
        unused = Counter[str]()
        read_label = partial(read_sidecar, labels=labels, unused=unused)
        listings = (self._list_tar(tar, read_label) for tar in tars)
        with closing(take_turns(listings, LISTING_THREADS, max_rows)) as rows:
            for row in rows:
                if isinstance(row, str):
                    left_out[row] += 1
                    continue
                if shard and (len(shard) == max_rows or num_bytes > MAX_SHARD_BYTES):
                    yield from batch_rows(shard, pa.schema(MANIFEST_FIELDS), max_rows)
                    shard, num_bytes = [], 0
                shard.append(row)
                num_bytes += row[3] or 0
        yield from batch_rows(shard, pa.schema(MANIFEST_FIELDS), max_rows)
        if labels.counts:
            listing.notes.append(labels.describe())
        for suffix, count in unused.items():
            listing.notes.append(
                f"{count:,} images have 0 or 1 in their {suffix}, which may be classes of any kind:"
                " --real-name 0 --fake-name 1, or the other way round, takes them for labels"
            )

    def _find_tars(self, left_out: Counter[str], notes: list[str]) -> list[Tar]:
        listing = self.files.list_images()
        tars = []
        for batch in listing.batches:
            names = ("key", "location", "size_bytes", "mtime_ns", "etag")
            for facts in zip(*(batch.column(name).to_pylist() for name in names), strict=True):
                if facts[0].lower().endswith(TAR_SUFFIXES):
                    tars.append(Tar(*facts))
                else:
                    left_out["not a tar"] += 1
        left_out.update(listing.left_out)
        notes += listing.notes
        return sorted(tars, key=attrgetter("name"))

    def _list_tar(self, tar: Tar, read_label: ReadLabel) -> Iterator[tuple[Any, ...] | str]:
        """Yield the rows of a tar, and the reason for each member that is none."""
        if tar.location is None or tar.size_bytes is None:  # a name, or a link, that leads nowhere
            reason = "not_found" if tar.location else "bad_key"
            yield tar.name, tar.location, None, *tar[2:], None, None, None, reason
            return
        large_bytes = SMALL_READ_BYTES if isinstance(self.files, FolderSource) else LARGE_READ_BYTES
        window = _Window(partial(self._read_part, tar), tar.size_bytes, large_bytes)
        read_labels = make_label_reader(self.class_names)
        folder = "/".join(split_file_name(tar.name, self.class_names))
        for image in list_images(window.read_at, tar.size_bytes, read_label):
            if isinstance(image, str):
                yield image
                continue
            name, offset, size_bytes, label, error = image
            key = tar.name if name is None else f"{tar.name}/{name}"
            # A glob of members must not hide that the tar is damaged.
            kept = self.key_filter if name else replace(self.key_filter, include=())
            if not kept.keeps(key):
                yield "excluded"
                continue
            if name is None and offset == 0:  # no tar: a row that says so when it is decoded
                _refuse_compressed(tar, window.read_at(0, 8))
                size_bytes, error = tar.size_bytes, None
            path = f"{folder}/{posixpath.dirname(name or '')}"
            of_path = read_labels(path)
            if label is not None:
                if of_path.label is None:  # then it is as if in a folder of its class
                    of_path = read_labels(f"{path}/{LABEL_NAMES[label]}")
                of_path = of_path._replace(label=label)
            escaped = escape_key(key)
            if escaped is None:
                start = None if error else offset
                yield key, tar.location, start, size_bytes, *tar[3:], *of_path, error
            else:
                known = (None, None, size_bytes, *tar[3:], of_path.label, None, None)
                yield escaped, *known, "bad_key"

    def _read_part(self, tar: Tar, offset: int, size_bytes: int) -> bytes:
        """Read from a tar while it is listed. StorageError when that fails."""
        if isinstance(self.files, FolderSource):
            root, location = os.path.realpath(self.files.root), str(tar.location)
            allowed = None if self.files.follow_symlinks else root
            path = os.path.join(root, location)
            part = read_local_file(path, size_bytes, tar.mtime_ns, allowed, offset)
        else:
            (part,) = self._read_spans([_Span(tar, offset, offset + size_bytes, [])])
        if isinstance(part, ImageError):
            raise StorageError(f"{tar.location}: {part} while it was listed; try again")
        return part

    def _read_spans(self, spans: Sequence[_Span]) -> Any:
        columns = {
            "location": [span.tar.location for span in spans],
            "row": [span.start for span in spans],
            "size_bytes": [span.end - span.start for span in spans],
            "mtime_ns": [span.tar.mtime_ns for span in spans],
            "etag": [span.tar.etag for span in spans],
        }
        return self.files.read_images(pa.table(columns))

    def read_images(self, rows: pa.Table) -> Iterator[bytes | ImageError]:
        spans = self._make_spans(rows)
        with closing(self._read_spans([span for span in spans if span.start < span.end])) as parts:
            for span in spans:
                part = next(parts) if span.start < span.end else b""
                for image in span.images:
                    if isinstance(image, ImageError):
                        yield image
                    else:
                        yield part if isinstance(part, ImageError) else part[image]

    def _make_spans(self, rows: pa.Table) -> list[_Span]:
        """Return what to read for some rows of the manifest, with where in it each image is."""
        names = ("location", "size_bytes", "mtime_ns", "etag", "row", "error")
        spans: list[_Span] = []
        for location, size_bytes, *stamp, start, error in zip(
            *(rows.column(name).to_pylist() for name in names), strict=True
        ):
            tar, image = Tar("", location, 0, *stamp), None
            if error or start is None:
                error = error or "not_an_image"
                image = ImageError(error, DETAILS.get(error, "so it was listed"))
            elif size_bytes is None or start < 0 or size_bytes < 0:
                image = ImageError("changed", "the tar was listed otherwise")
            elif size_bytes > MAX_IMAGE_BYTES:
                image = ImageError(
                    "too_large", f"{size_bytes} bytes; the limit is {MAX_IMAGE_BYTES}"
                )
            start, end = (0, 0) if image else (start, start + size_bytes)
            if not spans or not (image or spans[-1].covers(tar, start, end)):
                spans.append(_Span(tar, start, start, []))
            span = spans[-1]
            span.end = max(span.end, end)
            span.images.append(image or slice(start - span.start, end - span.start))
        return spans


def _refuse_compressed(tar: Tar, first: bytes) -> None:
    """Raise UsageError for a compressed tar, which cannot be read from the middle."""
    for magic, method in COMPRESSED.items():
        if first.startswith(magic):
            raise UsageError(
                f"{tar.location}: compressed by {method}, so its members cannot be read in place;"
                f" decompress it, or leave it out by --exclude {tar.name!r}"
            )
