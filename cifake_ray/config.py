"""Every knob of every verb on one page.

Floor: core. One frozen dataclass per verb; the command line, `CIFAKE_RAY_*` variables and
`--config` files are all made from these fields, so a default stands in one place.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, Literal, NamedTuple

Fit = Literal["resize", "crop"]
SourceKind = Literal["auto", "folder", "list", "inventory", "shards"]
Optimizer = Literal["adamw", "sgd", "muon"]
Schedule = Literal["onecycle", "cosine", "constant"]
Monitor = Literal["val_accuracy", "val_loss", "val_auroc"]
Precision = Literal["auto", "float32", "bf16", "fp16"]
MAX_IMAGE_SIZE = 4096  # pixels: the largest side a detector may ask for

Device = Literal["auto", "cpu", "cuda"]


class Doc(NamedTuple):
    """Help line of a field; `positional` makes it an argument, `effect=False` keeps it out of the
    fingerprint because it changes how fast a run is, never a row of its result."""

    help: str
    positional: bool = False
    effect: bool = True


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_least(config: object, least: int, *names: str) -> None:
    """Fields that are left out (None) or finite and at least so much."""
    for name in names:
        value = getattr(config, name)
        _check(
            value is None or least <= value < math.inf,
            f"--{name.replace('_', '-')} is {value}; give {least} or more",
        )


def check_endpoint(url: str | None, name: str) -> None:
    """ValueError, which does not repeat it, for a URL that is no bare address of a server."""
    _check(
        url is None or re.fullmatch(r"https?://[^@?#/\s]+/?", url) is not None,
        f"{name}: give http://HOST:PORT or https://HOST; credentials come from the AWS chain, never"
        " from a URL",
    )


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """How buckets are reached. Credentials come from the AWS chain and are never among these."""

    s3_endpoint_url: Annotated[
        str | None, Doc("Server of s3:// (default: AWS_ENDPOINT_URL, else AWS)", effect=False)
    ] = None
    s3_region: Annotated[
        str | None, Doc("Region of the bucket (default: AWS_REGION, else asked for)", effect=False)
    ] = None
    s3_profile: Annotated[
        str | None, Doc("Profile in the AWS configuration (default: AWS_PROFILE)", effect=False)
    ] = None
    s3_anonymous: Annotated[bool, Doc("Use no credentials: public buckets", effect=False)] = False

    def __post_init__(self) -> None:
        check_endpoint(self.s3_endpoint_url, "--s3-endpoint-url")

    @property
    def store(self) -> StoreConfig:
        """These fields alone, as they travel to the workers."""
        return StoreConfig(**{f.name: getattr(self, f.name) for f in fields(StoreConfig)})


@dataclass(frozen=True, kw_only=True)
class ClusterConfig(StoreConfig):
    """Where a command runs."""

    address: Annotated[
        str | None,
        Doc("Ray address (default: RAY_ADDRESS, else a Ray started here)", effect=False),
    ] = None


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
        _check_least(self, 1, "num_workers", "shard_size", "stall_timeout_s")
        _check(
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
        _check_least(self, 1, "batch_size")
        _check(
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
        _check_least(self, 20, "images")
        _check_least(self, 0, "seed")


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
        _check(
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
        _check_least(self, 10, "num_bootstrap")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(ClusterConfig):
    """train: shards -> RUN/bundle, the best epoch by validation."""

    shards: Annotated[str, Doc("Output of convert", positional=True)]
    run: Annotated[
        str, Doc("Folder of this run; the same folder resumes", positional=True, effect=False)
    ]
    model: Annotated[str, Doc("cnn, fusion, small_* or any of timm: see `models`")] = "cnn"
    weights: Annotated[
        str | None, Doc("Start from a .safetensors file, a folder in timm's layout or a bundle")
    ] = None
    pretrained: Annotated[bool, Doc("Start from timm's weights, fetched from its hub")] = False
    epochs: Annotated[int, Doc("Passes over the training images")] = 10
    batch_size: Annotated[int, Doc("Images per optimiser step, all workers together")] = 128
    optimizer: Annotated[Optimizer, Doc("What takes the steps; muon is for hidden layers")] = (
        "adamw"
    )
    lr: Annotated[float, Doc("Peak learning rate")] = 0.003
    momentum: Annotated[float, Doc("Of sgd and muon, first beta of adamw; 0 to 1")] = 0.9
    weight_decay: Annotated[float, Doc("Weight decay, on weights with 2 axes or more")] = 0.01
    schedule: Annotated[Schedule, Doc("How the rate moves after the warm-up")] = "onecycle"
    warmup: Annotated[float, Doc("Share of the steps in which the rate rises, 0 to 1")] = 0.2
    layer_decay: Annotated[
        float | None, Doc("Factor of the rate from each layer to the one before it (timm's)")
    ] = None
    freeze_epochs: Annotated[int, Doc("Epochs at the start in which only the head learns")] = 0
    grad_clip: Annotated[float | None, Doc("Longest gradient, as an L2 norm over all weights")] = (
        None
    )
    grad_accum: Annotated[
        int, Doc("Pieces in which a batch goes through the network, to save memory")
    ] = 1
    ema_decay: Annotated[
        float | None,
        Doc("Validate and keep a moving average of the weights; its decay per step, below 1"),
    ] = None
    label_smoothing: Annotated[float, Doc("0 to 1")] = 0.0
    mixup: Annotated[float, Doc("Alpha of mixup; 0 is none")] = 0.0
    cutmix: Annotated[float, Doc("Alpha of CutMix; 0 is none")] = 0.0
    drop_path: Annotated[float, Doc("Stochastic depth of timm's networks that take it")] = 0.0
    channels_last: Annotated[bool, Doc("Weights in channels-last order: often faster")] = False
    augment: Annotated[
        str, Doc("Augmentation: none, flip, seed, strong, or a YAML file of its steps")
    ] = "flip"
    monitor: Annotated[Monitor, Doc("What makes an epoch the best, on validation")] = "val_accuracy"
    patience: Annotated[
        int | None, Doc("Stop after so many epochs without a better one (default: never)")
    ] = None
    min_delta: Annotated[
        float, Doc("What must be gained for --patience to count an epoch as better")
    ] = 0.0
    seed: Annotated[int, Doc("Same seed, same workers, same result")] = 0
    image_size: Annotated[
        int | None, Doc("Side of the input in pixels (default: the architecture's own)")
    ] = None
    fit: Annotated[Fit, Doc("How other sizes are brought to it")] = "resize"
    val_fraction: Annotated[float, Doc("Share of the train split kept for validation")] = 0.1
    val_split: Annotated[str | None, Doc("Validate on this split instead")] = None
    num_workers: Annotated[
        int | None,
        Doc(
            "Data-parallel workers; 0 trains in this process (default: the GPUs, else 1)",
            effect=False,
        ),
    ] = None
    cpus_per_worker: Annotated[
        int | None, Doc("CPU threads of each worker (default: shared out evenly)", effect=False)
    ] = None
    device: Annotated[Device, Doc("auto: the GPUs if there are any", effect=False)] = "auto"
    precision: Annotated[Precision, Doc("auto: bf16 or fp16 on GPU, float32 on CPU")] = "auto"
    max_failures: Annotated[int, Doc("Worker failures survived before giving up", effect=False)] = 3
    cache_dir: Annotated[
        str | None,
        Doc("Folder for decoded images (default: ~/.cache/cifake_ray)", effect=False),
    ] = None
    cache_gb: Annotated[
        float, Doc("Decode into memory-mapped files up to this size; stream above", effect=False)
    ] = 8.0
    dry_run: Annotated[bool, Doc("Show the plan and stop", effect=False)] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_least(self, 1, "epochs", "batch_size", "cpus_per_worker", "patience", "grad_accum")
        _check_least(self, 0, "seed", "weight_decay", "cache_gb", "max_failures", "min_delta")
        _check_least(self, 0, "mixup", "cutmix", "freeze_epochs")
        _check(
            self.weights is None or not self.pretrained,
            "--weights and --pretrained: give one of them",
        )
        _check(
            self.pretrained is False or self.model != "cnn",
            "--pretrained: timm has no weights of cnn; give --weights, or leave it out",
        )
        _check(
            self.min_delta == 0 or self.patience is not None,
            "--min-delta needs --patience: without it no epoch is counted",
        )
        _check(0 < self.lr < math.inf, f"--lr is {self.lr}; give a number above 0")
        for name in ("grad_clip", "layer_decay", "ema_decay"):
            value = getattr(self, name)
            highest = math.inf if name == "grad_clip" else 1
            _check(
                value is None or 0 < value < highest,
                f"--{name.replace('_', '-')} is {value}; give a number above 0"
                + (", below 1" if highest == 1 else ""),
            )
        _check(
            self.freeze_epochs <= self.epochs,
            f"--freeze-epochs is {self.freeze_epochs} of {self.epochs} epochs",
        )
        for name in ("warmup", "label_smoothing", "momentum", "drop_path"):
            value = getattr(self, name)
            _check(
                0 <= value < 1, f"--{name.replace('_', '-')} is {value}; give 0 or more, below 1"
            )
        _check(
            0 < self.val_fraction < 1,
            f"--val-fraction is {self.val_fraction}; give a share between 0 and 1",
        )
        _check(
            self.num_workers is None or 0 <= self.num_workers <= self.batch_size,
            f"--num-workers is {self.num_workers} with --batch-size {self.batch_size}; every"
            " worker needs at least one image of each batch",
        )
        _check(
            self.image_size is None or 8 <= self.image_size <= MAX_IMAGE_SIZE,
            f"--image-size is {self.image_size}; give 8 to {MAX_IMAGE_SIZE}",
        )


@dataclass(frozen=True, kw_only=True)
class PipelineConfig(ClusterConfig):
    """pipeline: convert, train, evaluate and score below one root folder."""

    src: Annotated[str, Doc("Folder of labelled images", positional=True)]
    root: Annotated[str, Doc("Folder for everything", positional=True)]
    model: Annotated[str, Doc("cnn, fusion, small_* or any of timm: see `models`")] = "cnn"
    epochs: Annotated[int, Doc("Passes over the training images")] = 10
    seed: Annotated[int, Doc("Same seed, same workers, same result")] = 0
    num_workers: Annotated[
        int | None, Doc("Data-parallel training workers (default: the GPUs, else 1)")
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_least(self, 1, "epochs")
        _check_least(self, 0, "seed")


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
    | EvaluateConfig
    | ScoreConfig
    | PipelineConfig
    | VerifyConfig
    | RepairConfig
    | ExportConfig
)


def doc_of(config_class: type[Config], name: str) -> Doc:
    """The `Doc` of a field."""
    from typing import get_type_hints

    doc: Doc = get_type_hints(config_class, include_extras=True)[name].__metadata__[0]
    return doc


def effective_settings(config: Config) -> dict[str, Any]:
    """The fields that change a row of the result: what a run's fingerprint covers."""
    values = asdict(config)
    return {
        f.name: list(values[f.name]) if isinstance(values[f.name], tuple) else values[f.name]
        for f in fields(config)
        if doc_of(type(config), f.name).effect
    }
