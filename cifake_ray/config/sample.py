"""Options of `sample`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from cifake_ray.config.fields import Doc, check_least


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """sample: write a small labelled image folder, without any download."""

    out: Annotated[str, Doc("Folder to write", positional=True)]
    images: Annotated[int, Doc("Images in all; 80% train, 10% val, 10% test")] = 3000
    seed: Annotated[int, Doc("Same seed, same bytes")] = 0
    mixed: Annotated[bool, Doc("Mixed sizes and formats instead of 32x32 JPEG")] = False

    def __post_init__(self) -> None:
        check_least(self, 20, "images")
        check_least(self, 0, "seed")
