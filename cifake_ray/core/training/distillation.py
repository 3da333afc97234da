"""Distillation: a network learns the outputs of trained ones on the images that it sees itself.

The teacher is shown the student's own augmented pixels, mixed ones too: the "consistent teaching"
of Beyer et al. 2022, arXiv 2106.05237, who show that targets of other views teach less.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from cifake_ray.core.models.detector import Detector
from cifake_ray.core.training.device_limits import DevicePrecision


@torch.no_grad()  # not inference_mode, whose tensors no gradient may be computed with
def find_targets(
    teachers: Sequence[Detector], images: torch.Tensor, precision: DevicePrecision
) -> torch.Tensor:
    """Map uint8 or float[B, S, S, 3], 0 to 255, to float32[B]: the mean of the teachers' logits.

    Each one's is that of scoring, with its normalisation and its test-time flip, of the pixels
    resized to its side.
    """
    with precision.autocast:
        logits = [teacher.find_logit(resize_pixels(images, teacher)) for teacher in teachers]
    return torch.stack(logits).mean(dim=0)


def resize_pixels(images: torch.Tensor, detector: Detector) -> torch.Tensor:
    """Resize [B, S, S, 3] to a detector's side, bilinear and antialiased; unrounded float32."""
    size = detector.preprocessing.image_size
    if images.shape[1] == size:
        return images
    channels_first = images.float().permute(0, 3, 1, 2)
    resized = F.interpolate(channels_first, (size, size), mode="bilinear", antialias=True)
    return resized.permute(0, 2, 3, 1)


def sum_divergences(
    outputs: torch.Tensor, targets: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Return T^2 KL(teacher || student) at temperature T, summed over B images.

    `outputs` float[B, 2] are the student's, `targets` float[B] the teacher's logits of FAKE. T^2
    keeps the size of the gradient: Hinton et al. 2015, arXiv 1503.02531, section 2.
    """
    teacher = F.logsigmoid(torch.stack([-targets, targets], dim=1) / temperature)
    student = F.log_softmax(outputs.float() / temperature, dim=1)
    divergence = F.kl_div(student, teacher, reduction="sum", log_target=True)
    return temperature**2 * divergence
