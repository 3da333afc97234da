"""Options of `evaluate`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, ClassVar

from cifake_ray.config.batch import BundleConfig, ImagesConfig, SourceConfig
from cifake_ray.config.fields import Doc, RuntimeDoc, check, check_least


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ImagesConfig, BundleConfig):
    """evaluate: measure a detector on labelled images, or scores, and write a report."""

    PANEL: ClassVar[str] = "Evaluation"
    PANELS: ClassVar[dict[str, str]] = {"Evaluation": "grid"}

    shards: Annotated[
        str,
        Doc(
            "Output of convert, labelled images as for score, output of score or evaluate, or a"
            " table of scores (key, label, p_fake or logit)",
            positional=True,
        ),
    ]
    out: Annotated[str, RuntimeDoc("Folder for the report")]
    split: Annotated[str | None, Doc("Split to use (default: test, else all labelled)")] = None
    unseen: Annotated[
        bool, Doc("Only images that --bundle RUN neither trained nor validated on, of its shards")
    ] = False
    threshold: Annotated[
        float | None,
        Doc("p_fake from which an image is FAKE (default: the detector's; of other scores 0.5)"),
    ] = None
    slice: Annotated[
        tuple[str, ...],
        Doc(
            "Measure by this column too, beside the source: format, size, megapixels, jpeg_quality"
            " or any other; repeatable"
        ),
    ] = ()
    grid: Annotated[  # its content is in the fingerprint
        str | None,
        RuntimeDoc(
            "Measure under perturbations too: default, a YAML file of cells, or {cell: {jpeg: 75}}"
        ),
    ] = None
    gradient_maps: Annotated[
        bool,
        Doc("Show which pixels moved the scores of the worst and the uncertain images"),
    ] = False
    num_bootstrap: Annotated[int, Doc("Bootstrap resamples for the 95% intervals")] = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 10, "num_bootstrap")
        check(
            self.threshold is None or 0 <= self.threshold <= 1,
            f"--threshold is {self.threshold}; give a p_fake, 0 to 1",
        )
        check(not self.unseen or self.bundle is not None, "--unseen needs --bundle RUN")

    @property
    def source(self) -> SourceConfig:
        """Return what `open_source` takes."""
        kept = {f.name: getattr(self, f.name) for f in fields(ImagesConfig)}
        return SourceConfig(src=self.shards, out=self.out, **kept)
