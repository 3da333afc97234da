"""Count what an architecture costs: parameters, multiplications, images per second.

Costs are counted on torch's meta device, where no number is computed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from cifake_ray.config import POLICIES, TrainConfig
from cifake_ray.core.models.detector import (
    OWN_ARCHITECTURES,
    build_detector,
    find_own_size,
    list_architectures,
)
from cifake_ray.core.training.device_limits import choose_batch_size, choose_precision, count_macs
from cifake_ray.core.training.optimizer import build_for_training
from cifake_ray.core.training.trainer import Trainer
from cifake_ray.errors import UsageError

# Ours, and those of timm that detectors of generated images are often made of.
LISTED_MODELS = (
    *OWN_ARCHITECTURES,
    "resnet18",
    "resnet50",
    "vgg16",
    "efficientnet_b0",
    "tf_efficientnetv2_b0",
    "tf_efficientnet_lite0",
    "mobilenetv3_small_100",
    "vit_tiny_patch16_224",
    "convnext_atto",
)
MAX_COUNTED = 50  # networks in a list that are built and counted, about half a second each

MAX_BATCH = 128  # train's own default
MIN_TIMED_BATCHES = 3
MIN_TIMED_S = 1.0


@dataclass(frozen=True)
class Cost:
    """The cost of one image."""

    image_size: int  # pixels, each side
    num_parameters: int
    macs: int  # multiply-accumulates of convolutions, matrix products and attention


@dataclass(frozen=True)
class Speed:
    """Images per second here, pixels in memory: no decoding, no augmentation."""

    train_images_per_s: float  # forward, backward and optimiser step
    score_images_per_s: float
    batch_size: int
    device: str
    num_threads: int
    dtype: str


def count_cost(architecture: str, image_size: int | None = None) -> Cost:
    """Count the cost without drawing a weight. UsageError as `build_detector`."""
    with torch.device("meta"):
        detector = build_detector(architecture, image_size=image_size)
    size = detector.preprocessing.image_size
    return Cost(size, detector.num_parameters, count_macs(detector.network, size))


@dataclass
class _BlankImages:
    """Black images to time a step on: the trainer's `Images`."""

    labels: np.ndarray
    image_size: int

    def order_epoch(self, rng: np.random.Generator) -> np.ndarray:
        return np.arange(len(self.labels))

    def read(self, indices: np.ndarray) -> np.ndarray:
        return np.zeros((len(indices), self.image_size, self.image_size, 3), np.uint8)


def measure_speed(architecture: str, image_size: int | None = None) -> Speed:
    """Time a few batches of training and of scoring, after one of each to warm up.

    On the GPU if there is one, with the threads that torch has, in the precision and with the
    optimiser of `train`'s defaults.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = choose_precision(device, "auto")
    cost = count_cost(architecture, image_size)
    batch_size = choose_batch_size(cost.macs, device, MAX_BATCH)
    config = TrainConfig(
        shards="-",
        run="-",
        model=architecture,
        image_size=image_size,
        batch_size=batch_size,
        schedule="constant",  # it has no last step
    )
    detector = build_for_training(config).to(device)
    images = _BlankImages(np.arange(batch_size) % 2, cost.image_size)
    trainer = Trainer(detector, detector, config, images, images, precision, POLICIES["none"])
    batch = next(trainer.batches.draw(epoch=0, start=0))

    @torch.inference_mode()
    def score_batch() -> None:
        detector.find_logit(batch.images)

    train_s = _time_batch(lambda: trainer.train_step(batch), device)
    detector.eval()
    score_s = _time_batch(score_batch, device)
    return Speed(
        train_images_per_s=round(batch_size / train_s, 1),
        score_images_per_s=round(batch_size / score_s, 1),
        batch_size=batch_size,
        device=device,
        num_threads=torch.get_num_threads(),
        dtype=str(precision.dtype).removeprefix("torch."),
    )


def _time_batch(run_batch: Callable[[], object], device: str) -> float:
    """Return the mean seconds of a few batches, the first one not counted."""

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    run_batch()
    wait()
    started_s = time.perf_counter()
    num_batches = 0
    while num_batches < MIN_TIMED_BATCHES or time.perf_counter() - started_s < MIN_TIMED_S:
        run_batch()
        wait()
        num_batches += 1
    return (time.perf_counter() - started_s) / num_batches


def list_models(
    pattern: str | None,
    results: Sequence[Mapping[str, Any]] = (),
    *,
    image_size: int | None = None,
    measure: bool = False,
    log: Callable[[str], None] = lambda message: None,
) -> list[dict[str, Any]]:
    """Return a row for each architecture: of LISTED_MODELS, or of all that match a glob.

    `results` are rows of the benchmark, each added to its architecture. More than MAX_COUNTED are
    listed with their sizes only, `num_parameters` and `macs` being None; UsageError when they were
    to be measured, or when nothing matches.
    """
    about = list_architectures("*" if pattern is None else pattern)
    names = list(LISTED_MODELS) if pattern is None else list(about)
    is_counted = len(names) <= MAX_COUNTED
    if (measure or image_size is not None) and not is_counted:
        flag = "--measure" if measure else "--image-size"
        raise UsageError(
            f"{flag}: {len(names):,} architectures match, {MAX_COUNTED} are the most that are"
            " built; give a narrower PATTERN"
        )
    rows = []
    for number, name in enumerate(names, start=1):
        row: dict[str, Any] = {
            "model": name,
            "about": about[name],
            "image_size": image_size or find_own_size(name),
            "num_parameters": None,
            "macs": None,
            "speed": None,
            "problem": None,
            "results": [dict(result) for result in results if result["model"] == name],
        }
        rows.append(row)
        if not is_counted:
            continue
        log(f"models: counting {name}, {number} of {len(names)} ...")
        try:
            row.update(asdict(count_cost(name, image_size)))
            if measure:
                log(f"models: measuring {name}, {number} of {len(names)}")
                row["speed"] = asdict(measure_speed(name, image_size))
        except (ValueError, RuntimeError) as error:
            row["problem"] = str(error).splitlines()[0]
    return rows
