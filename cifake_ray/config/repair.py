"""Options of `repair`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from cifake_ray.config.fields import Doc, WorkersConfig


@dataclass(frozen=True, kw_only=True)
class RepairConfig(WorkersConfig):
    """repair: redo the shards that `verify` finds damaged, and only those."""

    out: Annotated[str, Doc("Output of convert, score, evaluate or audit", positional=True)]
