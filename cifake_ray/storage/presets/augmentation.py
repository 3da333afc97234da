"""Read augmentation policies by name or from a YAML file."""

from __future__ import annotations

from cifake_ray.config import POLICIES, Augmentation, TrainConfig, parse_augmentation
from cifake_ray.errors import UsageError
from cifake_ray.storage.io.files import read_if_exists
from cifake_ray.storage.io.paths import resolve_path
from cifake_ray.storage.presets.yaml_presets import parse_mapping


def read_augmentation(config: TrainConfig) -> Augmentation:
    """Return the policy of `--augment`.

    UsageError for an unknown name, file or step, and for a step that `--fit` rules out.
    """
    policy = _read_policy(config)
    if policy.downscale and config.fit != "crops":
        raise UsageError(
            f"--augment {policy}: downscale shrinks native pixels; give --fit crops, or leave it"
            " out"
        )
    if config.consistency and policy in (POLICIES["none"], POLICIES["flip"]):
        raise UsageError(
            f"--consistency compares an image with what --augment makes of it, and {policy}"
            " degrades nothing; give another policy, or leave it out"
        )
    return policy


def _read_policy(config: TrainConfig) -> Augmentation:
    if isinstance(config.augment, Augmentation):
        return config.augment
    if config.augment in POLICIES:
        return POLICIES[config.augment]
    if config.augment.startswith("{"):
        data: bytes | None = config.augment.encode()
    else:
        data = read_if_exists(resolve_path(config.augment, config.store))
    if data is None:
        raise UsageError(
            f"--augment {config.augment}: no such policy or file; there are {', '.join(POLICIES)}"
        )
    if not data.strip():
        raise UsageError(f"--augment {config.augment}: holds no steps, one `step: value` a line")
    values = parse_mapping(data, f"--augment {config.augment}")
    try:
        return parse_augmentation(values)
    except ValueError as error:
        raise UsageError(f"--augment {config.augment}: {error}") from error
