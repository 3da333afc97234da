"""Compare faster precisions with float32 on validation images, for a bundle."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch

from cifake_ray.core.evaluation.calibration import Calibration, Floats, Ints, compute_p_fake
from cifake_ray.core.evaluation.precision_check import MIN_IMAGES, PrecisionCheck
from cifake_ray.core.models.detector import Detector
from cifake_ray.core.models.precision import (
    find_probe_logits,
    find_ranges,
    has_int8,
    use_precision,
)
from cifake_ray.core.training.device_limits import (
    MAX_EVAL_BATCH,
    choose_batch_size,
    choose_precision,
    count_macs,
)
from cifake_ray.core.training.validation import ScoredPixels
from cifake_ray.errors import UsageError

MAX_IMAGES = 8192
MAX_MACS = 2e12  # for all images that are checked: a minute of two cores
RANGE_IMAGES = 1024
TIMED_RUNS = 3


def check_precisions(
    detector: Detector,
    calibration: Calibration,
    logit: Floats,
    label: Ints,
    read: Callable[[np.ndarray], ScoredPixels],
) -> dict[str, PrecisionCheck]:
    """Compare int8, and bf16 where this CPU is fast at it, with the validation logits in float32.

    `logit` float32[N], `label` int[N]; `read` maps int64[K] positions to what is scored of them.
    What is no faster here is left out; so is all with fewer than MIN_IMAGES images, or if so many
    would take minutes.
    """
    num_crops = detector.preprocessing.num_crops or 1
    macs = num_crops * count_macs(detector.network, detector.preprocessing.image_size)
    num_images = min(len(label), MAX_IMAGES, int(MAX_MACS / max(macs, 1)))
    if num_images < MIN_IMAGES:
        return {}
    chosen = np.linspace(0, len(label) - 1, num_images).astype(np.int64)
    batch_size = choose_batch_size(macs, "cpu", MAX_EVAL_BATCH)
    per_range = max(batch_size, RANGE_IMAGES // num_crops)
    some = torch.from_numpy(read(chosen[:: -(-num_images // per_range)]).pixels)
    exact = copy.deepcopy(detector).to("cpu").eval()
    exact_s = _time_batch(use_precision(copy.deepcopy(exact), "float32"), some[:batch_size])
    checks = {}
    for precision in _list_precisions():
        ranges: dict[str, list[float]] = {}
        try:
            if precision == "int8":
                ranges = find_ranges(exact, some, batch_size)
            fast = use_precision(copy.deepcopy(exact), precision, ranges=ranges)
        except UsageError:  # the network cannot be traced
            continue
        speedup = exact_s / _time_batch(fast, some[:batch_size])
        if speedup > 1:
            fast_logit = np.concatenate(
                [_score(fast, read(part)) for part in _split(chosen, batch_size)]
            )
            found = _compare(logit[chosen], fast_logit, label[chosen], calibration)
            checks[precision] = PrecisionCheck(
                images=num_images,
                **found,
                speedup=round(speedup, 2),
                probe=find_probe_logits(fast),
                ranges=ranges,
            )
    return checks


def _list_precisions() -> list[str]:
    fast = ["int8"] if has_int8() else []
    return [*fast, "bf16"] if choose_precision("cpu", "auto").name == "bf16" else fast


def _split(positions: np.ndarray, size: int) -> list[np.ndarray]:
    return np.split(positions, range(size, len(positions), size))


@torch.inference_mode()
def _score(detector: Detector, scored: ScoredPixels) -> np.ndarray:
    logit: np.ndarray = scored.find_logit(detector).numpy()
    return logit


@torch.inference_mode()
def _time_batch(detector: Detector, images: torch.Tensor) -> float:
    """Return the seconds of a batch: the median of a few, after one that does not count."""
    times = []
    for _ in range(1 + TIMED_RUNS):
        started_s = time.perf_counter()
        detector.find_logit(images)
        times.append(time.perf_counter() - started_s)
    return median(times[1:])


def _compare(
    exact: Floats, fast: Floats, label: Ints, calibration: Calibration
) -> dict[str, float]:
    """Return what the precision changes, as `PrecisionCheck` names it."""
    from sklearn.metrics import roc_auc_score

    if not np.isfinite(fast).all():
        fast = np.nan_to_num(fast)  # such a check is not harmless
    before, after = (compute_p_fake(logit, calibration.temperature) for logit in (exact, fast))
    verdicts = before >= calibration.threshold, after >= calibration.threshold
    right = [float((verdict == label).mean()) for verdict in verdicts]
    auroc = [float(roc_auc_score(label, logit)) for logit in (exact, fast)]
    return {
        "flips": float((verdicts[0] != verdicts[1]).mean()),
        "accuracy_loss": right[0] - right[1],
        "auroc_loss": auroc[0] - auroc[1],
        "max_p_fake_difference": float(np.abs(before - after).max()),
    }
