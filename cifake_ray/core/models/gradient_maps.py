"""Find the pixels that move a detector's logit: integrated gradients (Sundararajan et al. 2017)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np

from cifake_ray.errors import UsageError

if TYPE_CHECKING:
    from cifake_ray.core.models.detector import Detector

NUM_STEPS = 16  # from the baseline to the image
BATCH_SIZE = 8  # of these at once: a ResNet-50 at 224 pixels takes about 1 GB with its gradients


def check_captum() -> None:
    """Raise UsageError when captum is missing."""
    if find_spec("captum") is None:
        raise UsageError('--gradient-maps needs captum: pip install "cifake-ray[explain]"')


def attribute_logits(detector: Detector, images: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """Map each uint8[S, S, 3] to float32[S, S]: what each pixel adds to the logit.

    Of crops, uint8[k, S, S, 3] to float32[k, S, S], to the logit of each. Above 0 it speaks for
    FAKE. The pixels of an image add up to its logit less that of a plain image in the mean colour
    of the training images, within the error of NUM_STEPS.
    """
    import torch
    from captum.attr import IntegratedGradients

    method = IntegratedGradients(detector.eval().find_logit)
    mean_colour = 255 * torch.tensor(detector.preprocessing.mean)

    def attribute(image: np.ndarray) -> np.ndarray:
        if image.ndim == 4:
            return np.stack([attribute(crop) for crop in image])
        found = method.attribute(
            torch.from_numpy(image)[None].float(),
            mean_colour.expand(1, *image.shape),
            n_steps=NUM_STEPS,
            internal_batch_size=BATCH_SIZE,
        )
        added: np.ndarray = found[0].sum(2).numpy().astype(np.float32)
        return added

    yield from map(attribute, images)
