"""Every option of every verb, one file a verb.

One frozen dataclass per verb; the command line, `CIFAKE_RAY_*` variables and
`--config` files are all made from these fields, so a default stands in one place.
"""

from __future__ import annotations

from cifake_ray.config.augmentation import POLICIES, Augmentation, parse_augmentation
from cifake_ray.config.batch import BatchConfig, BundleConfig, SourceConfig
from cifake_ray.config.convert import ConvertConfig
from cifake_ray.config.evaluate import EvaluateConfig
from cifake_ray.config.export import ExportConfig
from cifake_ray.config.fields import (
    MAX_IMAGE_SIZE,
    ClusterConfig,
    Device,
    Doc,
    Fit,
    StoreConfig,
    check_endpoint,
    doc_of,
    find_misfit,
    fingerprint_settings,
    list_options,
)
from cifake_ray.config.pipeline import PipelineConfig
from cifake_ray.config.repair import RepairConfig
from cifake_ray.config.sample import SampleConfig
from cifake_ray.config.score import ScoreConfig
from cifake_ray.config.submit import JOBS_API, SubmitConfig, check_remote_paths
from cifake_ray.config.train import Monitor, TrackerName, TrainConfig
from cifake_ray.config.tune import TuneConfig
from cifake_ray.config.verify import VerifyConfig

Config = (
    SampleConfig
    | ConvertConfig
    | TrainConfig
    | TuneConfig
    | EvaluateConfig
    | ScoreConfig
    | PipelineConfig
    | VerifyConfig
    | RepairConfig
    | ExportConfig
)

__all__ = [
    "JOBS_API",
    "MAX_IMAGE_SIZE",
    "POLICIES",
    "Augmentation",
    "BatchConfig",
    "BundleConfig",
    "ClusterConfig",
    "Config",
    "ConvertConfig",
    "Device",
    "Doc",
    "EvaluateConfig",
    "ExportConfig",
    "Fit",
    "Monitor",
    "PipelineConfig",
    "RepairConfig",
    "SampleConfig",
    "ScoreConfig",
    "SourceConfig",
    "StoreConfig",
    "SubmitConfig",
    "TrackerName",
    "TrainConfig",
    "TuneConfig",
    "VerifyConfig",
    "check_endpoint",
    "check_remote_paths",
    "doc_of",
    "find_misfit",
    "fingerprint_settings",
    "list_options",
    "parse_augmentation",
]
