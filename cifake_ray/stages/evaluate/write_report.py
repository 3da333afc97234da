"""Write metrics, figures and the page of an evaluation from its predictions."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cifake_ray.config import EvaluateConfig
from cifake_ray.core.schema import SCORE_FIELDS
from cifake_ray.errors import UsageError
from cifake_ray.report.figures import draw_figures
from cifake_ray.report.html import render_report
from cifake_ray.report.text import describe_domain, describe_unlike, format_threshold
from cifake_ray.stages.evaluate.examples import find_examples
from cifake_ray.stages.evaluate.measure import compare_real_sources, measure, measure_slices
from cifake_ray.storage.bundles.bundle import BundleInfo
from cifake_ray.storage.io.files import hash_json, make_folder, write_bytes, write_json
from cifake_ray.storage.runs.run import Run
from cifake_ray.storage.runs.shards import read_shard
from cifake_ray.storage.runs.train_run import read_history
from cifake_ray.storage.sources.parquet import ParquetSource
from cifake_ray.version import __version__

NO_SPLIT = (
    "There is no split `test`, so all labelled images are measured; those the detector was trained"
    " on look better than others would"
)
MEASURED_FIELDS = [
    f for f in SCORE_FIELDS if f.name in ("key", "logit", "p_fake", "error", "label", "source")
]


def write_report(
    run: Run,
    source: ParquetSource,
    bundle: BundleInfo,
    config: EvaluateConfig,
    split: str | None,
    started_s: float,
) -> None:
    """Write metrics.json, figures/*.svg and report.html from the predictions of a run."""
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
    calibration = bundle.calibration
    metrics = measure(scored, calibration, config.num_bootstrap)
    metrics["operating_points"] = measure_operating_points(scored, bundle.list_thresholds())
    metrics["slices"] = measure_slices(scored, (), calibration.threshold, config.num_bootstrap)
    metrics["real_vs_real"] = compare_real_sources(scored, config.num_bootstrap)
    figures = draw_figures(metrics, history=read_history(bundle.path))
    command = ["cifake-ray evaluate", config.shards, "--out", config.out]
    for flag, value in (("--bundle", config.bundle), ("--split", config.split)):
        command += [flag, value] if value else []
    facts = {
        "Command": " ".join(command),
        "cifake-ray": __version__,
        "Architecture": bundle.architecture,
        "Bundle": bundle.fingerprint,
        "Listing (sha256)": hash_json([file.sha256 for file in run.manifest.files]),
        "Split": split or "all rows",
        "Precision": run.settings.get("precision", "float32"),
        "Temperature": f"{calibration.temperature:.4f}",
        "Threshold": format_threshold(calibration.threshold),
        "Threshold for 1% FPR": format_threshold(calibration.threshold_fpr_1),
        "Threshold for 0.1% FPR": format_threshold(calibration.threshold_fpr_01),
    }
    title = f"{bundle.architecture} on {source.root.name}" + (f", split {split}" if split else "")
    page = render_report(
        title=title,
        context=describe_context(bundle, metrics, facts, started_s),
        warnings=list_warnings(scored, bundle, split),
        metrics=metrics,
        figures=figures,
        examples=find_examples(run, source, scored),
        facts=facts,
        errors={row["values"]: row["counts"] for row in errors},
    )
    make_folder(run.out / "figures", parents=False)
    for name, svg in figures.items():
        write_bytes(run.out / "figures" / f"{name}.svg", svg)
    write_json(run.out / "metrics.json", {**metrics, "facts": facts})
    write_bytes(run.out / "report.html", page.encode())


def measure_operating_points(
    scored: pa.Table, thresholds: Mapping[str, float]
) -> dict[str, dict[str, Any]]:
    """Return threshold and confusion (labelled i, called j) of all but the default threshold."""
    label, p_fake = (scored.column(name).to_numpy() for name in ("label", "p_fake"))
    return {
        name: {
            "threshold": threshold,
            "confusion": np.bincount(2 * label + (p_fake >= threshold), minlength=4)
            .reshape(2, 2)
            .tolist(),
        }
        for name, threshold in thresholds.items()
        if name != "default"
    }


def describe_context(
    bundle: BundleInfo, metrics: Mapping[str, Any], facts: Mapping[str, str], started_s: float
) -> dict[str, str]:
    """Return what a reader wants to know first: which detector measured which data, and when."""
    sources = len(metrics["slices"].get("source", []))
    minutes, seconds = divmod(time.monotonic() - started_s, 60)
    return {
        "Detector": f"{bundle.architecture}, bundle {bundle.fingerprint[:12]}. Its training"
        f" images: {describe_domain(bundle.domain)}",
        "Data": f"{metrics['num_images']:,} images: {metrics['num_real']:,} REAL and"
        f" {metrics['num_fake']:,} FAKE"
        + (f" of {sources} sources" if sources else "")
        + f"; {facts['Split']}; listing {facts['Listing (sha256)'][:12]}",
        "Measured": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC in {facts['Precision']}, in"
        f" {minutes:.0f} min {seconds:.0f} s, on {platform.system()} {platform.machine()} with"
        f" {os.cpu_count()} CPUs",
    }


def list_warnings(scored: pa.Table, bundle: BundleInfo, split: str | None) -> list[str]:
    """Return why the numbers may not be believed, as the terminal says it."""
    warnings = []
    if split is None:
        warnings.append(NO_SPLIT)
    if bundle.domain:
        unlike = bundle.domain.count_unlike(scored)
        if unlike["any"]:
            warnings.append(describe_unlike(unlike, scored.num_rows, bundle.domain))
    return [f"{warning}." for warning in warnings]
