"""Images in, shard rows out: what convert does with a slice of a shard.

Floor: core.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import pyarrow as pa

from cifake_ray.core.imaging.decode import MAX_IMAGE_BYTES, ImageFacts, inspect_image
from cifake_ray.core.processing.processor import Prepare, assemble_rows
from cifake_ray.core.schema import FACT_FIELDS, SHARD_FIELDS
from cifake_ray.errors import ImageError

BATCH_SIZE = 1024


class ConvertWork:
    """Keeps the bytes untouched and writes down what their header says: the `Work` of convert."""

    batch_size = BATCH_SIZE
    decodes = False
    image_bytes = MAX_IMAGE_BYTES

    def __init__(self) -> None:
        self.facts: dict[str, str] = {}
        self.prepare: Prepare = list

    def finish(self, rows: pa.Table, prepared: Sequence[bytes | ImageError]) -> pa.Table:
        facts: list[ImageFacts | None] = []
        errors: list[ImageError | None] = []
        for image in prepared:
            try:
                if isinstance(image, ImageError):
                    raise image
                facts.append(inspect_image(image))
                errors.append(None)
            except ImageError as error:
                facts.append(None)
                errors.append(error)
        data = [None if isinstance(image, ImageError) else image for image in prepared]
        columns: dict[str, Sequence[object] | pa.Array] = {
            "image": pa.StructArray.from_arrays(
                [pa.array(data, pa.binary()), rows.column("key").combine_chunks()],
                fields=list(SHARD_FIELDS[1].type),
            ),
            "sha256": [None if d is None else hashlib.sha256(d).digest() for d in data],
        }
        for field in FACT_FIELDS:
            columns[field.name] = [f and getattr(f, field.name) for f in facts]
        return assemble_rows(SHARD_FIELDS, rows, columns, errors)

    def count_unlike(self, rows: pa.Table) -> dict[str, int]:
        return {}  # of no detector
