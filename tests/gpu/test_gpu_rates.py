"""Images per second of four networks: pixels in memory, two pinned buffers, and with decoding."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle, islice

import numpy as np
import pytest
import torch
from gpu_cases import ARCHITECTURES, BUILT_IN, RATES, load_pixels, make_detector, make_jpegs
from test_gpu_scoring import score_double_buffered

from cifake_ray.core.models.detector import Detector
from cifake_ray.core.processing.score import predict_logit
from cifake_ray.core.training.device_limits import choose_precision

NUM_THREADS = len(os.sched_getaffinity(0))
MIN_TIMED_S = {"cuda": 5.0, "cpu": 0.2}
BATCH_SIZES = {"cuda": {BUILT_IN: 4096}, "cpu": {BUILT_IN: 256}}
HEAD = ("", "pixels", "precision", "batch", "plain", "pinned", "compiled", "with decode", "decode")


def time_batches(run: Callable[[int], int], device: str) -> float:
    """Return images per second of `run`, which scores so many batches and returns the images."""
    run(2)  # the first calls choose algorithms
    num_batches = 2
    while True:
        started_s = time.perf_counter()
        num_images = run(num_batches)
        if device == "cuda":
            torch.cuda.synchronize()
        elapsed_s = time.perf_counter() - started_s
        if elapsed_s > MIN_TIMED_S[device]:
            return num_images / elapsed_s
        num_batches *= 2


def decode_batches(
    detector: Detector, threads: ThreadPoolExecutor, batch_size: int
) -> Iterator[torch.Tensor]:
    """Yield uint8[B, S, S, 3] without end; threads decode the next ones meanwhile."""
    preprocessing = detector.preprocessing
    images = cycle(make_jpegs(preprocessing.image_size, 400))
    pending: deque[Future[torch.Tensor]] = deque()

    def decode(some: list[bytes]) -> torch.Tensor:
        return torch.from_numpy(np.stack([preprocessing.load_image(data) for data in some]))

    while True:
        while len(pending) < 2 * NUM_THREADS:
            pending.append(threads.submit(decode, list(islice(images, batch_size))))
        yield pending.popleft().result()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rates(architecture: str, device: str) -> None:
    detector = make_detector(architecture).to(device)
    precision = choose_precision(device, "auto")
    batch_size = BATCH_SIZES[device].get(architecture, 256 if device == "cuda" else 4)
    pixels = load_pixels(detector, min(batch_size, 400))
    pixels = pixels.repeat(-(-batch_size // len(pixels)), 1, 1, 1)[:batch_size]

    def score_plainly(num_batches: int) -> int:
        return sum(len(detector.find_logit(pixels.to(device)).cpu()) for _ in range(num_batches))

    def score_pinned(num_batches: int) -> int:
        return sum(map(len, score_double_buffered(detector, [pixels] * num_batches, device)))

    with ThreadPoolExecutor(NUM_THREADS) as threads, torch.inference_mode(), precision.autocast:
        decoded = decode_batches(detector, threads, batch_size)

        def score_decoded(num_batches: int) -> int:
            return sum(
                len(predict_logit(detector, batch, device))
                for batch in islice(decoded, num_batches)
            )

        def decode_only(num_batches: int) -> int:
            return sum(map(len, islice(decoded, num_batches)))

        rates = [time_batches(run, device) for run in (score_plainly, score_pinned)]
        last = [time_batches(run, device) for run in (score_decoded, decode_only)]
        if device == "cuda":
            detector.network.compile()
            rates.append(time_batches(score_plainly, device))
    cells = [f"{rate:,.0f}" for rate in rates] + ["-"] * (3 - len(rates))
    size = detector.preprocessing.image_size
    if not RATES:
        RATES.append([*HEAD[:-1], f"decode, {NUM_THREADS} threads"])
    row = [architecture, str(size), precision.name, str(batch_size), *cells]
    RATES.append([*row, *(f"{rate:,.0f}" for rate in last)])
    assert all(rate > 0 for rate in [*rates, *last])
