"""Read bundles: a trained detector on disk, in the layout of timm and Hugging Face.

timm reads `config.json` and `model.safetensors` with `local-dir:`; what only this package needs is
in `config.json` under `cifake_ray`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from cifake_ray.core.evaluation.calibration import Calibration
from cifake_ray.core.evaluation.precision_check import PrecisionCheck
from cifake_ray.core.imaging.preprocessing import Preprocessing
from cifake_ray.core.imaging.training_domain import ANY_SIDE, TrainingDomain
from cifake_ray.core.schema import SCHEMA_VERSION
from cifake_ray.errors import BundleError, UsageError
from cifake_ray.storage.bundles.built_ins import list_built_ins, locate_bundle
from cifake_ray.storage.bundles.other_layouts import (
    PROCESSOR_NAME,
    OtherClassifier,
    find_layout,
    parse_classifier,
)
from cifake_ray.storage.bundles.precision_file import PRECISION_NAME, parse_checks
from cifake_ray.storage.bundles.weights import (
    WEIGHTS_NAME,
    check_weights,
    find_weights,
    load_weights,
    read_architecture,
)
from cifake_ray.storage.io.files import (
    MAX_JSON_BYTES,
    exists,
    read_bytes,
    read_if_exists,
)
from cifake_ray.storage.io.paths import AnyPath
from cifake_ray.storage.io.records import parse_record

if TYPE_CHECKING:
    from cifake_ray.core.models.detector import Detector


@dataclass(frozen=True, kw_only=True)
class BundleInfo:
    """A bundle without its weights: what `config.json` holds, and the fingerprint."""

    path: AnyPath
    weights_name: str  # model.safetensors, or the pickle that --allow-pickle let in
    fingerprint: str  # sha256(sha256(config.json) + sha256(weights))
    architecture: str
    preprocessing: Preprocessing
    calibration: Calibration
    domain: TrainingDomain | None  # what it was trained on; None in bundles that do not name it
    training: dict[str, Any]  # settings and counts of the run that made it
    # By precision; {} if the bundle has none, or --expect-sha256 does not cover them.
    checks: dict[str, PrecisionCheck] = field(default_factory=dict)
    checks_fingerprint: str = ""  # as `fingerprint`, and of PRECISION_NAME: the ranges of int8
    # Of a classifier in the layout of timm or transformers; None of a bundle of ours. Its
    # fingerprint covers PROCESSOR_NAME and which output means FAKE too.
    other: OtherClassifier | None = None

    def identify(self, precision: str) -> str:
        """Return the fingerprint of all that decides scores in a precision."""
        return self.checks_fingerprint if precision == "int8" else self.fingerprint

    @property
    def fake_class(self) -> str | None:
        """The `--fake-class` that makes the same bundle of the same files."""
        return None if self.other is None else str(self.other.fake_output)

    @property
    def is_pickle(self) -> bool:
        """Whether the weights are a pickle that --allow-pickle let in."""
        return self.weights_name != WEIGHTS_NAME

    def threshold(self, target_fpr: float | None) -> float:
        """Return the threshold for a false-positive rate of 0.01 or 0.001, or the default one.

        UsageError when no threshold kept that rate on the validation images.
        """
        threshold = {
            None: self.calibration.threshold,
            0.01: self.calibration.threshold_fpr_1,
            0.001: self.calibration.threshold_fpr_01,
        }[target_fpr]
        if threshold is None:
            raise UsageError(
                f"--target-fpr {target_fpr}: {self.path} has no threshold for it: its REAL"
                " validation images are too few, or more of them have p_fake = 1.0; leave it out,"
                " or train again with checked labels or more validation images"
            )
        return threshold

    def list_thresholds(self) -> dict[str, float]:
        """Return every threshold of the bundle by its name, the default one first."""
        calibration = self.calibration
        thresholds: dict[str, float | None] = {
            "default": calibration.threshold,
            "fpr_0.01": calibration.threshold_fpr_1,
            "fpr_0.001": calibration.threshold_fpr_01,
        }
        return {name: value for name, value in thresholds.items() if value is not None}


def read_bundle_info(
    path: AnyPath,
    *,
    expect_sha256: str | None = None,
    allow_pickle: bool = False,
    fake_class: str | None = None,
) -> BundleInfo:
    """Read and check a bundle without torch, cheaply enough to do before work is scheduled.

    `expect_sha256` is the fingerprint it must have. `fake_class` says which output of a classifier
    of others means FAKE, by its index or name. BundleError when the bundle is missing, incomplete,
    damaged, another one, of an unknown layout, or a pickle without `allow_pickle`.
    """
    return _read_bundle(path, expect_sha256, allow_pickle, fake_class)[0]


def load_bundle(
    path: AnyPath,
    *,
    expect_sha256: str | None = None,
    allow_pickle: bool = False,
    fake_class: str | None = None,
) -> tuple[Detector, BundleInfo]:
    """Return the detector, on the CPU and ready to score, from the bytes that were checked.

    BundleError as `read_bundle_info`, and when the weights are not those of the architecture.
    """
    import torch

    from cifake_ray.core.models.detector import build_detector

    info, weights = _read_bundle(path, expect_sha256, allow_pickle, fake_class)
    size, fit = info.preprocessing.image_size, info.preprocessing.fit
    weights_path = path / info.weights_name
    state = load_weights(weights_path, weights)
    try:
        if info.other is not None:
            return info.other.build(info.architecture, info.preprocessing, state), info
        with torch.device("meta"):  # without memory: a name can stand for any number of weights
            blank = build_detector(info.architecture, image_size=size, fit=fit)
        blank.network.load_state_dict(state, assign=True)
        detector = build_detector(info.architecture, image_size=size, fit=fit)
        detector.set_preprocessing(info.preprocessing)
        detector.network.load_state_dict(state)
    except (
        ArithmeticError,
        AssertionError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise BundleError(
            f"{weights_path}: not the weights of {info.architecture}"
            f" ({str(error).splitlines()[0]}); copy or train the bundle again"
        ) from error
    return detector.eval(), info


def read_built_in_domains() -> dict[str, TrainingDomain | None]:
    """Return what each built-in detector was trained on, by its name."""
    return {name: read_bundle_info(locate_bundle(name)).domain for name in list_built_ins()}


def _read_bundle(
    path: AnyPath, expect_sha256: str | None, allow_pickle: bool, fake_class: str | None
) -> tuple[BundleInfo, bytes]:
    """Return the checked `config.json` and the bytes of the weights.

    Each file is read once: a bundle that is replaced meanwhile is never half the old one.
    """
    if not exists(path / "config.json"):
        raise BundleError(
            f"{path}: no config.json; give the bundle folder of a finished training run, or the"
            f" name of a built-in detector: {', '.join(list_built_ins())}"
        )
    config = read_bytes(path / "config.json", MAX_JSON_BYTES)
    if find_layout(parsed := _parse_object(path / "config.json", config)) is not None:
        return _read_classifier(path, config, parsed, expect_sha256, fake_class)
    if fake_class is not None:
        raise UsageError(f"--fake-class: {path} says itself which output means FAKE; leave it out")
    weights_name = find_weights(path, allow_pickle)
    weights = read_bytes(path / weights_name)
    fingerprint = whole = _combine(config, weights)
    checked = None
    if exists(path / PRECISION_NAME):
        checked = read_bytes(path / PRECISION_NAME, MAX_JSON_BYTES)
        whole = _combine(config, weights, checked)
    wanted = (expect_sha256 or whole).lower()
    _check_sha256(path, wanted, fingerprint, whole)
    info = _parse_config(path, parsed, weights_name, fingerprint)
    check_weights(path / weights_name, weights, info.architecture)
    if checked is not None and wanted == whole:
        checks = parse_checks(path / PRECISION_NAME, checked)
        info = replace(info, checks=checks, checks_fingerprint=whole)
    return info, weights


def _read_classifier(
    path: AnyPath,
    config: bytes,
    parsed: dict[str, Any],
    expect_sha256: str | None,
    fake_class: str | None,
) -> tuple[BundleInfo, bytes]:
    """Return what `_read_bundle` does of a classifier of others. Pickles are not read."""
    processor = read_if_exists(path / PROCESSOR_NAME)
    steps = None if processor is None else _parse_object(path / PROCESSOR_NAME, processor)
    architecture, preprocessing, other = parse_classifier(str(path), parsed, steps, fake_class)
    if not exists(path / WEIGHTS_NAME):
        raise BundleError(
            f"{path}: no {WEIGHTS_NAME}; classifiers of others are read from it alone"
        )
    weights = read_bytes(path / WEIGHTS_NAME)
    fingerprint = _combine(config, processor or b"", weights, b"%d" % other.fake_output)
    _check_sha256(path, (expect_sha256 or fingerprint).lower(), fingerprint)
    check_weights(path / WEIGHTS_NAME, weights, architecture)
    if read_architecture(weights) is not None:  # without its calibration
        raise BundleError(f"{path}: not a bundle any more: its config.json has lost `cifake_ray`")
    info = BundleInfo(
        path=path,
        weights_name=WEIGHTS_NAME,
        fingerprint=fingerprint,
        architecture=architecture,
        preprocessing=preprocessing,
        calibration=Calibration(
            temperature=1.0, threshold=0.5, threshold_fpr_1=None, threshold_fpr_01=None
        ),
        domain=None,
        training={},
        other=other,
    )
    return info, weights


def _parse_object(path: AnyPath, data: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(data)
        if not isinstance(parsed, dict):
            raise ValueError("it is no object")
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path}: damaged ({error}); copy the bundle again") from error
    return parsed


def _check_sha256(path: AnyPath, wanted: str, *known: str) -> None:
    if wanted not in known:
        raise BundleError(
            f"{path}: its sha256 is {known[-1]}, expected is {wanted}; it is another"
            " bundle, or it was changed: fetch it again, or give the sha256 of the one you mean"
        )


def _combine(*contents: bytes) -> str:
    """Return the sha256 of the sha256 of each."""
    return hashlib.sha256(b"".join(hashlib.sha256(data).digest() for data in contents)).hexdigest()


def _parse_config(
    path: AnyPath, config: dict[str, Any], weights_name: str, fingerprint: str
) -> BundleInfo:
    try:
        ours = config["cifake_ray"]
        if ours["schema_version"] != SCHEMA_VERSION:
            raise BundleError(
                f"{path}: schema_version {ours['schema_version']}, this program reads"
                f" {SCHEMA_VERSION}; train again or use the version that wrote it"
            )
        parse_record(Calibration, ours["calibration"])  # the types
        architecture, calibration = config["architecture"], Calibration(**ours["calibration"])
        if not isinstance(architecture, str):
            raise ValueError(f"architecture is {architecture!r}")
        if calibration.temperature <= 0:
            raise ValueError(f"temperature is {calibration.temperature}")
        for name in ("threshold", "threshold_fpr_1", "threshold_fpr_01"):
            if not 0 <= (getattr(calibration, name) or 0) <= 1:
                raise ValueError(f"{name} is {getattr(calibration, name)}, not from 0 to 1")
        preprocessing = Preprocessing.from_dict(ours["preprocessing"])
        domain = ours.get("domain")
        if domain is not None:
            if domain["sides"] is None and preprocessing.fit == "crops":  # as was written before
                domain = {**domain, "sides": [preprocessing.image_size, ANY_SIDE]}
            parse_record(TrainingDomain, domain)
        return BundleInfo(
            path=path,
            weights_name=weights_name,
            fingerprint=fingerprint,
            architecture=architecture,
            preprocessing=preprocessing,
            calibration=calibration,
            domain=None if domain is None else TrainingDomain.from_dict(domain),
            training=dict(ours["training"]),
        )
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise BundleError(
            f"{path}/config.json: not a bundle of cifake-ray ({type(error).__name__}: {error});"
            " give the bundle folder of a finished training run"
        ) from error
