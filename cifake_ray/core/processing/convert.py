"""The processor of convert: images to shard rows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import pyarrow as pa

from cifake_ray.core.imaging.decode import MAX_IMAGE_BYTES, ImageHeader, inspect_image
from cifake_ray.core.processing.processor import Prepare, assemble_rows
from cifake_ray.core.schema import HEADER_FIELDS, SHARD_FIELDS
from cifake_ray.errors import ImageError

BATCH_SIZE = 1024


class ConvertProcessor:
    """Keep the bytes untouched and record what their header says: the `Processor` of convert."""

    batch_size = BATCH_SIZE
    decodes = False
    image_bytes = MAX_IMAGE_BYTES

    def __init__(self) -> None:
        self.footer: dict[str, str] = {}
        self.prepare: Prepare = list

    def finish(self, rows: pa.Table, prepared: Sequence[bytes | ImageError]) -> pa.Table:
        headers: list[ImageHeader | None] = []
        errors: list[ImageError | None] = []
        for image in prepared:
            try:
                if isinstance(image, ImageError):
                    raise image
                headers.append(inspect_image(image))
                errors.append(None)
            except ImageError as error:
                headers.append(None)
                errors.append(error)
        data = [None if isinstance(image, ImageError) else image for image in prepared]
        columns: dict[str, Sequence[object] | pa.Array] = {
            "image": pa.StructArray.from_arrays(
                [pa.array(data, pa.binary()), rows.column("key").combine_chunks()],
                fields=list(SHARD_FIELDS[1].type),
            ),
            "sha256": [None if d is None else hashlib.sha256(d).digest() for d in data],
        }
        for field in HEADER_FIELDS:
            columns[field.name] = [h and getattr(h, field.name) for h in headers]
        return assemble_rows(SHARD_FIELDS, rows, columns, errors)

    def count_unlike(self, rows: pa.Table) -> dict[str, int]:
        return {}  # there is no detector
