"""Options of `evaluate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from cifake_ray.config.batch import BundleConfig
from cifake_ray.config.fields import Doc, RuntimeDoc, check_least


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(BundleConfig):
    """evaluate: measure a detector on labelled shards and write a report."""

    PANEL: ClassVar[str] = "Evaluation"
    PANELS: ClassVar[dict[str, str]] = {"Evaluation": "grid"}

    shards: Annotated[str, Doc("Output of convert", positional=True)]
    out: Annotated[str, RuntimeDoc("Folder for the report")]
    split: Annotated[str | None, Doc("Split to use (default: test, else all labelled)")] = None
    grid: Annotated[  # its content is in the fingerprint
        str | None,
        RuntimeDoc(
            "Measure under perturbations too: default, a YAML file of cells, or {cell: {jpeg: 75}}"
        ),
    ] = None
    num_bootstrap: Annotated[int, Doc("Bootstrap resamples for the 95% intervals")] = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 10, "num_bootstrap")
