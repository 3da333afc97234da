"""Detectors and images of the tests, and the rates that they found."""

from __future__ import annotations

import io
import json
from functools import cache
from importlib.resources import files

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load

from cifake_ray.core.imaging.preprocessing import Preprocessing
from cifake_ray.core.models.detector import Detector, build_detector
from cifake_ray.core.sample_images import PHOTOGRAPHS, find_photograph, generate_images

BUILT_IN = "built-in"
ARCHITECTURES = (BUILT_IN, "resnet18", "efficientnet_b0", "vit_small_patch16_224")

RATES: list[list[str]] = []  # rows of the table at the end


def make_detector(architecture: str) -> Detector:
    """The detector of the package, or one with random weights."""
    if architecture != BUILT_IN:
        torch.manual_seed(0)
        return build_detector(architecture).eval()
    folder = files("cifake_ray") / "bundles" / "cifake"
    config = json.loads((folder / "config.json").read_text())
    detector = build_detector(config["architecture"])
    detector.set_preprocessing(Preprocessing.from_dict(config["cifake_ray"]["preprocessing"]))
    detector.network.load_state_dict(load((folder / "model.safetensors").read_bytes()))
    return detector.eval()


@cache
def make_jpegs(image_size: int, num_images: int) -> list[bytes]:
    """Small images of the sample, or for larger detectors crops of 500 x 375 of its photographs."""
    if image_size == 32:
        return [image.data for image in generate_images(num_images=num_images)]
    names = [name for names in PHOTOGRAPHS.values() for name in names]
    photographs = [Image.open(find_photograph(name)).convert("RGB") for name in names]
    jpegs = []
    for number in range(num_images):
        left, top = np.random.default_rng(number).random(2) * 100
        box = (left, top, left + 300, top + 200)
        data = io.BytesIO()
        photographs[number % len(names)].resize((500, 375), box=box).save(data, "JPEG", quality=90)
        jpegs.append(data.getvalue())
    return jpegs


def load_pixels(detector: Detector, num_images: int) -> torch.Tensor:
    """uint8[N, S, S, 3]."""
    preprocessing = detector.preprocessing
    jpegs = make_jpegs(preprocessing.image_size, num_images)
    return torch.from_numpy(np.stack([preprocessing.load_image(data) for data in jpegs]))
