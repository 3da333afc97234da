"""Turn images into shard rows: the processor of convert."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import pyarrow as pa

from cifake_ray.core.imaging.decode import MAX_IMAGE_BYTES, inspect_image, map_images
from cifake_ray.core.processing.processor import Prepare, assemble_rows
from cifake_ray.core.processing.reencode import Reencoder
from cifake_ray.core.schema import SHARD_FIELDS
from cifake_ray.errors import ImageError


class ConvertProcessor:
    """Record what the header of each image holds: the `Processor` of convert.

    Bytes stay untouched, unless all images are encoded anew.
    """

    image_bytes = MAX_IMAGE_BYTES

    def __init__(self, reencoder: Reencoder | None = None) -> None:
        self.footer: dict[str, str] = {}
        self.decodes = reencoder is not None
        self.batch_size = 1024 if reencoder is None else 64  # a heartbeat at least every 64 images
        self.prepare: Prepare = list if reencoder is None else reencoder.encode_images

    def finish(self, rows: pa.Table, prepared: Sequence[bytes | ImageError]) -> pa.Table:
        inspected = map_images(inspect_image, prepared)
        headers = [None if isinstance(each, ImageError) else each for each in inspected]
        errors = [each if isinstance(each, ImageError) else None for each in inspected]
        data = [None if isinstance(image, ImageError) else image for image in prepared]
        columns: dict[str, Sequence[object] | pa.Array] = {
            "image": pa.StructArray.from_arrays(
                [pa.array(data, pa.binary()), rows.column("key").combine_chunks()],
                fields=list(SHARD_FIELDS[1].type),
            ),
            "sha256": [None if d is None else hashlib.sha256(d).digest() for d in data],
        }
        return assemble_rows(SHARD_FIELDS, rows, columns, headers, errors)

    def count_unlike(self, rows: pa.Table) -> dict[str, int]:
        return {}  # there is no detector
