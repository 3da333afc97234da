"""Export a detector to one file: an ONNX model that was compared with its bundle."""

from __future__ import annotations

import re
from typing import Any

from cifake_ray.config import ExportConfig
from cifake_ray.core.models.onnx_model import check_onnx_packages, encode_onnx, load_onnx
from cifake_ray.core.processing.compare_onnx import OnnxComparison, compare_onnx
from cifake_ray.core.training.device_limits import choose_eval_batch_size
from cifake_ray.errors import UsageError
from cifake_ray.storage.bundles.bundle import BundleInfo, load_bundle
from cifake_ray.storage.io.files import read_if_exists
from cifake_ray.storage.io.paths import AnyPath
from cifake_ray.storage.runs.export import refuse_existing, write_export
from cifake_ray.version import __version__


def export_detector(
    bundle: AnyPath, file: AnyPath, config: ExportConfig
) -> tuple[BundleInfo, OnnxComparison]:
    """Write the detector of a bundle to an .onnx file, whole or not at all.

    Return the bundle's description and how far the model, run by ONNX Runtime, is from it.
    UsageError when the file exists and `config` does not replace it, or a package is missing;
    CifakeError when the model differs from the detector, and then nothing is written.
    """
    check_onnx_packages()
    refuse_existing(file, overwrite=config.overwrite)
    detector, info = load_bundle(bundle, allow_pickle=config.allow_pickle)
    if info.other is not None:
        raise UsageError(f"{bundle}: a classifier of {info.other.layout}, which exports its own")
    temperature = info.calibration.temperature
    data = encode_onnx(detector, temperature, _describe_bundle(info))
    most = choose_eval_batch_size(detector.network, info.preprocessing.image_size, "cpu")
    found = compare_onnx(
        load_onnx(data),
        detector,
        temperature=temperature,
        threshold=info.threshold(None),
        batch_sizes=(1, 2, most),
    )
    write_export(file, [data], overwrite=config.overwrite)
    return info, found


def _describe_bundle(info: BundleInfo) -> dict[str, str]:
    """Return the metadata properties of the model: what a user of it needs beside pixels."""
    thresholds = {
        "threshold" if name == "default" else f"threshold_{name}": value
        for name, value in info.list_thresholds().items()
    }
    values: dict[str, Any] = {
        "architecture": info.architecture,
        "bundle_sha256": info.fingerprint,
        "cifake_ray_version": __version__,
        "image_size": info.preprocessing.image_size,
        "fit": info.preprocessing.fit,
        "num_crops": info.preprocessing.num_crops,
        "test_time_flip": info.preprocessing.test_time_flip,
        "temperature": info.calibration.temperature,
        **thresholds,
        "license": _find_license(info.path),
    }
    return {name: str(value) for name, value in values.items() if value is not None}


def _find_license(bundle: AnyPath) -> str | None:
    """Return the license that the bundle's card names in its front matter, if any."""
    card = (read_if_exists(bundle / "README.md") or b"").decode(errors="replace")
    found = re.match(r"---\n(?:(?!---).*\n)*?license: *(\S.*)\n", card)
    return found and found[1].strip()
