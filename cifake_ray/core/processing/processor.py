"""Define what the batch spine does with images: the contract of its processors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import pyarrow as pa

from cifake_ray.core.imaging.decode import ImageHeader
from cifake_ray.core.schema import HEADER_FIELDS, MANIFEST_FIELDS
from cifake_ray.errors import ImageError

Prepare = Callable[[Iterable[bytes | ImageError]], Any]


class Processor(Protocol):
    """Turn rows of the manifest and their images into rows of the result, in two halves.

    `prepare` needs only the images, so it may run in a process on another machine: it and its
    result are pickled.
    """

    batch_size: int  # images per call
    decodes: bool  # whether it decodes pixels, or reads headers only
    footer: dict[str, str]  # added to the footer of each shard
    prepare: Prepare  # returns what `finish` takes
    image_bytes: int  # size of the result of `prepare` per image, at most

    def finish(self, rows: pa.Table, prepared: Any) -> pa.Table:
        """Return one row of the result for each row of the manifest, in the same order."""
        ...

    def count_unlike(self, rows: pa.Table) -> dict[str, int]:
        """Count rows of a shard that are unlike the training images, by reason; {} if unknown."""
        ...


def assemble_rows(
    fields: Sequence[pa.Field],
    rows: pa.Table,
    columns: dict[str, Sequence[Any] | pa.Array],
    headers: Sequence[ImageHeader | None],
    errors: Sequence[ImageError | None],
) -> pa.Table:
    """Assemble a result table from `columns`, headers, errors and columns of the manifest.

    The manifest's extra columns follow the fields of the schema under their own names.
    """
    known = {field.name for field in MANIFEST_FIELDS}
    extra = [field for field in rows.schema if field.name not in known]
    columns = {
        **columns,
        **{f.name: [h and getattr(h, f.name) for h in headers] for f in HEADER_FIELDS},
        "error": [None if e is None else e.error for e in errors],
        "error_detail": [None if e is None else e.detail for e in errors],
    }
    schema = pa.schema([*fields, *extra])
    arrays = []
    for field in schema:
        values = columns.get(field.name)
        if values is None:
            values = rows.column(field.name).combine_chunks()
        arrays.append(values if isinstance(values, pa.Array) else pa.array(values, field.type))
    return pa.Table.from_arrays(arrays, schema=schema)
