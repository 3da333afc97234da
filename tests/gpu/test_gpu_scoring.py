"""Logits of a GPU in each precision beside those of the CPU in float32."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from gpu_cases import ARCHITECTURES, BUILT_IN, load_pixels, make_detector

from cifake_ray.core.models.detector import Detector
from cifake_ray.core.models.precision import use_precision
from cifake_ray.core.processing.score import predict_logit
from cifake_ray.core.training.device_limits import choose_precision

# Largest difference from the CPU's logit, as a share of the largest logit: mantissas of 24, 11, 11
# and 8 bits, through some fifty layers.
BOUNDS = {"float32": 1e-3, "tf32": 2e-2, "fp16": 2e-2, "bf16": 1.5e-1}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def case(request: pytest.FixtureRequest) -> tuple[Detector, torch.Tensor, torch.Tensor]:
    """A detector, pixels, and the CPU's logits in float32."""
    detector = make_detector(request.param)
    pixels = load_pixels(detector, 400 if request.param == BUILT_IN else 8)
    return detector, pixels, torch.from_numpy(predict_logit(detector, pixels, "cpu"))


@pytest.mark.usefixtures("exact_float32")  # what one test sets, it does not leave to the next
@pytest.mark.parametrize("precision", BOUNDS)
def test_logits_are_those_of_the_cpu(
    case: tuple[Detector, torch.Tensor, torch.Tensor], precision: str, device: str
) -> None:
    detector, pixels, expected = case
    if device == "cpu" and precision in ("tf32", "fp16"):
        pytest.skip(f"{precision} is for GPUs")
    detector = use_precision(copy.deepcopy(detector), precision, device)
    found = torch.from_numpy(predict_logit(detector, pixels, device))
    gap = float((found - expected).abs().max())
    flips = int(((found >= 0) != (expected >= 0)).sum())
    scale = float(expected.abs().max())
    print(f"{detector.architecture}, {precision}: gap {gap:.2g} of {scale:.3g}, {flips} flips")
    assert gap < BOUNDS[precision] * scale
    if len(pixels) == 400:
        assert flips <= 4
    if precision != "float32":
        assert gap > 0, "it was float32"


def test_auto_takes_what_the_device_has(device: str) -> None:
    """bf16 of a GPU that only emulates it is slower than float32."""
    name = choose_precision(device, "auto").name
    if device == "cuda":
        assert name == ("bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16")
    else:
        assert name in ("bf16", "float32")


def score_double_buffered(
    detector: Detector, batches: Sequence[torch.Tensor], device: str
) -> Iterator[torch.Tensor]:
    """Copy each batch to one of two pinned buffers and on, while the one before is scored."""
    is_cuda = device == "cuda"
    copies: Any = torch.cuda.Stream() if is_cuda else None
    buffers = [torch.empty_like(batches[0], pin_memory=is_cuda) for _ in range(2)]
    copied: list[Any] = [None, None]
    logit = None
    for number, batch in enumerate(batches):
        place = number % 2
        if copied[place] is not None:
            copied[place].synchronize()  # the buffer is free
        pixels = buffers[place][: len(batch)].copy_(batch)
        with torch.cuda.stream(copies):
            there = pixels.to(device, non_blocking=True)
            copied[place] = copies.record_event() if is_cuda else None
        if is_cuda:
            torch.cuda.current_stream().wait_event(copied[place])
            there.record_stream(torch.cuda.current_stream())
        before, logit = logit, detector.find_logit(there)
        if before is not None:
            yield before.cpu()
    if logit is not None:
        yield logit.cpu()


@pytest.mark.usefixtures("exact_float32")
def test_two_pinned_buffers_change_no_logit(device: str) -> None:
    """A buffer that was written too early would give a batch the pixels of another."""
    detector = make_detector(BUILT_IN).to(device)
    batches = load_pixels(detector, 400).repeat(3, 1, 1, 1).split(100)
    with torch.inference_mode():
        found = torch.cat(list(score_double_buffered(detector, batches, device)))
    expected = [torch.from_numpy(predict_logit(detector, batch, device)) for batch in batches]
    assert torch.equal(found, torch.cat(expected))


@pytest.mark.usefixtures("exact_float32")
def test_a_compiled_network_gives_the_same_logits(device: str) -> None:
    if shutil.which("cc") is None and shutil.which("gcc") is None:
        pytest.skip("torch.compile needs a C compiler")
    detector = make_detector(BUILT_IN).to(device)
    pixels = load_pixels(detector, 400)
    expected = predict_logit(detector, pixels, device)
    detector.network.compile()
    found = predict_logit(detector, pixels, device)
    assert abs(found - expected).max() < 1e-3 * abs(expected).max()
