"""Call images REAL or FAKE by the thresholds of a policy, which may be unsure.

`fit_policy` chooses the thresholds; every worker needs this file, and no scipy for it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cifake_ray.errors import UsageError

Scores = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Cut:
    """Thresholds on p_fake, and the REAL images that they rest on."""

    threshold: float  # FAKE from here on
    unsure_from: float  # REAL below
    num_real: int
    num_above: int  # of them, at or above `threshold`
    fpr_interval: tuple[float, float]  # Clopper-Pearson, two-sided, at the policy's confidence


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What images are called, by p_fake and perhaps by a column.

    Where a value of the column has no thresholds of its own, an image is FAKE if all thresholds
    say so, REAL if all do, else unsure.
    """

    bundle: str  # the fingerprint of bundle and precision whose scores these are
    precision: str
    target_fpr: float
    confidence: float
    overall: Cut
    unsure_fpr: float | None = None
    by: str | None = None
    groups: dict[str, Cut] = field(default_factory=dict)
    too_few: dict[str, int] = field(default_factory=dict)  # REAL images of other values

    def __post_init__(self) -> None:
        cuts = (self.overall, *self.groups.values())
        if not all(0 <= cut.unsure_from <= cut.threshold <= 1 for cut in cuts):
            raise ValueError("thresholds are from 0 to 1, and unsure_from is not above threshold")
        if self.groups and self.by is None:
            raise ValueError("it has groups, but not the column that they are of")

    @property
    def id(self) -> str:
        """The digest of the policy; it is told as who decided."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return f"policy-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    @property
    def others(self) -> tuple[float, float]:
        """Return threshold and unsure_from of images without thresholds of their own."""
        cuts = (self.overall, *self.groups.values())
        return max(cut.threshold for cut in cuts), min(cut.unsure_from for cut in cuts)

    def find_bounds(self, table: pa.Table) -> tuple[Scores, Scores]:
        """Return threshold and unsure_from of each row. UsageError without the column."""
        bounds = [(cut.threshold, cut.unsure_from) for cut in self.groups.values()]
        both = np.array([*bounds, self.others], np.float32)
        if self.by is None:
            rows = np.zeros(table.num_rows, np.intp)
        else:
            found = pc.index_in(read_groups(table, self.by), pa.array(self.groups, pa.string()))
            rows = found.fill_null(len(self.groups)).to_numpy()
        return both[rows, 0], both[rows, 1]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def find_verdicts(table: pa.Table, threshold: float, policy: Policy | None) -> pa.ChunkedArray:
    """Return `is_fake` of a table of scores: null for errors, and for what a policy is unsure of.

    Without a policy `threshold` decides.
    """
    p_fake = table.column("p_fake")
    if policy is None:
        return pc.greater_equal(p_fake, pa.scalar(threshold, pa.float32()))
    above, unsure_from = map(pa.array, policy.find_bounds(table))
    is_fake = pc.greater_equal(p_fake, above)
    is_unsure = pc.and_(pc.invert(is_fake), pc.greater_equal(p_fake, unsure_from))
    return pc.if_else(is_unsure, pa.scalar(None, pa.bool_()), is_fake)


def set_verdicts(table: pa.Table, threshold: float, policy: Policy | None) -> pa.Table:
    """Return a table of scores with `is_fake` as `find_verdicts` says."""
    index = table.schema.get_field_index("is_fake")
    verdicts = find_verdicts(table, threshold, policy)
    return table.set_column(index, table.schema.field(index), verdicts)


def read_groups(table: pa.Table, column: str) -> pa.ChunkedArray:
    """Return a column as text. UsageError when there is none, or it cannot be text."""
    if column not in table.column_names:
        there = ", ".join(table.column_names)
        raise UsageError(f"thresholds by {column!r}: there is no such column, only {there}")
    try:
        return table.column(column).cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        kind = table.column(column).type
        raise UsageError(f"thresholds by {column!r}: it holds {kind}, no text") from error
