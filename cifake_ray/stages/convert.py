"""convert: images -> Parquet shards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cifake_ray.config import ConvertConfig
from cifake_ray.core.processing.convert import ConvertProcessor
from cifake_ray.core.processing.reencode import Reencoder
from cifake_ray.stages.batch.driver import run_batch
from cifake_ray.stages.batch.plan import BatchPlan, DryRun
from cifake_ray.stages.batch.summary import BatchSummary, Progress
from cifake_ray.stages.resources import Placement
from cifake_ray.storage.io.paths import AnyPath
from cifake_ray.storage.s3.location import open_path
from cifake_ray.storage.sources.open_source import open_source


@dataclass(frozen=True)
class MakeConvertProcessor:
    """Makes the processor of a worker, the same for every placement."""

    reencoder: Reencoder | None

    def __call__(self, placement: Placement) -> ConvertProcessor:
        return ConvertProcessor(self.reencoder)


def convert_images(
    config: ConvertConfig,
    src: AnyPath,
    out: AnyPath,
    on_progress: Callable[[Progress], None],
    started_s: float,
    log: Callable[[str], None] = lambda message: None,
) -> BatchSummary | DryRun:
    """Convert the images of `src` to shards below `out`. The same call again resumes."""
    reencoder = None
    if config.reencode is not None:
        reencoder = Reencoder(config.reencode, config.reencode_size, config.reencode_fit)
    audit, choose_listed = None, None
    if config.audit is not None:
        from cifake_ray.storage.runs.audit_rows import AuditedRows, require_audit  # brings scipy

        audit = require_audit(open_path(config.audit, config.store))
        choose_listed = AuditedRows(audit, config).choose
    plan = BatchPlan(
        command="convert",
        config=config,
        out=out,
        source=open_source(config, src, out),
        paths={"src": str(src), "audit": str(audit.out) if audit else None},
        inputs={"audit": audit and audit.identity},
        choose_listed=choose_listed,
        needs_labels=True,
        make_processor=MakeConvertProcessor(reencoder),
        on_progress=on_progress,
        started_s=started_s,
        log=log,
    )
    return run_batch(plan)
