"""convert: images -> Parquet shards.

Floor: stages.
"""

from __future__ import annotations

from collections.abc import Callable

from cifake_ray.config import ConvertConfig, fingerprint_settings
from cifake_ray.core.processing.convert import ConvertProcessor
from cifake_ray.stages.batch.driver import (
    BatchPlan,
    BatchSummary,
    DryRun,
    Progress,
    plan_batch,
    run_batch,
)
from cifake_ray.stages.cluster import Placement
from cifake_ray.storage.io.paths import resolve_path
from cifake_ray.storage.runs.run import RunPlan
from cifake_ray.storage.s3.location import open_path
from cifake_ray.storage.sources.open_source import open_source


def make_processor(placement: Placement) -> ConvertProcessor:
    """What each worker does; it needs to know nothing of the placement."""
    return ConvertProcessor()


def convert_images(
    config: ConvertConfig,
    on_progress: Callable[[Progress], None],
    started_s: float,
    log: Callable[[str], None] = lambda message: None,
) -> BatchSummary | DryRun:
    """Turn `config.src` into shards below `config.out`. The same call again resumes."""
    source, out = open_source(config), open_path(config.out, config.store)
    src = str(resolve_path(config.src, config.store))

    run_plan = RunPlan(
        out=out,
        command="convert",
        settings={**fingerprint_settings(config), "src": src},
        config={
            **fingerprint_settings(config),
            "src": src,
            "max_error_rate": config.max_error_rate,
        },
        list_source=source.list_images,
        shard_rows=config.shard_size,
    )

    plan = BatchPlan(config, run_plan, "cpu", source, make_processor, on_progress, started_s, log)
    return plan_batch(plan, "convert") if config.dry_run else run_batch(plan)
