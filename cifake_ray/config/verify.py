"""Options of `verify`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from cifake_ray.config.fields import Doc, WorkersConfig


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(WorkersConfig):
    """verify: compare the files of a finished run with what was committed."""

    out: Annotated[str, Doc("Output of convert, score, evaluate or audit", positional=True)]
