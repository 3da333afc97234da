"""score: images -> scores, with a bundle.

Floor: stages. evaluate runs the same work on labelled shards.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cifake_ray.config import ScoreConfig, effective_settings
from cifake_ray.errors import ResourceError
from cifake_ray.report.text import describe_unlike
from cifake_ray.stages.batch.driver import (
    BatchPlan,
    BatchSummary,
    DryRun,
    Progress,
    plan_batch,
    run_batch,
)
from cifake_ray.stages.cluster import Placement
from cifake_ray.stages.malloc import keep_freed_memory
from cifake_ray.storage.bundles.bundle import (
    BundleFacts,
    load_bundle,
    locate_bundle,
    read_bundle_facts,
)
from cifake_ray.storage.io.paths import resolve_path
from cifake_ray.storage.runs.run import RunPlan
from cifake_ray.storage.s3.location import open_place
from cifake_ray.storage.sources.open_source import open_source

if TYPE_CHECKING:
    from cifake_ray.core.processing.score import ScoreWork


@dataclass(frozen=True)
class MakeScoreWork:
    """Loads the bundle inside the worker; this recipe is all that travels there."""

    bundle: BundleFacts
    threshold: float
    batch_size: int

    def __call__(self, placement: Placement) -> ScoreWork:
        from cifake_ray.core.processing.score import ScoreWork  # torch: only the workers need it

        keep_freed_memory()
        # The very bytes that the driver saw, or none: a bundle may be replaced meanwhile.
        detector, bundle = load_bundle(
            self.bundle.path,
            expect_sha256=self.bundle.fingerprint,
            allow_pickle=self.bundle.is_pickle,
        )
        return ScoreWork(
            detector,
            bundle.calibration,
            bundle.domain,
            threshold=self.threshold,
            batch_size=self.batch_size,
            device=find_device(placement),
            facts={
                "bundle": bundle.fingerprint,
                "preprocessing": json.dumps(bundle.preprocessing.to_dict()),
                "threshold": str(self.threshold),
            },
        )


def find_device(placement: Placement) -> str:
    """Where a worker computes, for torch. ResourceError when there is no GPU in truth."""
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
    on_progress: Callable[[Progress], None],
    started_s: float,
    say: Callable[[str], None] = lambda message: None,
) -> BatchSummary | DryRun:
    """Score every image of `config.src` into `config.out`. The same call again resumes.

    `say` gets a warning when images are unlike those that the detector learned from.
    """
    source, out = open_source(config), open_place(config.out, config.store)
    src = str(resolve_path(config.src, config.store))
    bundle = read_bundle_facts(
        locate_bundle(config.bundle, config.store),
        expect_sha256=config.expect_sha256,
        allow_pickle=config.allow_pickle,
    )

    run_plan = RunPlan(
        out=out,
        command="score",
        settings={
            **effective_settings(config),
            "src": src,
            "bundle": bundle.fingerprint,
        },
        config={
            **effective_settings(config),
            "src": src,
            "bundle": config.bundle and str(bundle.path),
            "max_error_rate": config.max_error_rate,
            "allow_pickle": config.allow_pickle,
        },
        list_source=source.list_images,
        shard_rows=config.shard_size,
    )

    make_work = MakeScoreWork(
        bundle=bundle,
        threshold=bundle.threshold(config.target_fpr),
        batch_size=config.batch_size,
    )
    plan = BatchPlan(
        config, run_plan, config.device, source, make_work, on_progress, started_s, say
    )
    if config.dry_run:
        return plan_batch(plan, "score")
    summary = run_batch(plan)
    if bundle.domain and summary.unlike_training["any"]:
        say(f"score: {describe_unlike(summary.unlike_training, summary.done, bundle.domain)}")
    return summary
