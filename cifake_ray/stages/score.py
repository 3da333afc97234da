"""score: images -> scores, with a bundle.

evaluate uses the same processor on labelled shards.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from cifake_ray.config import ScoreConfig
from cifake_ray.config.batch import BundleConfig
from cifake_ray.core.imaging.training_domain import choose_detector
from cifake_ray.errors import ResourceError, UsageError
from cifake_ray.report.text import describe_unlike
from cifake_ray.stages.batch.driver import run_batch
from cifake_ray.stages.batch.plan import BatchPlan, DryRun
from cifake_ray.stages.batch.quarantine import Quarantine
from cifake_ray.stages.batch.summary import BatchSummary, Progress
from cifake_ray.stages.malloc import keep_freed_memory
from cifake_ray.stages.resources import (
    Placement,
    names_cluster,
    read_cpu_flags,
    read_local_resources,
)
from cifake_ray.storage.bundles.built_ins import list_built_ins, locate_bundle, name_bundle
from cifake_ray.storage.bundles.bundle import (
    BundleInfo,
    load_bundle,
    read_built_in_domains,
    read_bundle_info,
)
from cifake_ray.storage.io.paths import AnyPath, resolve_path
from cifake_ray.storage.runs.policy_file import check_bundle, read_policy
from cifake_ray.storage.runs.run import read_run
from cifake_ray.storage.runs.shards import describe_threshold
from cifake_ray.storage.sources.open_source import open_source
from cifake_ray.storage.sources.sample_sizes import sample_sizes
from cifake_ray.storage.sources.source import Source

if TYPE_CHECKING:
    from cifake_ray.core.evaluation.policy import Policy
    from cifake_ray.core.processing.score import ScoreProcessor

VERIFIER = "encypher-c2pa"
HEADER_TIMEOUT_S = 1.0  # for the header of one image


@dataclass(frozen=True)
class MakeScoreProcessor:
    """Loads the bundle inside the worker; only this small object is sent there."""

    bundle: BundleInfo
    threshold: float
    batch_size: int | None
    precision: str = "float32"
    c2pa_reader: str | None = None  # None without `--provenance`
    has_thumbnails: bool = False
    policy: Policy | None = None

    def __call__(self, placement: Placement) -> ScoreProcessor:
        # It imports torch, which only the workers need.
        from cifake_ray.core.models.precision import compare_probe, use_precision
        from cifake_ray.core.processing.score import ScoreProcessor
        from cifake_ray.core.training.device_limits import choose_eval_batch_size

        keep_freed_memory()
        if self.c2pa_reader == VERIFIER and not has_verifier():
            raise ResourceError(
                f"{socket.gethostname()} has no {VERIFIER}, which this run uses for --provenance:"
                " install cifake-ray[provenance] there"
            )
        # Load exactly the bytes that the driver read: the bundle may have been replaced since.
        detector, bundle = load_bundle(
            self.bundle.path,
            expect_sha256=self.bundle.fingerprint,
            allow_pickle=self.bundle.is_pickle,
            fake_class=self.bundle.fake_class,
        )
        device, size = find_device(placement), bundle.preprocessing.image_size
        batch_size = choose_eval_batch_size(detector.network, size, device)
        check = self.bundle.checks.get(self.precision)
        ranges = check.ranges if check else None
        detector = use_precision(detector, self.precision, device, ranges)
        if check is not None:
            compare_probe(detector, check, bundle.calibration.temperature, self.precision)
        return ScoreProcessor(
            detector,
            bundle.calibration,
            bundle.domain,
            threshold=self.threshold,
            policy=self.policy,
            batch_size=self.batch_size or batch_size,
            device=device,
            footer={
                "bundle": self.bundle.identify(self.precision),
                "precision": self.precision,
                "preprocessing": json.dumps(bundle.preprocessing.to_dict()),
                **describe_threshold(self.threshold, self.policy),
                "thresholds": json.dumps(bundle.list_thresholds()),
            },
            c2pa_reader=self.c2pa_reader,
            has_thumbnails=self.has_thumbnails,
        )


def find_device(placement: Placement) -> str:
    """Return torch's name of a worker's device. ResourceError when torch sees no GPU."""
    if not placement.gpus_per_worker:
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        raise ResourceError(
            f"Ray gives the workers GPUs, but torch {torch.__version__} sees none on"
            f" {socket.gethostname()}: check its driver there, or use --device cpu"
        )
    return "cuda"


def resolve_precision(config: BundleConfig, bundle: BundleInfo, out: AnyPath) -> str:
    """Return what `--precision` means for this run, bundle and processor.

    `auto` is what a run that was begun in `out` uses. Else on CPUs the first of int8 and bf16 that
    this processor has and that the bundle's check found harmless; where GPUs are or may be added,
    float32. A cluster is asked, but for a dry run, which returns `auto`. UsageError for int8
    without a check, and for a precision of GPUs where there is none.
    """
    wanted, on_cluster = config.precision, names_cluster(config) and config.num_workers != 0
    may_have_gpus = config.device != "cpu" and (
        on_cluster or read_local_resources(config.device).num_gpus > 0
    )
    if wanted in ("fp16", "tf32") and not may_have_gpus:
        raise UsageError(f"--precision {wanted} needs a GPU; use float32, bf16 or int8")
    if wanted == "int8" and "int8" not in bundle.checks:
        raise UsageError(
            f"--precision int8: {bundle.path} has no ranges for it. train finds them for networks"
            " that torch can quantise and that gain by it, with 1,000 validation images or more"
            " (with --expect-sha256, give the sha256 that its error shows); use float32"
        )
    if wanted != "auto":
        return wanted
    if (run := read_run(out)) is not None:
        return str(run.settings.get("precision", "float32"))
    if may_have_gpus and on_cluster and config.device == "auto":
        if config.dry_run:
            return "auto"
        may_have_gpus = config.scale_timeout_s > 0 or _count_gpus(config) > 0
    if may_have_gpus or config.device == "cuda":
        return "float32"
    flags = read_cpu_flags()
    has = {
        "int8": bool(flags & {"avx512_vnni", "avx_vnni"}),
        "bf16": "amx_bf16" in flags or {"avx512_bf16", "AuthenticAMD"} <= flags,
    }
    usable = (name for name in has if has[name] and name in bundle.checks)
    return next((name for name in usable if bundle.checks[name].is_harmless), "float32")


def choose_c2pa_reader(config: ScoreConfig, out: AnyPath) -> str | None:
    """Return what reads C2PA with `--provenance`: encypher-c2pa if it is installed, else presence.

    A run that was begun keeps what it has. None without `--provenance`.
    """
    if not config.provenance:
        return None
    begun = run.settings.get("c2pa_reader") if (run := read_run(out)) is not None else None
    return str(begun or (VERIFIER if has_verifier() else "presence"))


def has_verifier() -> bool:
    """Return whether the extra `provenance` is installed."""
    return find_spec("encypher_c2pa") is not None


def _count_gpus(config: BundleConfig) -> int:
    """Connect to the cluster and count."""
    from cifake_ray.stages.cluster import connect_cluster

    with connect_cluster(config) as resources:
        return resources.num_gpus


def read_run_bundle(
    command: str,
    config: BundleConfig,
    bundle_path: AnyPath | None,
    source: Source,
    place: tuple[AnyPath, str],
    out: AnyPath,
    log: Callable[[str], None],
) -> BundleInfo:
    """Return the bundle of a run, and log what was chosen for it.

    Without `bundle_path` it is the built-in one that fits the images. `place` is the path of the
    source, and the URI that names it.
    """
    if bundle_path is None:
        bundle_path = _choose_built_in(command, source, place, out, log)
    bundle = read_bundle_info(
        bundle_path,
        expect_sha256=config.expect_sha256,
        allow_pickle=config.allow_pickle,
        fake_class=config.fake_class,
    )
    if bundle.other is not None:
        log(f"{command}: {bundle.path} is {bundle.other}")
    return bundle


def _choose_built_in(
    command: str,
    source: Source,
    place: tuple[AnyPath, str],
    out: AnyPath,
    log: Callable[[str], None],
) -> AnyPath:
    """Return the built-in bundle of the run that was begun in `out`.

    Of a new run it is the one whose training images are most like a sample of the source.
    """
    names = list_built_ins()
    if (run := read_run(out)) is not None:
        begun = run.config.get("bundle")  # None in runs of before
        return locate_bundle(begun if begun in names else None)
    if len(names) == 1:
        return locate_bundle(names[0])
    # A header that kills or blocks its reader must not end the command.
    with Quarantine(decodes=False, timeout_s=HEADER_TIMEOUT_S) as quarantine:
        sides = [max(size) for size in sample_sizes(source, *place, quarantine.try_images)]
    name, reason = choose_detector(sides, read_built_in_domains())
    log(
        f"{command}: {reason}: using the built-in detector `{name}`; --bundle"
        f" {' or '.join(names)} chooses"
    )
    return locate_bundle(name)


def score_images(
    config: ScoreConfig,
    src: AnyPath,
    out: AnyPath,
    bundle_path: AnyPath | None,
    on_progress: Callable[[Progress], None],
    started_s: float,
    log: Callable[[str], None] = lambda message: None,
) -> BatchSummary | DryRun:
    """Score every image of `src` into `out`. The same call again resumes.

    Without `bundle_path` the built-in detector is used that fits the images.
    Log a warning when images are unlike those that the detector was trained on.
    """
    source = open_source(config, src, out)
    bundle = read_run_bundle("score", config, bundle_path, source, (src, config.src), out, log)
    threshold = bundle.threshold(config.target_fpr)
    precision = resolve_precision(config, bundle, out)
    c2pa_reader = choose_c2pa_reader(config, out)
    policy = None if config.policy is None else read_policy(config.policy, config.store)
    if policy:
        check_bundle(policy, bundle.identify(precision), precision, bundle.path)
    paths = {
        "bundle": name_bundle(bundle.path),
        "policy": config.policy and str(resolve_path(config.policy, config.store)),
    }
    plan = BatchPlan(
        command="score",
        config=config,
        out=out,
        source=source,
        paths={"src": str(src), **paths},
        inputs={
            "bundle": bundle.identify(precision),
            "precision": precision,
            "policy": policy and policy.id,
            **({"c2pa_reader": c2pa_reader} if c2pa_reader else {}),
        },
        facts={
            "bundle": str(bundle.path),
            "threshold": None if policy else threshold,
            "precision": precision,
        },
        device=config.device,
        make_processor=MakeScoreProcessor(
            bundle=bundle,
            threshold=threshold,
            batch_size=config.batch_size,
            precision=precision,
            c2pa_reader=c2pa_reader,
            has_thumbnails=config.thumbnails,
            policy=policy,
        ),
        threshold=threshold,
        policy=policy,
        extend=config.extend,
        thresholds=bundle.list_thresholds(),
        on_progress=on_progress,
        started_s=started_s,
        log=log,
    )
    if precision in bundle.checks:
        log(f"score: computing in {precision}: {bundle.checks[precision]}")
    result = run_batch(plan)
    if isinstance(result, BatchSummary) and bundle.domain and result.unlike_training["any"]:
        log(f"score: {describe_unlike(result.unlike_training, result.done, bundle.domain)}")
    return result
