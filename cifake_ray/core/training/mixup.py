"""Blend images and labels of a batch by Mixup and CutMix.

As timm's `Mixup` in its batch mode: one share for the batch, and image i is mixed with image
B - 1 - i. timm's draws from numpy's global generator and sees one rank's images only; here the
partner is that of the global batch, so the number of ranks does not change the result.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from cifake_ray.config import TrainConfig


@dataclass(frozen=True)
class Mix:
    """The random decisions for a batch."""

    kept: float  # share of an image's own label, 0 to 1
    box: tuple[slice, slice] | None  # CutMix: the rows and columns that the partner fills


def draw_mix(rng: np.random.Generator, config: TrainConfig, size: int) -> Mix | None:
    """Draw a mix for a batch of S x S images; None when no mixing is asked for.

    The share is Beta(alpha, alpha), Zhang et al. 2017. With both alphas each batch takes one of the
    two by even odds, as in timm. The box and the share corrected for its clipping are those of Yun
    et al. 2019, section 3.1.
    """
    alphas = {"mixup": config.mixup, "cutmix": config.cutmix}
    kinds = [kind for kind, alpha in alphas.items() if alpha > 0]
    if not kinds:
        return None
    kind = kinds[int(rng.integers(len(kinds)))]
    kept = float(rng.beta(alphas[kind], alphas[kind]))
    if kind == "mixup":
        return Mix(kept, None)
    side = round(size * float(np.sqrt(1 - kept)))
    row, column = (int(rng.integers(size)) - side // 2 for _ in range(2))
    rows = slice(max(row, 0), min(row + side, size))
    columns = slice(max(column, 0), min(column + side, size))
    filled = (rows.stop - rows.start) * (columns.stop - columns.start)
    return Mix(1 - filled / size**2, (rows, columns))


def mix_images(images: torch.Tensor, partners: torch.Tensor, mix: Mix) -> torch.Tensor:
    """Blend two uint8[B, S, S, 3]: to float32 for mixup, uint8 for CutMix."""
    if mix.box is None:
        return images.float() * mix.kept + partners.float() * (1 - mix.kept)
    mixed = images.clone()
    mixed[:, mix.box[0], mix.box[1]] = partners[:, mix.box[0], mix.box[1]]
    return mixed


def mix_labels(labels: torch.Tensor, partners: torch.Tensor, mix: Mix) -> torch.Tensor:
    """Blend two int64[B] to float32[B, 2], the share of each class."""
    own, other = (torch.nn.functional.one_hot(x, 2).float() for x in (labels, partners))
    return own * mix.kept + other * (1 - mix.kept)
