"""Options of `decide`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated

from cifake_ray.config.fields import Doc, RuntimeDoc, StoreConfig, check

CHOICES = {"target_fpr", "confidence", "unsure_fpr", "by", "real", "labels"}  # of thresholds


@dataclass(frozen=True, kw_only=True)
class DecideConfig(StoreConfig):
    """decide: call scored images FAKE, REAL or unsure, by thresholds from your own REAL images."""

    src: Annotated[str, RuntimeDoc("Output of score or evaluate", positional=True)]
    out: Annotated[
        str, RuntimeDoc("Output folder: decisions/*.parquet, policy.json", positional=True)
    ]
    target_fpr: Annotated[
        float, Doc("At most this share of REAL images is to be called FAKE, between 0 and 1")
    ] = 0.01
    confidence: Annotated[
        float, Doc("That it holds for images like those REAL ones, from 0.5 to below 1")
    ] = 0.95
    unsure_fpr: Annotated[
        float | None,
        Doc(
            "Unsure where more than this share of REAL images scores so high, REAL only below"
            " (default: where the REAL images cannot tell on which side of --target-fpr it is)"
        ),
    ] = None
    by: Annotated[
        str | None,
        Doc("Thresholds for each value of this column too, such as source, format or your own"),
    ] = None
    real: Annotated[
        str | None,
        Doc(
            "REAL images: a file of their keys, or output of score for them (default: the images"
            " that are labelled REAL)"
        ),
    ] = None
    labels: Annotated[
        str | None, Doc("CSV, JSON lines or Parquet of key and label, in place of those of SRC")
    ] = None
    settled: Annotated[
        str | None,
        Doc(
            "CSV, JSON lines or Parquet of key and verdict, and perhaps by and note: what persons"
            " have decided. OUT keeps it; an empty verdict takes it back"
        ),
    ] = None
    policy: Annotated[
        str | None, Doc("Decide by this policy.json, instead of choosing thresholds")
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 < self.target_fpr < 1, f"--target-fpr is {self.target_fpr}; give 0.01, 0.001, ...")
        check(
            0.5 <= self.confidence < 1,
            f"--confidence is {self.confidence}; give a share from 0.5 to below 1, such as 0.95",
        )
        check(
            self.unsure_fpr is None or self.target_fpr <= self.unsure_fpr < 1,
            f"--unsure-fpr is {self.unsure_fpr}; give a share from --target-fpr"
            f" ({self.target_fpr}) to below 1",
        )
        check(
            not (self.real and self.labels),
            "--real and --labels both name REAL images; give one of them",
        )
        given = {f.name for f in fields(self) if getattr(self, f.name) != f.default}
        check(
            self.policy is None or not given & CHOICES,
            "--policy has thresholds already; leave out what chooses others:"
            f" {', '.join(sorted(given & CHOICES))}",
        )
