"""Measure how many crops per second one core scores, by network and precision.

    python tests/benchmarks/crop_speed.py [NETWORK ...] [--size 128]

Pixels are in memory, weights fresh, one thread; the time is that of the thread, the median of
several batches. An image of a detector of crops has up to `--num-crops`.
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
from measure import format_table

from cifake_ray.config import NUM_CROPS
from cifake_ray.core.models.detector import Detector, build_detector
from cifake_ray.core.models.precision import find_ranges, make_probe, use_precision
from cifake_ray.core.training.model_cost import count_cost
from cifake_ray.errors import UsageError

NETWORKS = ("small_lite0", "small_lite0_residual", "small_lite0_s4", "small_lite1", "small_cnn")
PRECISIONS = ("float32", "bf16", "int8")
BATCH_SIZE = 24
NUM_TIMED = 3


@torch.inference_mode()
def measure_rate(detector: Detector) -> float:
    """Return crops per second of this thread."""
    crops = make_probe(detector.preprocessing.image_size, BATCH_SIZE)
    seconds = []
    for _ in range(NUM_TIMED + 1):
        started_s = time.thread_time()
        detector.find_logit(crops)
        seconds.append(time.thread_time() - started_s)
    return BATCH_SIZE / sorted(seconds[1:])[NUM_TIMED // 2]


def measure_rates(name: str, size: int) -> dict[str, float | None]:
    """Return crops per second by precision, None where the network cannot have it."""
    exact = build_detector(name, image_size=size).eval()
    rates: dict[str, float | None] = {}
    for precision in PRECISIONS:
        try:
            ranges = find_ranges(exact, make_probe(size), 16) if precision == "int8" else None
            detector = use_precision(copy.deepcopy(exact), precision, ranges=ranges)
        except UsageError:
            rates[precision] = None
        else:
            rates[precision] = measure_rate(detector)
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("networks", nargs="*", default=NETWORKS)
    parser.add_argument("--size", type=int, default=128, help="side of the crops in pixels")
    parser.add_argument("--num-crops", type=int, default=NUM_CROPS, help="of an image")
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = [["network", "parameters", "GMAC", *PRECISIONS, "images/s"]]
    for name in options.networks:
        cost, rates = count_cost(name, options.size), measure_rates(name, options.size)
        cells = ["-" if rate is None else f"{rate:.0f}" for rate in rates.values()]
        best = max(rate for rate in rates.values() if rate is not None)
        counts = [f"{cost.num_parameters:,}", f"{cost.macs / 1e9:.3f}"]
        table.append([name, *counts, *cells, f"{best / options.num_crops:.1f}"])
    print(format_table(table))


if __name__ == "__main__":
    main()
