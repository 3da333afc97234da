"""Options of `audit`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from cifake_ray.config.batch import SourceConfig
from cifake_ray.config.fields import Doc, check_least


@dataclass(frozen=True, kw_only=True)
class AuditConfig(SourceConfig):
    """audit: find what gives the labels of images away without looking at them."""

    needs_labels: ClassVar[bool] = True
    PANEL: ClassVar[str] = "Audit"

    probe_images: Annotated[
        int, Doc("Images of each class, at most, for the classifiers that look for leaks")
    ] = 10_000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 50, "probe_images")
