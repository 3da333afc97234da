"""convert: images -> Parquet shards."""

from __future__ import annotations

from collections.abc import Callable

from cifake_ray.config import ConvertConfig
from cifake_ray.core.processing.convert import ConvertProcessor
from cifake_ray.stages.batch.driver import BatchPlan, run_batch
from cifake_ray.stages.batch.plan import DryRun
from cifake_ray.stages.batch.summary import BatchSummary, Progress
from cifake_ray.stages.resources import Placement
from cifake_ray.storage.io.paths import AnyPath
from cifake_ray.storage.sources.open_source import open_source


def make_processor(placement: Placement) -> ConvertProcessor:
    """Return the processor of a worker, the same for every placement."""
    return ConvertProcessor()


def convert_images(
    config: ConvertConfig,
    src: AnyPath,
    out: AnyPath,
    on_progress: Callable[[Progress], None],
    started_s: float,
    log: Callable[[str], None] = lambda message: None,
) -> BatchSummary | DryRun:
    """Convert the images of `src` to shards below `out`. The same call again resumes."""
    plan = BatchPlan(
        command="convert",
        config=config,
        out=out,
        source=open_source(config, src, out),
        paths={"src": str(src)},
        needs_labels=True,
        make_processor=make_processor,
        on_progress=on_progress,
        started_s=started_s,
        log=log,
    )
    return run_batch(plan)
