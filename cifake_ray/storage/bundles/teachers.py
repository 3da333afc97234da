"""Load the teachers of a training: detectors whose outputs the trained one learns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cifake_ray.config import StoreConfig, TrainConfig
from cifake_ray.errors import BundleError, UsageError
from cifake_ray.storage.bundles.built_ins import locate_bundle, pin_bundle
from cifake_ray.storage.bundles.bundle import load_bundle

if TYPE_CHECKING:
    from cifake_ray.core.models.detector import Detector


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A detector that others learn from."""

    name: str  # of its folder, without those above, which are private
    fingerprint: str  # of its bundle
    detector: Detector

    def __str__(self) -> str:
        return f"{self.name} (sha256 {self.fingerprint})"


def pin_teachers(uris: str, store: StoreConfig) -> str:
    """Return `a,b` with each URI as `pin_bundle` returns it."""
    return ",".join(pin_bundle(uri, store) for uri in map(str.strip, uris.split(",")) if uri)


def identify_teachers(teachers: Sequence[Teacher]) -> str | None:
    """Return what tells them from others, wherever their bundles are; None without any."""
    return ",".join(teacher.fingerprint for teacher in teachers) or None


def load_teachers(config: TrainConfig) -> list[Teacher]:
    """Load the bundles of `--teacher`. UsageError for one that cannot be scored with."""
    teachers = []
    for uri in config.teachers:
        path = locate_bundle(uri, config.store)
        try:
            detector, info = load_bundle(path, allow_pickle=config.allow_pickle)
        except (BundleError, UsageError) as error:
            if "--fake-class" in str(error):
                raise UsageError(
                    f"--teacher {uri}: which of its outputs means FAKE is not said; name them REAL"
                    " and FAKE in its config.json, as label_names (timm) or id2label (transformers)"
                ) from error
            raise UsageError(f"--teacher: {error}") from error
        name = uri.rstrip("/").rpartition("/")[2]
        teachers.append(Teacher(name=name, fingerprint=info.fingerprint, detector=detector))
    return teachers
