"""evaluate: labelled shards and a bundle -> predictions, metrics and a report.

The shards are scored exactly as `score` would do it; the report is computed from the predictions.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from cifake_ray.config import EvaluateConfig
from cifake_ray.core.evaluation.metrics import RANKING_METRICS, compute_metrics
from cifake_ray.core.imaging.decode import decode_image
from cifake_ray.core.imaging.preprocessing import fit_image
from cifake_ray.core.labels import parse_split
from cifake_ray.core.schema import FAKE, REAL, SCORE_FIELDS
from cifake_ray.errors import ImageError, NothingToDo, StorageError, UsageError
from cifake_ray.report.figures import draw_figures
from cifake_ray.report.html import Mistake, render_report
from cifake_ray.report.text import KEY_METRICS, describe_unlike, format_threshold
from cifake_ray.stages.batch.driver import BatchPlan, run_batch
from cifake_ray.stages.batch.plan import DryRun
from cifake_ray.stages.batch.summary import BatchSummary, Progress
from cifake_ray.stages.score import MakeScoreProcessor, resolve_precision
from cifake_ray.storage.bundles.bundle import BundleInfo, read_bundle_info
from cifake_ray.storage.io.files import exists, make_folder, read_json, write_bytes, write_json
from cifake_ray.storage.io.paths import AnyPath, link_path
from cifake_ray.storage.io.records import parse_record
from cifake_ray.storage.runs.manifest import read_manifest_shard
from cifake_ray.storage.runs.run import Run
from cifake_ray.storage.runs.shards import read_shard
from cifake_ray.storage.runs.train_run import read_history
from cifake_ray.storage.sources.parquet import ParquetSource, choose_columns, find_splits
from cifake_ray.version import __version__

MAX_MISTAKES = 48  # on the contact sheet, half of each kind
THUMBNAIL_SIZE = 96  # pixels; smaller images stay as they are
MIN_SLICE_IMAGES = 30  # with fewer, the interval of a slice is too wide to be useful
MAX_SLICES = 50
MEASURED_FIELDS = [
    f for f in SCORE_FIELDS if f.name in ("key", "logit", "p_fake", "error", "label", "source")
]
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
        before_success=lambda run: write_report(run, source, bundle, config, split),
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


def write_report(
    run: Run, source: ParquetSource, bundle: BundleInfo, config: EvaluateConfig, split: str | None
) -> None:
    """Write metrics.json, figures/*.png and report.html from the predictions of a run."""
    shards = range(run.manifest.num_shards)
    predictions = pa.concat_tables(
        [read_shard(run.shard_path(shard), MEASURED_FIELDS) for shard in shards]
    )
    scored = predictions.filter(pc.is_null(predictions.column("error")))
    errors = pc.value_counts(predictions.column("error").drop_null()).to_pylist()
    if not scored.num_rows:
        raise UsageError(
            f"{config.shards}: not one image could be scored; see {run.results_folder}"
        )
    unlike = bundle.domain.count_unlike(scored) if bundle.domain else {"any": 0}
    metrics = measure(scored, bundle, config.num_bootstrap)
    slices = measure_slices(scored, bundle)
    figures = draw_figures(metrics, history=read_history(bundle.path), slices=slices)
    command = ["cifake-ray evaluate", config.shards, "--out", config.out]
    for flag, value in (("--bundle", config.bundle), ("--split", config.split)):
        command += [flag, value] if value else []
    facts = {
        "Command": " ".join(command),
        "cifake-ray": __version__,
        "Architecture": bundle.architecture,
        "Bundle": bundle.fingerprint,
        "Split": split or "all rows",
        "Precision": run.settings.get("precision", "float32"),
        "Temperature": f"{bundle.calibration.temperature:.4f}",
        "Threshold": format_threshold(bundle.calibration.threshold),
        "Threshold for 1% FPR": format_threshold(bundle.calibration.threshold_fpr_1),
        "Threshold for 0.1% FPR": format_threshold(bundle.calibration.threshold_fpr_01),
    }
    page = render_report(
        title=f"{bundle.architecture} on {source.root.name}"
        + (f", split {split}" if split else ""),
        metrics=metrics,
        figures=figures,
        mistakes=find_mistakes(run, source, scored),
        facts=facts,
        errors={row["values"]: row["counts"] for row in errors},
        slices=slices,
        unlike=describe_unlike(unlike, scored.num_rows, bundle.domain)
        if bundle.domain and unlike["any"]
        else "",
    )
    make_folder(run.out / "figures", parents=False)
    for name, png in figures.items():
        write_bytes(run.out / "figures" / f"{name}.png", png)
    write_json(run.out / "metrics.json", {**metrics, "slices": slices, "facts": facts})
    write_bytes(run.out / "report.html", page.encode())


def measure(scored: pa.Table, bundle: BundleInfo, num_bootstrap: int) -> dict[str, Any]:
    """Return the metrics of some predictions."""
    return compute_metrics(
        scored.column("logit").to_numpy(),
        scored.column("label").to_numpy(),
        temperature=bundle.calibration.temperature,
        threshold=bundle.calibration.threshold,
        num_bootstrap=num_bootstrap,
    )


def measure_slices(scored: pa.Table, bundle: BundleInfo) -> dict[str, dict[str, Any]]:
    """Return the metrics of each source, largest first; none when there is only one."""
    counts = pc.value_counts(scored.column("source").drop_null()).to_pylist()
    counts = sorted(counts, key=lambda row: (-row["counts"], row["values"]))[:MAX_SLICES]
    if len(counts) < 2:
        return {}
    return {
        row["values"]: measure_slice(scored, row["values"], bundle)
        for row in counts
        if row["counts"] >= MIN_SLICE_IMAGES
    }


def measure_slice(scored: pa.Table, source: str, bundle: BundleInfo) -> dict[str, Any]:
    """Return the metrics of one source.

    A source of one class, such as a generator, is ranked against all images of the other class.
    """
    rows = scored.filter(pc.equal(scored.column("source"), source))
    metrics = measure(rows, bundle, 0)
    labels = rows.column("label").unique()
    if len(labels) == 1:
        others = scored.filter(pc.not_equal(scored.column("label"), labels[0]))
        against = measure(pa.concat_tables([rows, others]), bundle, 0)
        metrics |= {name: against[name] for name in RANKING_METRICS}
    return metrics


def find_mistakes(run: Run, source: ParquetSource, scored: pa.Table) -> list[Mistake]:
    """Return the mistakes with the most extreme logits of each kind, with thumbnails."""
    label = scored.column("label").to_numpy()
    logit = scored.column("logit").to_numpy()
    is_wrong = label != (scored.column("p_fake").to_numpy() >= 0.5)  # as the report counts them
    chosen: list[int] = []
    for kind, sign in ((REAL, 1), (FAKE, -1)):
        wrong = np.flatnonzero((label == kind) & is_wrong)
        chosen += wrong[np.argsort(-sign * logit[wrong], kind="stable")][
            : MAX_MISTAKES // 2
        ].tolist()
    by_key = {row["key"]: row for row in scored.take(chosen).to_pylist()}
    mistakes = []
    for shard in range(run.manifest.num_shards):
        rows = read_manifest_shard(run.manifest_folder, run.find_file(shard), shard)
        rows = rows.filter(pc.is_in(rows.column("key"), pa.array(list(by_key), pa.string())))
        for key, data in zip(rows.column("key").to_pylist(), source.read_images(rows), strict=True):
            if isinstance(data, ImageError):
                continue  # the shards have changed since it was scored
            row = by_key[key]
            mistakes.append(
                Mistake(key=key, label=row["label"], p_fake=row["p_fake"], png=make_thumbnail(data))
            )
    return mistakes


def make_thumbnail(data: bytes) -> bytes:
    """Return a PNG of an image, resized to THUMBNAIL_SIZE if it is larger."""
    pixels = decode_image(data)
    if max(pixels.shape[:2]) > THUMBNAIL_SIZE:
        pixels = fit_image(pixels, size=THUMBNAIL_SIZE, fit="resize")
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
