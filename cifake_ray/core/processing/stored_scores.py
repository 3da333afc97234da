"""Turn scores that are listed already into result rows: evaluate's processor without a detector."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from cifake_ray.core.processing.processor import Prepare
from cifake_ray.core.schema import MANIFEST_FIELDS, SCORE_FIELDS
from cifake_ray.errors import ImageError


class StoredScoreProcessor:
    """Copy `logit` and `p_fake` of the listing: the `Processor` of scores made elsewhere."""

    batch_size = 16_384
    decodes = False
    image_bytes = 0

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.footer = {"threshold": str(threshold)}
        self.prepare: Prepare = list

    def finish(self, rows: pa.Table, prepared: Sequence[bytes | ImageError]) -> pa.Table:
        details = [one.detail if isinstance(one, ImageError) else None for one in prepared]
        threshold = pa.scalar(self.threshold, pa.float32())
        columns = {
            "is_fake": pc.greater_equal(rows.column("p_fake"), threshold),
            "error_detail": pa.array(details, pa.string()),
        }
        known = {field.name for field in [*MANIFEST_FIELDS, *SCORE_FIELDS]}
        schema = pa.schema([*SCORE_FIELDS, *(f for f in rows.schema if f.name not in known)])
        arrays = [columns[f.name] if f.name in columns else rows.column(f.name) for f in schema]
        return pa.Table.from_arrays(arrays, schema=schema)

    def count_unlike(self, rows: pa.Table) -> dict[str, int]:
        return {}  # nobody says what the detector was trained on
