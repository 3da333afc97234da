"""evaluate: labelled shards and a bundle -> predictions, metrics and a report.

The shards are scored exactly as `score` would do it; the report is computed from the predictions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cifake_ray.config import EvaluateConfig
from cifake_ray.core.labels import parse_split
from cifake_ray.errors import NothingToDo, StorageError, UsageError
from cifake_ray.report.text import KEY_METRICS, describe_unlike
from cifake_ray.stages.batch.driver import BatchPlan, run_batch
from cifake_ray.stages.batch.plan import DryRun
from cifake_ray.stages.batch.summary import BatchSummary, Progress
from cifake_ray.stages.evaluate.write_report import write_report
from cifake_ray.stages.score import MakeScoreProcessor, resolve_precision
from cifake_ray.storage.bundles.bundle import read_bundle_info
from cifake_ray.storage.io.files import exists, read_json
from cifake_ray.storage.io.paths import AnyPath, link_path
from cifake_ray.storage.io.records import parse_record
from cifake_ray.storage.sources.parquet import ParquetSource, choose_columns, find_splits

SUMMARY_METRICS = ("num_images", "num_real", "num_fake", *(key for key, _, _ in KEY_METRICS))


@dataclass(frozen=True)
class EvaluateSummary(BatchSummary):
    """Summary of an evaluation, with what is on top of its report."""

    metrics: dict[str, Any] = field(default_factory=dict)  # of `compute_metrics`: SUMMARY_METRICS
    report: str = ""  # a link


def evaluate_detector(
    config: EvaluateConfig,
    shards: AnyPath,
    out: AnyPath,
    bundle_path: AnyPath,
    on_progress: Callable[[Progress], None],
    started_s: float,
    log: Callable[[str], None] = lambda message: None,
) -> BatchSummary | DryRun:
    """Score `shards`, measure, and write the report into `out`."""
    bundle = read_bundle_info(
        bundle_path, expect_sha256=config.expect_sha256, allow_pickle=config.allow_pickle
    )
    splits = find_splits(shards)
    split = parse_split(config.split) or ("test" if "test" in splits else None)
    if split is not None and split not in splits:
        names = ", ".join(sorted(splits)) or "none"
        raise UsageError(f"--split {config.split}: {shards} has no such split, it has {names}")
    source = ParquetSource(
        shards,
        choose_columns(shards),
        split=split,
        labelled=True,
        min_shard_rows=config.shard_size,
    )
    if next(iter(source.list_images().batches), None) is None:
        raise NothingToDo(
            f"{shards}: no labelled image{f' in the split {split}' if split else ''}; give the"
            " output of convert for folders named REAL and FAKE, or for a list with labels"
        )
    if split is None:
        log(
            "evaluate: there is no split `test`, so all labelled images are measured; those the"
            " detector was trained on look better than others would"
        )
    threshold = bundle.threshold(None)
    precision = resolve_precision(config, bundle, out)
    plan = BatchPlan(
        command="evaluate",
        config=config,
        out=out,
        source=source,
        paths={"shards": str(shards), "bundle": config.bundle and str(bundle.path)},
        inputs={"split": split, "bundle": bundle.identify(precision), "precision": precision},
        facts={"bundle": str(bundle.path), "threshold": threshold, "precision": precision},
        device=config.device,
        make_processor=MakeScoreProcessor(bundle, threshold, config.batch_size, precision),
        threshold=threshold,
        thresholds=bundle.list_thresholds(),
        on_progress=on_progress,
        started_s=started_s,
        log=log,
        before_success=lambda run: write_report(run, source, bundle, config, split, started_s),
    )
    if precision in bundle.checks:
        log(f"evaluate: computing in {precision}: {bundle.checks[precision]}")
    result = run_batch(plan)
    if not isinstance(result, BatchSummary):
        return result
    if bundle.domain and result.unlike_training["any"]:
        log(f"evaluate: {describe_unlike(result.unlike_training, result.done, bundle.domain)}")
    return summarise(out, result)


def summarise(out: AnyPath, summary: BatchSummary) -> EvaluateSummary:
    """Add the main metrics, and a link to the report, of a run that has finished."""
    # A person may have removed it.
    metrics = read_metrics(out) if exists(out / "metrics.json") else {}
    return EvaluateSummary(
        **vars(summary),
        metrics={name: metrics[name] for name in SUMMARY_METRICS if name in metrics},
        report=link_path(out / "report.html"),
    )


@dataclass(frozen=True)
class _Interval:
    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class _Metrics:
    """What others read of `metrics.json`."""

    num_images: int
    num_real: int
    num_fake: int
    accuracy: _Interval
    auroc: _Interval
    tpr_at_fpr_1pct: _Interval


def read_metrics(out: AnyPath) -> dict[str, Any]:
    """Return the metrics of a finished run. StorageError when they are missing or damaged."""
    path = out / "metrics.json"
    metrics = read_json(path)
    try:
        parse_record(_Metrics, metrics)
    except ValueError as error:
        raise StorageError(
            f"{path}: not the metrics of an evaluation ({error}); remove {out / '_SUCCESS'} and run"
            " the same command again"
        ) from error
    return metrics
