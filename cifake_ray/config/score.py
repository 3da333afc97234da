"""Options of `score`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from cifake_ray.config.batch import BundleConfig, SourceConfig
from cifake_ray.config.fields import Doc, RuntimeDoc, check


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(SourceConfig, BundleConfig):
    """score: score images with a detector."""

    PANEL: ClassVar[str] = "Detector"

    target_fpr: Annotated[
        float | None, Doc("Use the bundle's threshold for this false-positive rate: 0.01 or 0.001")
    ] = None
    provenance: Annotated[
        bool,
        Doc(
            "Add columns of what metadata claims of an image's origin: C2PA, IPTC, generators,"
            " TC260 (with the extra `provenance` also who signed it)"
        ),
    ] = False
    thumbnails: Annotated[
        bool,
        Doc(
            "Add the column thumbnail_webp, of 8 KiB at most each, so that `review` needs no source"
        ),
    ] = False

    policy: Annotated[
        str | None,
        Doc("Call images by this policy.json of `decide`, which may be unsure: is_fake is null"),
    ] = None

    extend: Annotated[
        bool,
        RuntimeDoc("List SRC again and score its new images too; say which have changed or gone"),
    ] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.target_fpr in (None, 0.01, 0.001),
            f"--target-fpr is {self.target_fpr}; bundles store thresholds for 0.01 and 0.001;"
            " `cifake-ray decide` finds one for any rate from your own REAL images",
        )
        check(
            not (self.extend and (self.limit or self.sample or self.dry_run)),
            "--extend scores all new images: leave out --limit, --sample and --dry-run",
        )
        check(
            self.target_fpr is None or self.policy is None,
            "--policy and --target-fpr both say what is FAKE; give one of them",
        )
