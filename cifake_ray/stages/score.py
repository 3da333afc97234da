"""score: images -> scores, with a bundle.

evaluate uses the same processor on labelled shards.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cifake_ray.config import ScoreConfig
from cifake_ray.errors import ResourceError
from cifake_ray.report.text import describe_unlike
from cifake_ray.stages.batch.driver import BatchPlan, run_batch
from cifake_ray.stages.batch.plan import DryRun
from cifake_ray.stages.batch.summary import BatchSummary, Progress
from cifake_ray.stages.malloc import keep_freed_memory
from cifake_ray.stages.resources import Placement
from cifake_ray.storage.bundles.bundle import BundleInfo, load_bundle, read_bundle_info
from cifake_ray.storage.io.paths import AnyPath
from cifake_ray.storage.sources.open_source import open_source

if TYPE_CHECKING:
    from cifake_ray.core.processing.score import ScoreProcessor


@dataclass(frozen=True)
class MakeScoreProcessor:
    """Loads the bundle inside the worker; only this small object is sent there."""

    bundle: BundleInfo
    threshold: float
    batch_size: int | None

    def __call__(self, placement: Placement) -> ScoreProcessor:
        # It imports torch, which only the workers need.
        from cifake_ray.core.processing.score import ScoreProcessor
        from cifake_ray.core.training.device_limits import choose_eval_batch_size

        keep_freed_memory()
        # Load exactly the bytes that the driver read: the bundle may have been replaced since.
        detector, bundle = load_bundle(
            self.bundle.path,
            expect_sha256=self.bundle.fingerprint,
            allow_pickle=self.bundle.is_pickle,
        )
        device, size = find_device(placement), bundle.preprocessing.image_size
        return ScoreProcessor(
            detector,
            bundle.calibration,
            bundle.domain,
            threshold=self.threshold,
            batch_size=self.batch_size or choose_eval_batch_size(detector.network, size, device),
            device=device,
            footer={
                "bundle": bundle.fingerprint,
                "preprocessing": json.dumps(bundle.preprocessing.to_dict()),
                "threshold": str(self.threshold),
                "thresholds": json.dumps(bundle.list_thresholds()),
            },
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


def score_images(
    config: ScoreConfig,
    src: AnyPath,
    out: AnyPath,
    bundle_path: AnyPath,
    on_progress: Callable[[Progress], None],
    started_s: float,
    log: Callable[[str], None] = lambda message: None,
) -> BatchSummary | DryRun:
    """Score every image of `src` into `out`. The same call again resumes.

    Log a warning when images are unlike those that the detector was trained on.
    """
    source = open_source(config, src, out)
    bundle = read_bundle_info(
        bundle_path, expect_sha256=config.expect_sha256, allow_pickle=config.allow_pickle
    )
    threshold = bundle.threshold(config.target_fpr)
    plan = BatchPlan(
        command="score",
        config=config,
        out=out,
        source=source,
        paths={"src": str(src), "bundle": config.bundle and str(bundle.path)},
        inputs={"bundle": bundle.fingerprint},
        facts={"bundle": str(bundle.path), "threshold": bundle.threshold(config.target_fpr)},
        device=config.device,
        make_processor=MakeScoreProcessor(
            bundle=bundle, threshold=threshold, batch_size=config.batch_size
        ),
        threshold=threshold,
        thresholds=bundle.list_thresholds(),
        on_progress=on_progress,
        started_s=started_s,
        log=log,
    )
    result = run_batch(plan)
    if isinstance(result, BatchSummary) and bundle.domain and result.unlike_training["any"]:
        log(f"score: {describe_unlike(result.unlike_training, result.done, bundle.domain)}")
    return result
