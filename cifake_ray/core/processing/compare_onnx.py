"""Compare an ONNX model with the detector it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cifake_ray.core.evaluation.calibration import compute_p_fake
from cifake_ray.core.imaging.crops import pool_logits
from cifake_ray.core.models.detector import Detector
from cifake_ray.core.models.onnx_model import RunModel
from cifake_ray.core.models.precision import make_probe
from cifake_ray.core.processing.score import predict_logit
from cifake_ray.errors import CifakeError

# Rounding alone, in another order of sums, stays far below: 1e-6 to 1e-4 in the networks measured.
MAX_LOGIT_DIFFERENCE = 1e-3  # of a logit up to 1; of a larger one this share
MAX_P_FAKE_DIFFERENCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class OnnxComparison:
    """How far an ONNX model is from its detector, on images made up for that."""

    images: int
    largest_logit_difference: float
    largest_p_fake_difference: float
    verdicts_changed: int  # p_fake on the other side of the threshold


def compare_onnx(
    run_model: RunModel,
    detector: Detector,
    *,
    temperature: float,
    threshold: float,
    batch_sizes: Sequence[int],
) -> OnnxComparison:
    """Run model and detector on batches of these sizes and return the largest differences.

    A detector of crops is compared on the mean over as many as an image has. CifakeError when a
    difference is above its bound, or a logit is not finite.
    """
    images = make_probe(detector.preprocessing.image_size, sum(batch_sizes)).numpy()
    batches = np.split(images, np.cumsum(batch_sizes)[:-1])
    expected = np.concatenate(
        [predict_logit(detector, torch.from_numpy(b), "cpu") for b in batches]
    )
    logit, p_fake = (
        np.concatenate(outputs) for outputs in zip(*map(run_model, batches), strict=True)
    )
    if most := detector.preprocessing.num_crops:
        counts = np.diff([*range(0, len(images), most), len(images)])
        expected, logit = (pool_logits(each, counts)[0] for each in (expected, logit))
        p_fake = compute_p_fake(logit, temperature)
    expected_p_fake = compute_p_fake(expected, temperature)
    logit_difference = np.abs(logit - expected)
    found = OnnxComparison(
        images=len(logit),
        largest_logit_difference=float(logit_difference.max()),
        largest_p_fake_difference=float(np.abs(p_fake - expected_p_fake).max()),
        verdicts_changed=int(np.sum((p_fake >= threshold) != (expected_p_fake >= threshold))),
    )
    relative = float((logit_difference / np.maximum(1, np.abs(expected))).max())
    if not (
        relative <= MAX_LOGIT_DIFFERENCE
        and found.largest_p_fake_difference <= MAX_P_FAKE_DIFFERENCE
    ):
        raise CifakeError(
            f"{detector.architecture}: the ONNX model differs from the detector: on"
            f" {found.images} images the logit by up to {relative:.2g} (of a logit above 1, that"
            f" share of it) and p_fake by up to {found.largest_p_fake_difference:.2g}, where"
            f" {MAX_LOGIT_DIFFERENCE:g} and {MAX_P_FAKE_DIFFERENCE:g} are allowed; choose a bundle"
            " of another architecture"
        )
    return found
