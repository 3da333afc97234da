"""Options that convert, score, evaluate and audit share."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from cifake_ray.config.fields import (
    ClusterConfig,
    Device,
    Doc,
    RuntimeDoc,
    ScorePrecision,
    check,
    check_least,
)

SourceKind = Literal["auto", "folder", "list", "inventory", "shards", "tar"]


@dataclass(frozen=True, kw_only=True)
class BatchConfig(ClusterConfig):
    """Options of the verbs that run as a batch."""

    PANEL: ClassVar[str] = "Run"

    num_workers: Annotated[
        int | None,
        RuntimeDoc(
            "Workers of Ray, each with a CPU or a GPU; 0: a process per CPU or GPU of this machine,"
            " without Ray (default: 0 if no cluster is named and no GPU used, else as many as fit)"
        ),
    ] = None
    shard_size: Annotated[
        int | None, Doc("Images per shard (default: 1,024 to 16,384, by the number of images)")
    ] = None
    limit: Annotated[int | None, Doc("Only the first N images that are listed (default: all)")] = (
        None
    )
    sample: Annotated[
        int | None, Doc("Only N images at random, of each label its share (default: all)")
    ] = None
    seed: Annotated[int, Doc("Another seed, another --sample")] = 0
    max_error_rate: Annotated[
        float, RuntimeDoc("Exit 3 if more than this share of the images failed, 0 to 1")
    ] = 0.01
    retry_errors: Annotated[bool, RuntimeDoc("Retry rows that failed with a transient error")] = (
        False
    )
    stall_timeout_s: Annotated[  # a worker that makes no progress for half as long is restarted
        float, RuntimeDoc("Exit 6 after this many seconds without progress")
    ] = 600.0
    dry_run: Annotated[bool, RuntimeDoc("Show the plan and stop")] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 0, "num_workers")
        check_least(self, 1, "shard_size", "stall_timeout_s", "limit", "sample")
        check(
            0 <= self.max_error_rate <= 1,
            f"--max-error-rate is {self.max_error_rate}; give a share between 0 and 1",
        )


@dataclass(frozen=True, kw_only=True)
class ImagesConfig(BatchConfig):
    """Options for finding and labelling images."""

    PANEL: ClassVar[str] = "Images and labels"
    PANELS: ClassVar[dict[str, str]] = {"Images and labels": "allow_prefix"}

    source_kind: Annotated[SourceKind, Doc("What SRC is")] = "auto"
    include: Annotated[
        tuple[str, ...], Doc("Only keys that match one of these globs, such as '*.jpg'; repeatable")
    ] = ()
    exclude: Annotated[
        tuple[str, ...], Doc("No keys that match one of these globs; repeatable")
    ] = ()
    real_name: Annotated[
        tuple[str, ...],
        Doc("More folder names and labels that mean REAL, in any case (always: real, 0_real)"),
    ] = ()
    fake_name: Annotated[
        tuple[str, ...],
        Doc("More folder names and labels that mean FAKE, in any case (always: fake, 1_fake)"),
    ] = ()
    path_column: Annotated[str, Doc("Column of a list that holds the path")] = "path"
    image_column: Annotated[
        str | None,
        Doc("Column of Parquet files that holds images or their paths (default: found by itself)"),
    ] = None
    label_column: Annotated[
        str,
        Doc(
            "Column of a list or of Parquet files, or field of the .json in a tar, that holds REAL,"
            " FAKE, 0, 1 or a class name"
        ),
    ] = "label"
    source_column: Annotated[
        str, Doc("Column of a list or of Parquet files that holds the source")
    ] = "source"
    drop_columns: Annotated[
        tuple[str, ...], Doc("Column of a list or of Parquet files to leave out; repeatable")
    ] = ()
    keep_column: Annotated[
        tuple[str, ...],
        Doc("Column to carry along though it holds bytes, lists or structs; repeatable"),
    ] = ()
    follow_symlinks: Annotated[bool, Doc("Follow links to folders and out of SRC")] = False
    allow_prefix: Annotated[
        tuple[str, ...],
        RuntimeDoc("Folder or URI that a list may refer to, besides its own folder"),
    ] = ()


@dataclass(frozen=True, kw_only=True)
class SourceConfig(ImagesConfig):
    """A source of images, and where their rows go."""

    needs_labels: ClassVar[bool] = False  # labels of which none is understood are an error
    PANEL: ClassVar[str] = "Images and labels"

    src: Annotated[
        str,
        Doc(
            "Folder, bucket prefix, list, S3 Inventory, Parquet or tars of images", positional=True
        ),
    ]
    out: Annotated[str, RuntimeDoc("Output folder", positional=True)]


@dataclass(frozen=True, kw_only=True)
class BundleConfig(BatchConfig):
    """Options for loading and running a detector."""

    PANEL: ClassVar[str] = "Detector"
    PANELS: ClassVar[dict[str, str]] = {"Detector": "fake_class expect_sha256 allow_pickle"}

    bundle: Annotated[
        str | None,
        Doc(
            "Bundle of the detector, its RUN, a built-in one by its name (cifake, wild), or a"
            " classifier of timm or transformers (default: the built-in one that fits the images)"
        ),
    ] = None
    fake_class: Annotated[  # in the bundle's fingerprint
        str | None,
        RuntimeDoc("Which class of another's classifier is FAKE: its index, 0 or 1, or its name"),
    ] = None
    expect_sha256: Annotated[
        str | None, RuntimeDoc("Reject a bundle with another sha256 (the error shows its own)")
    ] = None
    allow_pickle: Annotated[
        bool, RuntimeDoc("Accept weights in .bin .pt .pth .ckpt .pkl: tensors only, no code")
    ] = False
    batch_size: Annotated[
        int | None,
        RuntimeDoc(
            "Images per forward pass (default: 256, fewer of networks that need more memory)"
        ),
    ] = None
    device: Annotated[Device, RuntimeDoc("auto: GPUs if there are any")] = "auto"
    precision: Annotated[  # what it becomes is in the fingerprint
        ScorePrecision,
        RuntimeDoc(
            "auto: on CPUs int8 or bf16, if fast there and harmless by the bundle's own check, else"
            " float32; tf32 and fp16 are for GPUs"
        ),
    ] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 1, "batch_size")
        check(
            self.fake_class is None or self.bundle is not None,
            "--fake-class is of a classifier that --bundle names",
        )
        check(
            self.expect_sha256 is None or bool(re.fullmatch("[0-9a-fA-F]{64}", self.expect_sha256)),
            f"--expect-sha256 is {self.expect_sha256!r}; give all 64 hex digits",
        )
