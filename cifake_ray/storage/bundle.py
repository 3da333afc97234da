"""Bundles: a trained detector on disk, in the layout of timm and Hugging Face.

Floor: storage. `config.json` and `model.safetensors` are what timm reads with `local-dir:`; what
only we need stands in `config.json` under `cifake_ray`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifake_ray.core.calibration import Calibration
from cifake_ray.core.images import Preprocessing
from cifake_ray.core.schema import LABEL_NAMES, SCHEMA_VERSION
from cifake_ray.errors import BundleError
from cifake_ray.storage.files import encode_json, read_bytes, read_json, resolve_path, write_bytes

if TYPE_CHECKING:
    from cifake_ray.core.models import Detector


@dataclass(frozen=True)
class BundleFacts:
    """What a bundle says of itself, without its weights being loaded."""

    path: Path
    architecture: str
    preprocessing: Preprocessing
    calibration: Calibration
    training: dict[str, Any]  # settings and counts of the run that made it

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over config.json and model.safetensors: the same scores, the same fingerprint."""
        digest = hashlib.sha256()
        for name in ("config.json", "model.safetensors"):
            digest.update(hashlib.sha256(read_bytes(self.path / name)).digest())
        return digest.hexdigest()

    def threshold(self, target_fpr: float | None) -> float:
        """The stored threshold for a false-positive rate of 0.01 or 0.001, or the default one."""
        return {
            None: self.calibration.threshold,
            0.01: self.calibration.threshold_fpr_1,
            0.001: self.calibration.threshold_fpr_01,
        }[target_fpr]


def locate_bundle(uri: str | None) -> Path:
    """Where a bundle lies: a bundle, a RUN with one inside, or None for the one in the box."""
    if uri is None:
        return Path(str(files("cifake_ray") / "bundles" / "default"))
    path = resolve_path(uri)
    return path / "bundle" if (path / "bundle" / "config.json").exists() else path


def read_bundle_facts(path: Path) -> BundleFacts:
    """Read `config.json`. BundleError when the bundle is missing, incomplete or not ours."""
    for name in ("config.json", "model.safetensors"):
        if not (path / name).is_file():
            raise BundleError(
                f"{path}: no {name}; give the bundle folder of a finished training run"
            )
    config = read_json(path / "config.json")
    try:
        ours = config["cifake_ray"]
        if ours["schema_version"] != SCHEMA_VERSION:
            raise BundleError(
                f"{path}: schema_version {ours['schema_version']}, this program reads"
                f" {SCHEMA_VERSION}; train again or use the version that wrote it"
            )
        return BundleFacts(
            path=path,
            architecture=config["architecture"],
            preprocessing=Preprocessing.from_dict(ours["preprocessing"]),
            calibration=Calibration(**ours["calibration"]),
            training=ours["training"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(
            f"{path}/config.json: not a bundle of cifake-ray ({type(error).__name__}: {error});"
            " give the bundle folder of a finished training run"
        ) from error


def load_bundle(path: Path) -> tuple[Detector, BundleFacts]:
    """The detector on the CPU, ready to score. BundleError when the weights do not fit."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    from cifake_ray.core.models import build_detector

    facts = read_bundle_facts(path)
    size = facts.preprocessing.image_size
    try:
        detector = build_detector(facts.architecture, image_size=size, fit=facts.preprocessing.fit)
        detector.set_preprocessing(facts.preprocessing)
        detector.network.load_state_dict(load(read_bytes(path / "model.safetensors")))
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise BundleError(
            f"{path}/model.safetensors: damaged, or not the weights of {facts.architecture}"
            f" ({str(error).splitlines()[0]}); copy or train the bundle again"
        ) from error
    return detector.eval(), facts


def read_history(path: Path) -> list[dict[str, Any]]:
    """One row per epoch of the training that made a bundle."""
    history = path / "history.jsonl"
    if not history.exists():
        return []
    return [json.loads(line) for line in read_bytes(history).splitlines()]


def write_bundle(
    path: Path,
    detector: Detector,
    calibration: Calibration,
    *,
    training: Mapping[str, Any],
    metrics: Mapping[str, Any],
    history: list[dict[str, Any]],
    model_card: str,
) -> None:
    """Write a bundle; `config.json` comes last, so a bundle that has one is complete."""
    from safetensors.torch import save

    preprocessing = detector.preprocessing
    config = {
        "architecture": detector.architecture,
        "num_classes": len(LABEL_NAMES),
        "label_names": list(LABEL_NAMES),
        "pretrained_cfg": {
            "architecture": detector.architecture,
            "num_classes": len(LABEL_NAMES),
            "input_size": [3, preprocessing.image_size, preprocessing.image_size],
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "label_names": list(LABEL_NAMES),
        },
        "cifake_ray": {
            "schema_version": SCHEMA_VERSION,
            "preprocessing": preprocessing.to_dict(),
            "calibration": asdict(calibration),
            "training": dict(training),
        },
    }
    weights = {name: t.contiguous().cpu() for name, t in detector.network.state_dict().items()}
    write_bytes(path / "model.safetensors", save(weights))
    lines = "".join(json.dumps(row) + "\n" for row in history)
    write_bytes(path / "history.jsonl", lines.encode())
    write_bytes(path / "metrics.json", encode_json(dict(metrics)))
    write_bytes(path / "README.md", model_card.encode())
    write_bytes(path / "config.json", encode_json(config))
