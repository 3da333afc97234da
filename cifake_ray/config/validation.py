"""Options of `train` that choose the validation images and the epoch that is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from cifake_ray.config.fields import ClusterConfig, Doc, RuntimeDoc, check, check_least

Monitor = Literal["val_accuracy", "val_loss", "val_auroc", "val_tpr_at_fpr_1pct"]


@dataclass(frozen=True, kw_only=True)
class ValidationConfig(ClusterConfig):
    """Which images validate, which are left out, and which epoch is kept."""

    PANEL: ClassVar[str] = "Validation and the epoch that is kept"
    PANELS: ClassVar[dict[str, str]] = {PANEL: "leave_one_source_out"}

    ema_decay: Annotated[
        float | None,
        Doc("Validate and keep a moving average of the weights; its decay per step, below 1"),
    ] = None
    monitor: Annotated[Monitor, Doc("Validation metric that selects the best epoch")] = (
        "val_accuracy"
    )
    patience: Annotated[
        int | None, Doc("Stop after this many epochs without a better one (default: never)")
    ] = None
    min_delta: Annotated[float, Doc("Smallest gain that --patience counts as better")] = 0.0
    keep_epochs: Annotated[
        int, Doc("Keep the mean weights of this many best epochs, if better than the best one's")
    ] = 1
    val_fraction: Annotated[float, Doc("Share of the training images kept for validation")] = 0.1
    val_split: Annotated[str | None, Doc("Validate on this split instead")] = None
    val_sources: Annotated[
        tuple[str, ...],
        Doc("Validate on these sources instead, `a,b`, and train on none of their images"),
    ] = ()
    test_fraction: Annotated[
        float,
        Doc("Share of the training images that is neither: for `evaluate --unseen`"),
    ] = 0.0
    exclude_source: Annotated[
        tuple[str, ...], Doc("Leave out all images of this source; repeatable")
    ] = ()
    leave_one_source_out: Annotated[
        bool,
        RuntimeDoc("Train without each FAKE source in turn, below RUN, and measure on all of them"),
    ] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 1, "patience", "keep_epochs")
        check_least(self, 0, "min_delta")
        check(
            self.min_delta == 0 or self.patience is not None,
            "--min-delta needs --patience: without it no epoch is counted",
        )
        check(
            self.ema_decay is None or 0 < self.ema_decay < 1,
            f"--ema-decay is {self.ema_decay}; give a number above 0, below 1",
        )
        check(
            0 < self.val_fraction < 1,
            f"--val-fraction is {self.val_fraction}; give a share between 0 and 1",
        )
        check(
            0 <= self.test_fraction < 1 - self.val_fraction,
            f"--test-fraction is {self.test_fraction}; with --val-fraction it must leave images to"
            " train on",
        )
        check(
            not self.val_sources or self.val_split is None,
            "--val-sources and --val-split: give one of them",
        )
        check(
            not self.val_sources or len(self.val_source_names) > 0,
            f"--val-sources {','.join(self.val_sources)!r} names no source; leave it out",
        )

    @property
    def val_source_names(self) -> list[str]:
        """Return the sources that `val_sources` names, one or several a value."""
        parts = [part.strip() for value in self.val_sources for part in value.split(",")]
        return [part for part in parts if part]
