"""Options of `convert`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cifake_ray.config.batch import SourceConfig


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(SourceConfig):
    """convert: convert images to Parquet shards."""

    needs_labels: ClassVar[bool] = True
