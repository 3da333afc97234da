"""Read and score what a detector scores of validation images: all of each, or several crops."""

from __future__ import annotations

from typing import NamedTuple, cast

import numpy as np
import torch

from cifake_ray.core.imaging.preprocessing import Preprocessing
from cifake_ray.core.models.detector import Detector
from cifake_ray.core.training.batches import CropImages, Images, to_device
from cifake_ray.core.training.native_crops import cut_scored


class ScoredPixels(NamedTuple):
    """What is scored of N images."""

    pixels: np.ndarray  # uint8[M, S, S, 3], image after image
    counts: list[int]  # of each image

    def find_logit(self, detector: Detector, device: str = "cpu") -> torch.Tensor:
        """Return float32[N], the mean over each image's crops."""
        logit = detector.find_logit(to_device(self.pixels, device))
        if len(self.counts) == len(self.pixels):
            return logit
        return torch.stack([crops.mean() for crops in logit.split(self.counts)])


def read_scored(images: Images, preprocessing: Preprocessing, indices: np.ndarray) -> ScoredPixels:
    """Read the pixels of some images that `Preprocessing.load_image` gives."""
    if preprocessing.fit != "crops":
        return ScoredPixels(images.read(indices), [1] * len(indices))
    crops = cast(CropImages, images).map_native(
        indices, lambda image, _: cut_scored(image, preprocessing)
    )
    return ScoredPixels(np.concatenate(crops), [len(each) for each in crops])
