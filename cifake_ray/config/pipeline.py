"""Options of `pipeline`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from cifake_ray.config.fields import ClusterConfig, Device, Doc, RuntimeDoc, check_least


@dataclass(frozen=True, kw_only=True)
class PipelineConfig(ClusterConfig):
    """pipeline: convert, train, evaluate and score below one folder."""

    src: Annotated[str, Doc("Folder of labelled images", positional=True)]
    root: Annotated[str, Doc("Folder for all outputs", positional=True)]
    model: Annotated[str, Doc("cnn, fusion, small_* or any of timm: see `models`")] = "cnn"
    epochs: Annotated[int, Doc("Passes over the training images")] = 10
    seed: Annotated[int, Doc("Same seed, same workers, same result")] = 0
    num_workers: Annotated[
        str | None, Doc("Data-parallel training workers (default: as for train)")
    ] = None
    batch_workers: Annotated[
        int | None, Doc("Workers of convert, evaluate and score (default: as for these)")
    ] = None
    device: Annotated[Device, Doc("auto: the GPUs if there are any")] = "auto"
    dry_run: Annotated[
        bool,
        RuntimeDoc("Check the options, show the plan of convert, on whose output the rest depends"),
    ] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 1, "epochs")
        check_least(self, 0, "seed", "batch_workers")
