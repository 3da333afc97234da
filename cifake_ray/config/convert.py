"""Options of `convert`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from cifake_ray.config.batch import SourceConfig
from cifake_ray.config.fields import MAX_IMAGE_SIZE, Doc, SquareFit, check, check_least

SameAs = Literal["none", "bytes", "pixels", "near"]
Trait = Literal["size", "quality"]
ENCODINGS = re.compile(r"(?:(jpeg|webp):([1-9]\d?|100)|(png))")


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(SourceConfig):
    """convert: convert images to Parquet shards."""

    needs_labels: ClassVar[bool] = True
    PANEL: ClassVar[str] = "Remedies for what `audit` finds"

    audit: Annotated[
        str | None, Doc("Output of audit for the same images, which --dedupe and --match need")
    ] = None
    dedupe: Annotated[
        SameAs,
        Doc(
            "Keep one of several images that are the same by their bytes, by their pixels, or near"
            " duplicates: that of test before val before train; all go if their labels differ"
        ),
    ] = "none"
    match: Annotated[
        tuple[Trait, ...],
        Doc(
            "Keep as many REAL as FAKE images of each size, or of each format and quality, in each"
            " split; repeatable"
        ),
    ] = ()
    reencode: Annotated[
        str | None,
        Doc("Encode all pixels anew, without metadata: jpeg:QUALITY, webp:QUALITY or png"),
    ] = None
    reencode_size: Annotated[
        int | None, Doc("With --reencode: the side of a square, in pixels, for all images")
    ] = None
    reencode_fit: Annotated[SquareFit, Doc("How images are made to fit --reencode-size")] = "resize"

    def __post_init__(self) -> None:
        super().__post_init__()
        needs = "--match" if self.match else "--dedupe"
        is_used = bool(self.dedupe != "none" or self.match)
        check(
            self.audit is not None or not is_used,
            f"{needs} needs --audit OUT, the output of `cifake-ray audit {self.src} OUT`",
        )
        check(self.audit is None or is_used, "--audit is used by --dedupe and --match; give one")
        check(
            self.reencode is None or ENCODINGS.fullmatch(self.reencode) is not None,
            f"--reencode is {self.reencode!r}; give jpeg:QUALITY or webp:QUALITY, with a quality"
            " from 1 to 100, or png",
        )
        check(
            self.reencode is not None or self.reencode_size is None,
            "--reencode-size needs --reencode, such as jpeg:90",
        )
        check(
            self.reencode_size is not None or self.reencode_fit == "resize",
            f"--reencode-fit {self.reencode_fit} needs --reencode-size, the side in pixels",
        )
        check_least(self, 1, "reencode_size")
        check(
            (self.reencode_size or 1) <= MAX_IMAGE_SIZE,
            f"--reencode-size is {self.reencode_size}; give at most {MAX_IMAGE_SIZE}",
        )
