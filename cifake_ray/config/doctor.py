"""Options of `doctor`; those of a bucket come from `StoreConfig`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from cifake_ray.config.fields import Doc


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """doctor: check this machine: cores, GPUs, memory, disk, the detector, a store and Ray."""

    PANEL: ClassVar[str] = "Checks"

    out: Annotated[str, Doc("Folder for outputs, whose free disk is shown")] = "."
    store: Annotated[str | None, Doc("s3://BUCKET/PREFIX that must be readable")] = None
    ray: Annotated[bool, Doc("Also start Ray and run a task")] = False
