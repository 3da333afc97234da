"""Record what a detector's verdicts lose in a faster precision than float32.

Measured once, on validation images, at the end of training; kept in the bundle.
"""

from __future__ import annotations

from dataclasses import dataclass, field

# What `--precision auto` accepts. The check itself is of at least MIN_IMAGES images.
MIN_IMAGES = 1000
MAX_ACCURACY_LOSS = 0.0005
MAX_AUROC_LOSS = 0.0002
MAX_FLIPS = 0.005
MIN_SPEEDUP = 1.2


@dataclass(frozen=True, kw_only=True)
class PrecisionCheck:
    """A precision compared with float32 on the same images."""

    images: int
    flips: float  # share of the images whose verdict at the bundle's threshold changes
    accuracy_loss: float  # at that threshold; negative if it is better
    auroc_loss: float
    max_p_fake_difference: float
    speedup: float  # images per second, relative to float32
    probe: list[float]  # logits of `core.models.precision.make_probe`
    # Of int8, by the name of torch's observer: the lowest and highest value that is represented.
    ranges: dict[str, list[float]] = field(default_factory=dict)

    @property
    def is_harmless(self) -> bool:
        """Whether `--precision auto` may use it."""
        return (
            self.images >= MIN_IMAGES
            and self.accuracy_loss <= MAX_ACCURACY_LOSS
            and self.auroc_loss <= MAX_AUROC_LOSS
            and self.flips <= MAX_FLIPS
            and self.speedup >= MIN_SPEEDUP
        )

    def __str__(self) -> str:
        return (
            f"{self.flips:.2%} of the verdicts on {self.images:,} validation images change,"
            f" accuracy {-self.accuracy_loss:+.2%}, AUROC {-self.auroc_loss:+.5f}"
        )
