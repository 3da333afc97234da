"""Read the file of a bundle that says what faster precisions change."""

from __future__ import annotations

import json
from dataclasses import dataclass

from cifake_ray.core.evaluation.precision_check import PrecisionCheck
from cifake_ray.errors import BundleError
from cifake_ray.storage.io.paths import AnyPath
from cifake_ray.storage.io.records import parse_record

PRECISION_NAME = "precision.json"  # beside the weights, not in the fingerprint of float32


@dataclass(frozen=True)
class _Checks:
    """What PRECISION_NAME holds."""

    precisions: dict[str, PrecisionCheck]


def parse_checks(path: AnyPath, data: bytes) -> dict[str, PrecisionCheck]:
    """Return the checks by precision. BundleError for anything else."""
    try:
        record = parse_record(_Checks, json.loads(data))
    except (ValueError, RecursionError) as error:
        raise BundleError(
            f"{path}: not the precisions of a bundle ({error}); copy the bundle again, or remove"
            " this file: scores are then computed in float32"
        ) from error
    return record.precisions
