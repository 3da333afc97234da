"""Write a bundle: the files of a trained detector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cifake_ray.core.evaluation.calibration import Calibration
from cifake_ray.core.evaluation.precision_check import PrecisionCheck
from cifake_ray.core.imaging.training_domain import TrainingDomain
from cifake_ray.core.schema import LABEL_NAMES, SCHEMA_VERSION
from cifake_ray.storage.bundles.precision_file import PRECISION_NAME
from cifake_ray.storage.bundles.weights import WEIGHTS_NAME, encode_weights
from cifake_ray.storage.io.files import encode_json, make_folder, write_bytes
from cifake_ray.storage.io.paths import AnyPath
from cifake_ray.storage.io.text_rows import encode_json_lines

if TYPE_CHECKING:
    from cifake_ray.core.models.detector import Detector


def write_bundle(
    path: AnyPath,
    detector: Detector,
    calibration: Calibration,
    domain: TrainingDomain | None = None,
    *,
    training: Mapping[str, Any],
    metrics: Mapping[str, Any],
    history: list[dict[str, Any]],
    model_card: str,
    checks: Mapping[str, PrecisionCheck] | None = None,
) -> None:
    """Write a bundle, `config.json` last, so that a bundle that has one is complete."""
    preprocessing = detector.preprocessing
    timm_cfg: Mapping[str, Any] = getattr(detector.network, "pretrained_cfg", {})
    is_sized = timm_cfg.get("fixed_input_size")  # timm must be told the size, as for its ViTs
    config = {
        "architecture": detector.architecture,
        "model_args": {"img_size": preprocessing.image_size} if is_sized else {},
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
            "domain": domain and asdict(domain),
            "training": dict(training),
        },
    }
    make_folder(path, parents=False)
    write_bytes(path / WEIGHTS_NAME, encode_weights(detector))
    write_bytes(path / "history.jsonl", encode_json_lines(history))
    write_bytes(path / "metrics.json", encode_json(dict(metrics)))
    write_bytes(path / "README.md", model_card.encode())
    if checks:
        record = {name: asdict(check) for name, check in checks.items()}
        write_bytes(path / PRECISION_NAME, encode_json({"precisions": record}))
    write_bytes(path / "config.json", encode_json(config))
