"""Read and score what a detector scores of validation images: all of each, or several crops."""

from __future__ import annotations

from typing import NamedTuple, cast

import numpy as np
import torch

from cifake_ray.core.imaging.crops import pool_logits
from cifake_ray.core.imaging.preprocessing import Preprocessing
from cifake_ray.core.models.detector import Detector
from cifake_ray.core.training.batches import CropImages, Images, to_device
from cifake_ray.core.training.native_crops import cut_scored


class ScoredPixels(NamedTuple):
    """What is scored of N images."""

    pixels: np.ndarray  # uint8[M, S, S, 3], image after image
    num_crops: np.ndarray | None = None  # int64[N], of each image; None: M = N

    def find_logit(self, detector: Detector, device: str = "cpu") -> torch.Tensor:
        """Return float32[N], of images with several crops their mean."""
        logit = detector.find_logit(to_device(torch.from_numpy(self.pixels), device))
        if self.num_crops is None:
            return logit
        return torch.from_numpy(pool_logits(logit.cpu().numpy(), self.num_crops)[0])


def read_scored(images: Images, preprocessing: Preprocessing, indices: np.ndarray) -> ScoredPixels:
    """Read the pixels of some images that `Preprocessing.load_image` gives."""
    if preprocessing.fit != "crops":
        return ScoredPixels(images.read(indices))
    crops = cast(CropImages, images).map_native(
        indices, lambda image, _: cut_scored(image, preprocessing)
    )
    return ScoredPixels(np.concatenate(crops), np.array([len(each) for each in crops]))
