"""Every option of every verb, one file per verb.

Each verb has one frozen dataclass; the command line, `CIFAKE_RAY_*` variables and `--config` files
are all made from its fields, so a default is written in one place.
"""

from __future__ import annotations

from cifake_ray.config.audit import AuditConfig
from cifake_ray.config.augmentation import POLICIES, Augmentation, parse_augmentation
from cifake_ray.config.batch import BatchConfig, BundleConfig, SourceConfig
from cifake_ray.config.compare import CompareConfig
from cifake_ray.config.convert import ConvertConfig
from cifake_ray.config.decide import DecideConfig
from cifake_ray.config.doctor import DoctorConfig
from cifake_ray.config.evaluate import EvaluateConfig
from cifake_ray.config.export import ExportConfig
from cifake_ray.config.fields import (
    LAST_PANELS,
    MAX_CROP_SIZE,
    MAX_IMAGE_SIZE,
    MAX_NUM_CROPS,
    NUM_CROPS,
    ClusterConfig,
    Device,
    Doc,
    Fit,
    SquareFit,
    StoreConfig,
    WorkersConfig,
    check_endpoint,
    doc_of,
    find_misfit,
    find_panel,
    fingerprint_settings,
    hint_of,
    list_options,
)
from cifake_ray.config.pipeline import PipelineConfig
from cifake_ray.config.repair import RepairConfig
from cifake_ray.config.review import ReviewConfig
from cifake_ray.config.sample import SampleConfig
from cifake_ray.config.score import ScoreConfig
from cifake_ray.config.submit import JOBS_API, SubmitConfig, check_remote_paths
from cifake_ray.config.train import TrackerName, TrainConfig
from cifake_ray.config.tune import TuneConfig
from cifake_ray.config.validation import Monitor
from cifake_ray.config.verify import VerifyConfig

Config = StoreConfig | SampleConfig  # of any verb

VERBS: dict[str, type[Config]] = {
    "sample": SampleConfig,
    "audit": AuditConfig,
    "convert": ConvertConfig,
    "train": TrainConfig,
    "tune": TuneConfig,
    "evaluate": EvaluateConfig,
    "score": ScoreConfig,
    "compare": CompareConfig,
    "pipeline": PipelineConfig,
    "decide": DecideConfig,
    "verify": VerifyConfig,
    "repair": RepairConfig,
    "export": ExportConfig,
    "review": ReviewConfig,
}
