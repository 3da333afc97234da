"""Precisions: what changes in the network, what is refused, what a check compares."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from cifake_ray.core.evaluation.precision_check import PrecisionCheck
from cifake_ray.core.models import precision as precisions
from cifake_ray.core.models.detector import Detector, build_detector
from cifake_ray.core.models.precision import (
    INPUT_OBSERVER,
    compare_probe,
    exact_products,
    find_probe_logits,
    find_ranges,
    fold_norms,
    has_int8,
    make_probe,
    use_precision,
)
from cifake_ray.errors import ResourceError, UsageError
from cifake_ray.stages.resources import read_cpu_flags

needs_int8 = pytest.mark.skipif(
    not (has_int8() and read_cpu_flags() & {"avx512_vnni", "avx_vnni"}),
    reason="without VNNI torch's sums of 8-bit products overflow, or there is no int8 at all",
)
CHECK = PrecisionCheck(
    images=1000,
    flips=0.0,
    accuracy_loss=0.0,
    auroc_loss=0.0,
    max_p_fake_difference=0.05,
    speedup=2.0,
    probe=[],
)


def make_detector(name: str = "small_cnn_w16_d1") -> Detector:
    """Return a detector whose batch norms and logits are those of a trained one in size."""
    torch.manual_seed(0)
    detector = build_detector(name).eval()
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.running_mean, module.bias):
                assert values is not None
                nn.init.normal_(values, std=0.3)
            assert module.running_var is not None
            nn.init.uniform_(module.running_var, 0.2, 0.6)
    return detector


def make_images(number: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (number, 32, 32, 3), dtype=torch.uint8, generator=generator)


def find_logits(detector: Detector, images: torch.Tensor) -> np.ndarray:
    with torch.inference_mode():
        logit: np.ndarray = detector.find_logit(images).numpy()
    return logit


def find_kinds(detector: Detector) -> set[str]:
    return {type(module).__name__ for module in detector.network.modules()}


@pytest.mark.parametrize("name", ["small_cnn_w16_d1", "small_lite0_s2", "small_lite0_s2_residual"])
def test_folded_norms_are_gone_and_change_the_last_bits_only(name: str) -> None:
    detector, images = make_detector(name), make_images()
    before = find_logits(detector, images)
    detector.network = fold_norms(detector.network)
    assert not {"BatchNorm2d", "BatchNormAct2d"} & find_kinds(detector)
    np.testing.assert_allclose(find_logits(detector, images), before, rtol=1e-4, atol=1e-5)


def test_a_norm_that_follows_no_convolution_stays() -> None:
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3))
    kinds = [type(module) for module in fold_norms(network.eval())]
    assert kinds == [nn.BatchNorm2d, nn.Conv2d, nn.ReLU, nn.BatchNorm2d]


@needs_int8
@pytest.mark.parametrize("name", ["small_cnn_w16_d1", "cnn", "small_resnet18"])
def test_int8_computes_nearly_the_same_with_quantised_convolutions(name: str) -> None:
    detector, images = make_detector(name), make_images()
    before = find_logits(detector, images)
    ranges = find_ranges(detector, images, 32)
    np.testing.assert_array_equal(find_logits(detector, images), before)  # it was only looked at
    detector = use_precision(detector, "int8", ranges=ranges)
    modules = {type(module).__module__ for module in detector.network.modules()}
    assert any("quantized" in module for module in modules)
    after = find_logits(detector, images)
    assert 0 < np.abs(after - before).max() < 0.25 * before.std() + 0.02
    assert len(set(after.tolist())) > len(images) // 2  # its outputs are not 8-bit numbers


@needs_int8
@pytest.mark.parametrize("name", ["small_lite0_s2", "small_lite0_s2_residual"])
def test_int8_of_a_small_lite_saturates_at_6_behind_its_convolutions(name: str) -> None:
    detector, images = make_detector(name), make_images()
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.bias.data += 2.0  # so that many values would be above 6
    before = find_logits(detector, images)
    ranges = find_ranges(detector, images, 32)
    quantised = use_precision(detector, "int8", ranges=ranges)
    kinds = find_kinds(quantised)
    assert "ConvReLU2d" in kinds
    assert not {"ReLU6", "BatchNormAct2d"} & kinds
    after = find_logits(quantised, images)
    assert np.abs(after - before).max() < 0.05 * np.abs(before).max()
    exact = [each.in_channels for each in quantised.network.modules() if type(each) is nn.Conv2d]
    assert exact == ([6] if name.endswith("residual") else [])


@needs_int8
@pytest.mark.parametrize("deviation", [0.5, 0.229])
def test_the_int8_scores_of_an_image_do_not_depend_on_its_batch(deviation: float) -> None:
    detector, images = make_detector(), make_images()
    preprocessing = detector.preprocessing
    std = (deviation, preprocessing.std[1], preprocessing.std[2])
    detector.set_preprocessing(replace(preprocessing, std=std))
    detector = use_precision(detector, "int8", ranges=find_ranges(detector, images, 32))
    together = find_logits(detector, images)
    for size in (1, 7, 33):
        parts = [find_logits(detector, part) for part in images.split(size)]
        np.testing.assert_allclose(np.concatenate(parts), together, atol=1e-5)


@needs_int8
@pytest.mark.parametrize("deviation", [0.5, 0.229])
def test_no_pixel_lies_half_way_between_two_steps_of_int8(deviation: float) -> None:
    detector = make_detector()
    std = (deviation, *detector.preprocessing.std[1:])
    detector.set_preprocessing(replace(detector.preprocessing, std=std))
    low, high = find_ranges(detector, make_images(), 32)[INPUT_OBSERVER]
    pixels = np.arange(256)[:, None] / 255.0
    normalised = (pixels - np.array(detector.preprocessing.mean)) / np.array(std)
    assert low <= normalised.min() + 1e-6
    assert normalised.max() - 1e-6 <= high
    places = normalised / ((high - low) / 255) % 1
    assert np.abs(places - 0.5).min() > 5e-4


@needs_int8
@pytest.mark.parametrize("change", ["none", "missing", "another"])
def test_int8_refuses_ranges_of_another_network(change: str) -> None:
    ranges = find_ranges(make_detector(), make_images(), 32)
    if change == "another":
        ranges = find_ranges(make_detector("cnn"), make_images(), 32)
    elif change == "missing":
        ranges.popitem()
    with pytest.raises(UsageError, match=r"cannot quantise small_cnn_w16_d1 .*use float32"):
        use_precision(make_detector(), "int8", ranges={} if change == "none" else ranges)


class Branching(nn.Module):
    """A network that looks at its input, which cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pooled = images.mean((2, 3))
        return self.head(pooled if pooled.sum() > 0 else -pooled)


