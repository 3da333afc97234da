"""What the batch spine does with a slice of images: the contract between `stages` and `core`.

Floor: core.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import pyarrow as pa

from cifake_ray.errors import ImageError

Prepare = Callable[[Iterable[bytes | ImageError]], Any]


class Processor(Protocol):
    """Turns rows of the manifest and the images they name into rows of the result, in two halves.

    The first needs the images alone, so another process, on another machine, may do it: it travels
    there, and what it gives travels back.
    """

    batch_size: int  # images handed over at once
    decodes: bool  # whether it decodes the pixels, or reads the header only
    footer: dict[str, str]  # what the footer of each shard records beside the spine's own facts
    prepare: Prepare  # gives what `finish` takes
    image_bytes: int  # of memory that it gives for each image, at most

    def finish(self, rows: pa.Table, prepared: Any) -> pa.Table:
        """One row of the result for each row of the manifest, in the same order."""
        ...

    def count_unlike(self, rows: pa.Table) -> dict[str, int]:
        """Rows of a shard that are unlike the training images, by reason; empty if unknown."""
        ...


def assemble_rows(
    fields: Sequence[pa.Field],
    rows: pa.Table,
    columns: dict[str, Sequence[Any] | pa.Array],
    errors: Sequence[ImageError | None],
) -> pa.Table:
    """A result table: `columns` first, then errors, then what the manifest knows of each key.

    The manifest's extra columns follow the fields of the schema under their own names.
    """
    from cifake_ray.core.schema import MANIFEST_FIELDS

    known = {field.name for field in MANIFEST_FIELDS}
    extra = [field for field in rows.schema if field.name not in known]
    columns = {
        **columns,
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
