"""evaluate: labelled images and a bundle, or scores -> predictions, metrics and a report.

Images are scored exactly as `score` would do it; the report is computed from the predictions.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from cifake_ray.config import EvaluateConfig
from cifake_ray.core.evaluation.buckets import check_slices
from cifake_ray.core.evaluation.calibration import Calibration
from cifake_ray.core.models.gradient_maps import check_captum
from cifake_ray.core.processing.stored_scores import StoredScoreProcessor
from cifake_ray.core.schema import CROP_FIELDS, MANIFEST_FIELDS, SCORE_FIELDS
from cifake_ray.errors import StorageError, UsageError
from cifake_ray.report.slices_text import find_worst_source
from cifake_ray.report.text import KEY_METRICS, describe_unlike
from cifake_ray.stages.batch.driver import run_batch
from cifake_ray.stages.batch.plan import BatchPlan, DryRun
from cifake_ray.stages.batch.summary import BatchSummary, Progress
from cifake_ray.stages.evaluate.grid import GridSummary, MakeGridProcessor, summarise_grid
from cifake_ray.stages.evaluate.inputs import (
    choose_split,
    find_scores,
    find_seen,
    find_temperature,
    open_labelled,
    read_first_schema,
)
from cifake_ray.stages.evaluate.write_report import Detail, write_report
from cifake_ray.stages.resources import Placement
from cifake_ray.stages.score import MakeScoreProcessor, read_run_bundle, resolve_precision
from cifake_ray.storage.bundles.built_ins import name_bundle
from cifake_ray.storage.io.files import exists, read_json
from cifake_ray.storage.io.paths import AnyPath, link_path
from cifake_ray.storage.io.records import parse_record
from cifake_ray.storage.presets.grid import read_grid
from cifake_ray.storage.sources.labelled import LabelledSource
from cifake_ray.storage.sources.open_source import check_outside
from cifake_ray.storage.sources.score_tables import ScoreTables

SUMMARY_METRICS = ("num_images", "num_real", "num_fake", *(key for key, _, _ in KEY_METRICS))


@dataclass(frozen=True)
class EvaluateSummary(BatchSummary):
    """Summary of an evaluation, with what is on top of its report."""

    metrics: dict[str, Any] = field(default_factory=dict)  # SUMMARY_METRICS, worst source and floor
    report: str = ""  # a link


def evaluate_detector(
    config: EvaluateConfig,
    shards: AnyPath,
    out: AnyPath,
    bundle_path: AnyPath | None,
    on_progress: Callable[[Progress], None],
    started_s: float,
    log: Callable[[str], None] = lambda message: None,
) -> BatchSummary | DryRun:
    """Score `shards`, measure, and write the report into `out`.

    Without `bundle_path` the built-in detector is measured that fits the images.
    """
    scores = find_scores(config, shards)
    if scores is not None:
        return measure_scores(config, shards, out, *scores, on_progress, started_s, log)
    if config.gradient_maps:
        check_captum()
    source = open_labelled(config, shards, out)
    place = shards, config.shards
    bundle = read_run_bundle("evaluate", config, bundle_path, source, place, out, log)
    if config.unseen:
        source = LabelledSource(source, seen=find_seen(config, shards, bundle))
    split = choose_split(config, source, shards, out)
    source = replace(source, split=split)
    listed = read_first_schema(source, shards, split)
    check_slices(config.slice, describe_predictions(listed, bundle.preprocessing.num_crops))
    if split is None and not config.unseen:
        log(
            "evaluate: there is no split `test`, so all labelled images are measured; those the"
            " detector was trained on look better than others would (--unseen leaves them out)"
        )
    calibration = bundle.calibration
    if config.threshold is not None:
        calibration = replace(calibration, threshold=round_threshold(config.threshold))
    threshold = calibration.threshold
    precision = resolve_precision(config, bundle, out)
    detail = Detail(calibration, split, started_s, bundle=bundle)
    grid = read_grid(config)
    make_processor = MakeScoreProcessor(bundle, threshold, config.batch_size, precision)
    plan = BatchPlan(
        command="evaluate",
        config=config,
        out=out,
        source=source,
        paths={
            "shards": str(shards),
            "bundle": name_bundle(bundle.path),
            **({"grid": json.dumps(grid)} if grid else {}),
        },
        inputs={"split": split, "bundle": bundle.identify(precision), "precision": precision},
        facts={"bundle": str(bundle.path), "threshold": threshold, "precision": precision},
        device=config.device,
        make_processor=MakeGridProcessor(make_processor, grid) if grid else make_processor,
        threshold=threshold,
        thresholds=bundle.list_thresholds() | {"default": threshold},
        on_progress=on_progress,
        started_s=started_s,
        log=log,
        before_success=lambda run: write_report(run, source, config, detail),
    )
    if precision in bundle.checks:
        log(f"evaluate: computing in {precision}: {bundle.checks[precision]}")
    result = run_batch(plan)
    if not isinstance(result, BatchSummary):
        return result
    if bundle.domain and result.unlike_training["any"]:
        log(f"evaluate: {describe_unlike(result.unlike_training, result.done, bundle.domain)}")
    return summarise(out, result)


def measure_scores(
    config: EvaluateConfig,
    place: AnyPath,
    out: AnyPath,
    tables: ScoreTables,
    threshold: float,
    detector: str,
    on_progress: Callable[[Progress], None],
    started_s: float,
    log: Callable[[str], None],
) -> BatchSummary | DryRun:
    """Measure scores that exist already, without a detector, and write the report into `out`."""
    for option, value in (
        ("--bundle", config.bundle),
        ("--unseen", config.unseen),
        ("--grid", config.grid),
        ("--gradient-maps", config.gradient_maps),
    ):
        if value:
            raise UsageError(
                f"{option}: {place} holds scores, which are measured as they are, without a"
                " detector; leave it out, or give --source-kind if it holds images"
            )
    check_outside(out, place)
    labelled = LabelledSource(tables)
    split = choose_split(config, labelled, place, out)
    source = replace(labelled, split=split)
    check_slices(config.slice, describe_predictions(read_first_schema(source, place, split)))
    threshold = round_threshold(threshold if config.threshold is None else config.threshold)
    log(f"evaluate: {place} holds scores: they are measured as they are, without a detector")
    calibration = Calibration(
        temperature=find_temperature(source),
        threshold=threshold,
        threshold_fpr_1=None,
        threshold_fpr_01=None,
    )
    detail = Detail(calibration, split, started_s, detector=detector)
    plan = BatchPlan(
        command="evaluate",
        config=config,
        out=out,
        source=source,
        paths={"shards": str(place)},
        inputs={"split": split, "bundle": None},
        facts={"threshold": threshold},
        make_processor=MakeStoredScoreProcessor(threshold),
        threshold=threshold,
        on_progress=on_progress,
        started_s=started_s,
        log=log,
        before_success=lambda run: write_report(run, source, config, detail),
    )
    result = run_batch(plan)
    return summarise(out, result) if isinstance(result, BatchSummary) else result


@dataclass(frozen=True)
class MakeStoredScoreProcessor:
    """Makes the processor of scores inside the worker, which needs no torch."""

    threshold: float

    def __call__(self, placement: Placement) -> StoredScoreProcessor:
        return StoredScoreProcessor(self.threshold)


def round_threshold(threshold: float) -> float:
    """Return the float32 nearest to a threshold: p_fake is float32, and 0.7 is not."""
    return float(np.float32(threshold))


def describe_predictions(listed: pa.Schema, num_crops: int | None = None) -> pa.Schema:
    """Return the columns of the predictions of rows that are listed."""
    measured = [*SCORE_FIELDS, *(CROP_FIELDS if num_crops else [])]
    known = {field.name for field in [*MANIFEST_FIELDS, *measured]}
    return pa.schema([*measured, *(field for field in listed if field.name not in known)])


def summarise(out: AnyPath, summary: BatchSummary) -> EvaluateSummary:
    """Add the main metrics, and a link to the report, of a run that has finished."""
    # A person may have removed it.
    metrics = read_metrics(out) if exists(out / "metrics.json") else {}
    slices, floor = metrics.get("slices", {}), metrics.get("real_vs_real")
    shown = {name: metrics[name] for name in SUMMARY_METRICS if name in metrics}
    if isinstance(slices.get("source"), list):  # else of a version before
        shown["worst_source"] = find_worst_source(slices)
    if floor is not None:
        shown["real_vs_real"] = {**floor, "pairs": floor["pairs"][:1]}
    return EvaluateSummary(
        **vars(summary),
        metrics=shown | summarise_grid(metrics.get("grid")),
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
    grid: GridSummary | None = None


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
