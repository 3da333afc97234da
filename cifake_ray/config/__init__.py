"""Every knob of every verb.

Floor: core. One frozen dataclass per verb; the command line, `CIFAKE_RAY_*` variables and
`--config` files are all made from these fields, so a default stands in one place.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from cifake_ray.config.fields import MAX_IMAGE_SIZE as MAX_IMAGE_SIZE
from cifake_ray.config.fields import ClusterConfig as ClusterConfig
from cifake_ray.config.fields import Device as Device
from cifake_ray.config.fields import Doc as Doc
from cifake_ray.config.fields import Fit as Fit
from cifake_ray.config.fields import StoreConfig as StoreConfig
from cifake_ray.config.fields import check, check_least
from cifake_ray.config.fields import check_endpoint as check_endpoint
from cifake_ray.config.fields import doc_of as doc_of
from cifake_ray.config.fields import effective_settings as effective_settings
from cifake_ray.config.fields import find_misfit as find_misfit
from cifake_ray.config.fields import list_options as list_options
from cifake_ray.config.submit import JOBS_API as JOBS_API
from cifake_ray.config.submit import SubmitConfig as SubmitConfig
from cifake_ray.config.submit import check_places as check_places
from cifake_ray.config.train import Monitor as Monitor
from cifake_ray.config.train import TrackerName as TrackerName
from cifake_ray.config.train import TrainConfig as TrainConfig
from cifake_ray.config.tune import TuneConfig as TuneConfig

SourceKind = Literal["auto", "folder", "list", "inventory", "shards"]


@dataclass(frozen=True, kw_only=True)
class BatchConfig(ClusterConfig):
    """What convert, score and evaluate have in common: they run on the batch spine."""

    num_workers: Annotated[
        int | None, Doc("Worker processes (default: one per CPU, or one per GPU)", effect=False)
    ] = None
    shard_size: Annotated[
        int | None, Doc("Images per shard (default: N/1000 between 1,024 and 16,384)")
    ] = None
    max_error_rate: Annotated[
        float, Doc("Exit 3 when more than this share of the images failed, 0 to 1", effect=False)
    ] = 0.01
    retry_errors: Annotated[
        bool, Doc("Try again the rows that failed for a reason that may pass", effect=False)
    ] = False
    stall_timeout_s: Annotated[  # a worker that is silent for half as long is started anew
        float, Doc("Exit 6 after so many seconds without progress", effect=False)
    ] = 600.0
    dry_run: Annotated[bool, Doc("Show the plan and stop", effect=False)] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 1, "num_workers", "shard_size", "stall_timeout_s")
        check(
            0 <= self.max_error_rate <= 1,
            f"--max-error-rate is {self.max_error_rate}; give a share between 0 and 1",
        )


@dataclass(frozen=True, kw_only=True)
class SourceConfig(BatchConfig):
    """How images are found and labelled."""

    src: Annotated[
        str, Doc("Folder, list (.csv .txt .parquet), S3 Inventory or shards", positional=True)
    ]
    out: Annotated[str, Doc("Output folder", positional=True, effect=False)]
    source_kind: Annotated[SourceKind, Doc("What SRC is")] = "auto"
    include: Annotated[
        tuple[str, ...], Doc("Only keys that match one of these globs, such as '*.jpg'")
    ] = ()
    exclude: Annotated[tuple[str, ...], Doc("No keys that match one of these globs")] = ()
    real_name: Annotated[
        tuple[str, ...], Doc("Folder names that mean REAL, in any case, beside real and 0_real")
    ] = ()
    fake_name: Annotated[
        tuple[str, ...], Doc("Folder names that mean FAKE, in any case, beside fake and 1_fake")
    ] = ()
    path_column: Annotated[str, Doc("Column of a list that holds the path")] = "path"
    label_column: Annotated[str, Doc("Column of a list that holds REAL, FAKE, 0 or 1")] = "label"
    source_column: Annotated[str, Doc("Column of a list that names its sources")] = "source"
    follow_symlinks: Annotated[bool, Doc("Follow links to folders and out of SRC")] = False
    allow_prefix: Annotated[
        tuple[str, ...],
        Doc("A list may name files below this folder or URI, beside its own folder", effect=False),
    ] = ()


@dataclass(frozen=True, kw_only=True)
class BundleConfig(BatchConfig):
    """Which detector scores."""

    bundle: Annotated[str | None, Doc("Detector (default: the one in the box)")] = None
    expect_sha256: Annotated[
        str | None, Doc("Refuse a bundle of another sha256 (a refusal tells its own)", effect=False)
    ] = None
    allow_pickle: Annotated[
        bool, Doc("Take weights from .bin .pt .pth .ckpt .pkl: tensors only, no code", effect=False)
    ] = False
    batch_size: Annotated[int, Doc("Images per forward pass", effect=False)] = 256
    device: Annotated[Device, Doc("auto: the GPUs if there are any", effect=False)] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 1, "batch_size")
        check(
            self.expect_sha256 is None or bool(re.fullmatch("[0-9a-fA-F]{64}", self.expect_sha256)),
            f"--expect-sha256 is {self.expect_sha256!r}; give all 64 hex digits",
        )


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """sample: a small labelled image folder that needs no download."""

    out: Annotated[str, Doc("Folder to write", positional=True)]
    images: Annotated[int, Doc("Images in all; 80% train, 10% val, 10% test")] = 3000
    seed: Annotated[int, Doc("Same seed, same bytes")] = 0
    mixed: Annotated[bool, Doc("Mixed sizes and formats instead of 32x32 JPEG")] = False

    def __post_init__(self) -> None:
        check_least(self, 20, "images")
        check_least(self, 0, "seed")


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(SourceConfig):
    """convert: images -> Parquet shards."""


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(SourceConfig, BundleConfig):
    """score: images -> scores."""

    target_fpr: Annotated[
        float | None, Doc("False-positive rate whose stored threshold is used: 0.01 or 0.001")
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.target_fpr in (None, 0.01, 0.001),
            f"--target-fpr is {self.target_fpr}; bundles store thresholds for 0.01 and 0.001",
        )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(BundleConfig):
    """evaluate: labelled shards and a bundle -> predictions, metrics and a report."""

    shards: Annotated[str, Doc("Output of convert", positional=True)]
    out: Annotated[str, Doc("Folder for the report", effect=False)]
    split: Annotated[str | None, Doc("Split to use (default: test if there is one)")] = None
    num_bootstrap: Annotated[int, Doc("Resamples behind the 95% intervals")] = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 10, "num_bootstrap")


@dataclass(frozen=True, kw_only=True)
class PipelineConfig(ClusterConfig):
    """pipeline: convert, train, evaluate and score below one root folder."""

    src: Annotated[str, Doc("Folder of labelled images", positional=True)]
    root: Annotated[str, Doc("Folder for everything", positional=True)]
    model: Annotated[str, Doc("cnn, fusion, small_* or any of timm: see `models`")] = "cnn"
    epochs: Annotated[int, Doc("Passes over the training images")] = 10
    seed: Annotated[int, Doc("Same seed, same workers, same result")] = 0
    num_workers: Annotated[
        str | None, Doc("Data-parallel training workers, as for train (default: the GPUs, else 1)")
    ] = None
    batch_workers: Annotated[
        int | None, Doc("Workers of convert, evaluate and score (default: one per CPU or GPU)")
    ] = None
    device: Annotated[Device, Doc("auto: the GPUs if there are any")] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 1, "epochs", "batch_workers")
        check_least(self, 0, "seed")


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(StoreConfig):
    """verify: compare every result file with what was committed."""

    out: Annotated[str, Doc("Output of convert, score or evaluate", positional=True)]


@dataclass(frozen=True, kw_only=True)
class RepairConfig(ClusterConfig):
    """repair: make the shards again that `verify` finds damaged, and only those."""

    out: Annotated[str, Doc("Output of convert, score or evaluate", positional=True)]


@dataclass(frozen=True, kw_only=True)
class ExportConfig(StoreConfig):
    """export: write scores as one CSV file that is safe to open in a spreadsheet."""

    scores: Annotated[str, Doc("Output of score or evaluate", positional=True)]
    file: Annotated[str, Doc("CSV file to write", positional=True)]


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