@needs_int8
def test_int8_refuses_a_network_that_cannot_be_traced() -> None:
    plain = make_detector()
    detector = Detector("branching", Branching(), plain.preprocessing).eval()
    with pytest.raises(UsageError, match=r"cannot quantise branching \(.*control flow.*float32"):
        find_ranges(detector, make_images(), 32)


def test_bf16_computes_nearly_the_same() -> None:
    detector, images = make_detector(), make_images()
    before = find_logits(detector, images)
    detector = use_precision(detector, "bf16")
    assert next(detector.network.parameters()).dtype is torch.bfloat16
    after = find_logits(detector, images)
    assert after.dtype == np.float32
    assert 0 < np.abs(after - before).max() < 0.1 * before.std() + 0.05


def test_products_are_exact_only_where_that_is_asked() -> None:
    kinds = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [kind.fp32_precision for kind in kinds]
    with exact_products():
        assert [kind.fp32_precision for kind in kinds] == ["ieee", "ieee"]
    assert [kind.fp32_precision for kind in kinds] == before


@pytest.mark.parametrize(
    ("precision", "device"), [("tf32", "cpu"), ("fp16", "cpu"), ("int8", "cuda")]
)
def test_a_precision_of_another_device_is_refused(precision: str, device: str) -> None:
    with pytest.raises(UsageError, match=rf"--precision {precision} (needs a GPU|is for CPUs)"):
        use_precision(make_detector(), precision, device)


def test_the_probe_is_the_same_everywhere_and_rises_in_contrast() -> None:
    probe = make_probe(8).numpy()
    assert probe.dtype == np.uint8
    assert probe.shape == (precisions.NUM_PROBES, 8, 8, 3)
    np.testing.assert_array_equal(probe, make_probe(8).numpy())
    spread = [float(image.std(axis=(0, 1)).mean()) for image in probe]
    assert spread[0] == 0
    assert all(low < high for low, high in pairwise(spread[::5]))


@pytest.mark.parametrize(
    ("difference", "is_right"), [(0.0, True), (0.1, True), (1.0, False), (float("nan"), False)]
)
def test_a_processor_that_scores_the_probe_differently_is_refused(
    difference: float, is_right: bool
) -> None:
    detector = make_detector()
    probe = [logit + difference for logit in find_probe_logits(detector)]
    check = replace(CHECK, probe=probe)
    if is_right:
        compare_probe(detector, check, 1.0, "int8")
    else:
        with pytest.raises(ResourceError, match=r"on this processor .*use --precision float32"):
            compare_probe(detector, check, 1.0, "int8")


@pytest.mark.parametrize(
    ("change", "is_harmless"),
    [
        ({}, True),
        ({"accuracy_loss": -0.01, "auroc_loss": -0.01}, True),
        ({"images": 999}, False),
        ({"accuracy_loss": 0.0006}, False),
        ({"auroc_loss": 0.0003}, False),
        ({"flips": 0.006}, False),
        ({"speedup": 1.1}, False),
    ],
)
def test_harmless_is_what_changes_next_to_nothing_and_is_faster(
    change: dict[str, float], is_harmless: bool
) -> None:
    assert replace(CHECK, **change).is_harmless is is_harmless
