"""Divide the images of a shard into batches that are bounded in rows and bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import pyarrow as pa

from cifake_ray.core.processing.processor import Prepare
from cifake_ray.errors import ImageError

MAX_BATCH_BYTES = 256 * 2**20  # encoded images that are processed at once


class PreparedBatch(NamedTuple):
    """Some rows of the manifest with their images; `prepared` is None if no task prepared them."""

    rows: pa.Table
    prepared: Any
    size_bytes: int  # encoded
    is_suspect: bool = False  # one of the images may have ended its process


def measure_image(image: bytes | ImageError) -> int:
    """Return the encoded bytes of an image, 0 for one that could not be fetched."""
    return 0 if isinstance(image, ImageError) else len(image)


def prepare_images(prepare: Prepare, images: Iterable[bytes | ImageError]) -> tuple[Any, int]:
    """Prepare images as they arrive; return also how many encoded bytes they have together."""
    sizes = []

    def measure() -> Iterator[bytes | ImageError]:
        for image in images:
            sizes.append(measure_image(image))
            yield image

    return prepare(measure()), sum(sizes)


def take_images(
    images: Iterator[bytes | ImageError], max_images: int, on_image: Callable[[], None]
) -> list[bytes | ImageError]:
    """Return the next images: at most `max_images`, and no more once they have MAX_BATCH_BYTES.

    Their sizes are often not listed: those of Parquet files never are.
    """
    taken: list[bytes | ImageError] = []
    size_bytes = 0
    for image in islice(images, max_images):
        taken.append(image)
        on_image()
        size_bytes += measure_image(image)
        if size_bytes >= MAX_BATCH_BYTES:
            break
    return taken


def slice_rows(rows: pa.Table, batch_size: int) -> Iterator[pa.Table]:
    """Yield slices of at most `batch_size` rows and, by their listed sizes, MAX_BATCH_BYTES."""
    start = size_bytes = 0
    for row, size in enumerate(rows.column("size_bytes").to_pylist()):
        if row > start and (
            row - start == batch_size or size_bytes + (size or 0) > MAX_BATCH_BYTES
        ):
            yield rows.slice(start, row - start)
            start, size_bytes = row, 0
        size_bytes += size or 0
    yield rows.slice(start)
