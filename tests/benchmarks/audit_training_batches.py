"""Audit what training sees: do format, size or quality of the augmented images tell their label?

    python tests/benchmarks/audit_training_batches.py SHARDS OUT [--augment wild] [--image-size 128]

The batches of an epoch are drawn as `train --fit crops` draws them. Each image is written as the
file that its augmentation made of it last, JPEG or WebP, else as PNG, and `audit` runs on the
folder. Beside its findings stand those of the files that training reads, unchanged.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from measure import format_table
from PIL import Image

from cifake_ray.config import AuditConfig, TrainConfig
from cifake_ray.core.schema import LABEL_NAMES
from cifake_ray.core.training import augmentation
from cifake_ray.core.training.batches import Batches
from cifake_ray.core.training.optimizer import build_for_training
from cifake_ray.pipeline import run_verb
from cifake_ray.storage.datasets.training_rows import read_training_rows
from cifake_ray.storage.datasets.training_set import open_training_data
from cifake_ray.storage.presets.augmentation import read_augmentation

Encoded = dict[bytes, tuple[str, bytes]]  # what files decode to: their suffix and bytes


def record_encodings() -> Encoded:
    """Return a mapping that from now on has every file that an augmentation makes."""
    found: Encoded = {}
    encode_jpeg, reencode = simplejpeg.encode_jpeg, augmentation.reencode

    def record_jpeg(*args: Any, **options: Any) -> bytes:
        data: bytes = encode_jpeg(*args, **options)
        found[simplejpeg.decode_jpeg(data).tobytes()] = "jpg", data
        return data

    def record_webp(image: Image.Image, name: str, quality: int) -> Image.Image:
        decoded, buffer = reencode(image, name, quality), io.BytesIO()
        image.save(buffer, name, quality=quality)
        found[np.asarray(decoded).tobytes()] = name, buffer.getvalue()
        return decoded

    simplejpeg.encode_jpeg, augmentation.reencode = record_jpeg, record_webp
    return found


def write_epoch(config: TrainConfig, out: Path) -> int:
    """Write the images of an epoch as OUT/{REAL,FAKE}/NNNNNN.SUFFIX; return their number."""
    preprocessing = build_for_training(config).preprocessing
    data = open_training_data(read_training_rows(config), preprocessing, config, 1, print)
    batches = Batches(data.train, config, read_augmentation(config), "cpu", 0, 1)
    encodings, number = record_encodings(), 0
    for name in LABEL_NAMES:
        (out / name).mkdir(parents=True)
    for batch in batches.draw(0, 0):
        for pixels, label in zip(batch.images.numpy(), batch.labels.tolist(), strict=True):
            buffer = io.BytesIO()
            if pixels.tobytes() not in encodings:
                Image.fromarray(pixels).save(buffer, "PNG")
            suffix, file = encodings.get(pixels.tobytes(), ("png", buffer.getvalue()))
            (out / LABEL_NAMES[label] / f"{number:06}.{suffix}").write_bytes(file)
            number += 1
        encodings.clear()
    return number


def audit(src: str, out: Path) -> dict[str, Any]:
    run_verb(AuditConfig(src=src, out=str(out), num_workers=0), time.monotonic())
    found: dict[str, Any] = json.loads((out / "audit.json").read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards")
    parser.add_argument("out", type=Path, help="a new folder for images and audits")
    parser.add_argument("--augment", default="wild")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--train-size", type=int)
    parser.add_argument("--crops-per-image", type=int, default=1)
    parser.add_argument("--balance-sources", type=float)
    parser.add_argument("--twins")
    parser.add_argument("--twin-share", type=float)
    options = vars(parser.parse_args())
    out: Path = options.pop("out")
    config = TrainConfig(run="unused", model="small_cnn", fit="crops", batch_size=64, **options)
    print(f"{write_epoch(config, out / 'images'):,} images")
    before, after = audit(config.shards, out / "before"), audit(str(out / "images"), out / "after")
    rows = [
        [name, *(f"{leaks[name]['auroc']:.3f}" for leaks in (before["leaks"], after["leaks"]))]
        for name in before["leaks"]
    ]
    print(format_table([["AUROC of the label from", "files", "batches"], *rows]))


if __name__ == "__main__":
    main()
