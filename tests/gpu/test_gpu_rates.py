"""Images per second of four networks: by precision, from two pinned buffers, with decoding.

Decoding is done in a thread for each core. The columns behind the precisions are in fp16.
"""

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
from cifake_ray.core.models.precision import use_precision
from cifake_ray.core.processing.score import predict_logit

NUM_THREADS = len(os.sched_getaffinity(0))
MIN_TIMED_S = {"cuda": 1.0, "cpu": 0.2}
BATCH_SIZES = {"cuda": {BUILT_IN: 4096}, "cpu": {BUILT_IN: 256}}
PRECISIONS = {"cuda": ("float32", "tf32", "bf16", "fp16"), "cpu": ("bf16", "float32")}
COLUMNS = (*PRECISIONS["cuda"], "buffered", "compiled", "with decode", "decode")


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


@pytest.mark.usefixtures("exact_float32")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rates(architecture: str, device: str) -> None:
    detector = make_detector(architecture)
    batch_size = BATCH_SIZES[device].get(architecture, 256 if device == "cuda" else 4)
    pixels = load_pixels(detector, min(batch_size, 400))
    pixels = pixels.repeat(-(-batch_size // len(pixels)), 1, 1, 1)[:batch_size]

    def score(num_batches: int) -> int:
        return sum(len(predict_logit(detector, pixels, device)) for _ in range(num_batches))

    def score_buffered(num_batches: int) -> int:
        return sum(map(len, score_double_buffered(detector, [pixels] * num_batches, device)))

    rates: dict[str, float] = {}
    for precision in PRECISIONS[device]:  # the last one is that of all other columns
        detector = use_precision(make_detector(architecture), precision, device)
        rates[precision] = time_batches(score, device)
    with ThreadPoolExecutor(NUM_THREADS) as threads, torch.inference_mode():
        decoded = decode_batches(detector, threads, batch_size)

        def score_decoded(num_batches: int) -> int:
            some = islice(decoded, num_batches)
            return sum(len(predict_logit(detector, batch, device)) for batch in some)

        rates["buffered"] = time_batches(score_buffered, device)
        rates["with decode"] = time_batches(score_decoded, device)
        rates["decode"] = time_batches(lambda n: sum(map(len, islice(decoded, n))), device)
        if device == "cuda":
            detector.network.compile()
            rates["compiled"] = time_batches(score, device)
    if not RATES:
        RATES.append(["", "pixels", "batch", *COLUMNS])
    cells = [f"{rates[name]:,.0f}" if name in rates else "-" for name in COLUMNS]
    RATES.append([architecture, str(detector.preprocessing.image_size), str(batch_size), *cells])
    assert min(rates.values()) > 0
