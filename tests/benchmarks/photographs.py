"""JPEGs of an ordinary size, cut out of the photographs of `cifake-ray sample`."""

from __future__ import annotations

import io
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from cifake_ray.core.sample_images import PHOTOGRAPHS, find_photograph

WIDTH, HEIGHT = 500, 375  # pixels: the most usual size in ImageNet


def write_photographs(folder: Path, num_images: int) -> Path:
    """Write different crops, half REAL and half FAKE, four fifths of them for training."""
    for place in ("train", "test"):
        for label in ("REAL", "FAKE"):
            (folder / place / label).mkdir(parents=True)
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as processes:
        list(processes.map(partial(_write_crop, folder), range(num_images), chunksize=50))
    return folder


def _write_crop(folder: Path, number: int) -> None:
    names = [name for names in PHOTOGRAPHS.values() for name in names]
    rng = np.random.default_rng(number)
    with Image.open(find_photograph(names[rng.integers(len(names))])) as opened:
        image = opened.convert("RGB")
    zoom = rng.uniform(0.4, 1.0) * min(image.width / WIDTH, image.height / HEIGHT)
    width, height = WIDTH * zoom, HEIGHT * zoom
    left, top = rng.random(2) * (image.width - width, image.height - height)
    crop = image.resize(
        (WIDTH, HEIGHT), Image.Resampling.BICUBIC, (left, top, left + width, top + height)
    )
    data = io.BytesIO()
    crop.save(data, "JPEG", quality=90)
    place = folder / ("test" if number % 10 > 7 else "train") / ("REAL", "FAKE")[number % 2]
    (place / f"{number:06d}.jpg").write_bytes(data.getvalue())
