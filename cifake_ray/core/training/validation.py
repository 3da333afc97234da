"""Score validation images, of each all of it or several crops; each rank computes its share."""

from __future__ import annotations

from typing import NamedTuple, cast

import numpy as np
import torch
import torch.distributed as dist

from cifake_ray.core.imaging.crops import pool_logits
from cifake_ray.core.imaging.preprocessing import Preprocessing
from cifake_ray.core.models.detector import Detector
from cifake_ray.core.models.precision import exact_products
from cifake_ray.core.training.batches import CropImages, Images, find_streamed, to_device
from cifake_ray.core.training.lanes import deal_groups
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


@torch.inference_mode()
@exact_products()
def predict_shared(
    detector: Detector, images: Images, batch_size: int, device: str, rank: int, num_ranks: int
) -> torch.Tensor:
    """Return float32[N] on the CPU, the same on every rank: each computes its share, once.

    In float32, as scoring does: the threshold and the temperature are for its numbers.
    """
    detector.eval()
    if num_ranks > 1:  # batch-norm statistics are each rank's own until its next step
        for buffer in detector.network.buffers():
            dist.broadcast(buffer, 0)
    logit = torch.zeros(len(images.labels), device=device)
    share = _choose_share(images, rank, num_ranks)
    for start in range(0, len(share), batch_size):
        indices = share[start : start + batch_size]
        scored = read_scored(images, detector.preprocessing, indices)
        logit[torch.from_numpy(indices)] = scored.find_logit(detector, device).to(logit.device)
    if num_ranks > 1:
        dist.all_reduce(logit)  # every image is non-zero on one rank only
    return logit.cpu()


def _choose_share(images: Images, rank: int, num_ranks: int) -> np.ndarray:
    """Return the images that a rank validates; streamed ones by whole row groups."""
    if (streamed := find_streamed(images)) is None:
        return np.arange(rank, len(images.labels), num_ranks)
    starts = deal_groups(streamed.group, num_ranks)
    share = np.arange(starts[rank], starts[rank + 1])
    streamed.expect(share)
    return share
