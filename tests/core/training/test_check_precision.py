"""The check of faster precisions: what it measures, and when it measures nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cifake_ray.core.evaluation.calibration import Calibration, compute_p_fake
from cifake_ray.core.evaluation.precision_check import MIN_IMAGES, PrecisionCheck
from cifake_ray.core.models.detector import Detector, build_detector
from cifake_ray.core.models.precision import has_int8, use_precision
from cifake_ray.core.training import check_precision
from cifake_ray.core.training.check_precision import check_precisions
from cifake_ray.core.training.validation import ScoredPixels

CALIBRATION = Calibration(
    temperature=0.5, threshold=0.5, threshold_fpr_1=0.9, threshold_fpr_01=0.99
)
needs_int8 = pytest.mark.skipif(not has_int8(), reason="torch has no int8 for this processor")


@pytest.fixture(scope="module")
def detector() -> Detector:
    torch.manual_seed(0)
    return build_detector("small_cnn_w16_d1").eval()


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (MIN_IMAGES, 32, 32, 3), dtype=np.uint8)


def score(detector: Detector, images: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        logit: np.ndarray = detector.find_logit(torch.from_numpy(images)).numpy()
    return logit


def check(
    detector: Detector, images: np.ndarray, label: np.ndarray, speedup: float = 2.0
) -> dict[str, PrecisionCheck]:
    times = iter([speedup, 1.0, 1.0])  # of float32, then of the others
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check_precision, "_time_batch", lambda *_: next(times))
        logit = score(detector, images)
        return check_precisions(
            detector, CALIBRATION, logit, label, lambda at: ScoredPixels(images[at])
        )


@needs_int8
def test_it_measures_what_int8_changes(detector: Detector, images: np.ndarray) -> None:
    logit = score(detector, images)
    label = (logit > np.median(logit)).astype(np.int64)
    found = check(detector, images, label)["int8"]
    fast = build_detector("small_cnn_w16_d1").eval()
    fast.network.load_state_dict(detector.network.state_dict())
    fast = use_precision(fast, "int8", ranges=found.ranges)
    exact, after = (compute_p_fake(each, 0.5) for each in (logit, score(fast, images)))
    assert found.images == MIN_IMAGES
    assert found.speedup == 2.0
    assert found.max_p_fake_difference == pytest.approx(np.abs(exact - after).max(), abs=1e-6)
    assert found.flips == pytest.approx(np.mean((exact >= 0.5) != (after >= 0.5)))
    right = [np.mean((p >= 0.5) == label) for p in (exact, after)]
    assert found.accuracy_loss == pytest.approx(right[0] - right[1])
    assert 0 < found.max_p_fake_difference < 0.1


@needs_int8
def test_what_is_no_faster_is_left_out(detector: Detector, images: np.ndarray) -> None:
    label = np.arange(len(images)) % 2
    assert "int8" not in check(detector, images, label, speedup=0.9)


def test_too_few_images_are_no_check(detector: Detector, images: np.ndarray) -> None:
    few = images[: MIN_IMAGES - 1]
    assert check(detector, few, np.arange(len(few)) % 2) == {}


def test_a_network_that_would_take_minutes_is_not_checked(
    detector: Detector, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_precision, "count_macs", lambda *_: 10**11)
    assert check(detector, images, np.arange(len(images)) % 2) == {}
