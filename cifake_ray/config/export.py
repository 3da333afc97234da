"""Options of `export`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from cifake_ray.config.fields import Doc, StoreConfig


@dataclass(frozen=True, kw_only=True)
class ExportConfig(StoreConfig):
    """export: write scores as one CSV file that is safe to open in a spreadsheet."""

    scores: Annotated[str, Doc("Output of score or evaluate", positional=True)]
    file: Annotated[str, Doc("CSV file to write", positional=True)]
