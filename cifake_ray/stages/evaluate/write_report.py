"""Write metrics, figures and the page of an evaluation from its predictions."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cifake_ray.config import EvaluateConfig
from cifake_ray.core.evaluation.calibration import Calibration
from cifake_ray.core.schema import SCORE_FIELDS
from cifake_ray.errors import UsageError
from cifake_ray.report.figures import draw_figures
from cifake_ray.report.grid import draw_grid_figures
from cifake_ray.report.html import render_report
from cifake_ray.report.slices_text import ROW_NAMES, list_rows
from cifake_ray.report.text import describe_domain, describe_unlike, format_threshold
from cifake_ray.stages.evaluate.examples import find_examples
from cifake_ray.stages.evaluate.grid import measure_cells
from cifake_ray.stages.evaluate.measure import compare_real_sources, measure, measure_slices
from cifake_ray.storage.bundles.bundle import BundleInfo, load_bundle
from cifake_ray.storage.io.files import hash_json, make_folder, write_bytes, write_json
from cifake_ray.storage.io.text_rows import encode_csv
from cifake_ray.storage.runs.export_tables import escape_formulas
from cifake_ray.storage.runs.run import Run
from cifake_ray.storage.runs.shards import read_shard
from cifake_ray.storage.runs.train_run import read_history
from cifake_ray.storage.sources.source import Source
from cifake_ray.version import __version__

MEASURED_FIELDS = [
    f for f in SCORE_FIELDS if f.name in ("key", "logit", "p_fake", "error", "label", "source")
]


@dataclass(frozen=True)
class Detail:
    """What the scores mean."""

    calibration: Calibration  # with the threshold that is used
    split: str | None
    started_s: float  # of the command, by time.monotonic
    detector: str = ""  # what has made the scores, if not `bundle`
    bundle: BundleInfo | None = None


def write_report(run: Run, source: Source, config: EvaluateConfig, detail: Detail) -> None:
    """Write metrics.json, slices.csv, figures/*.svg and report.html from a run's predictions."""
    bundle, calibration, split = detail.bundle, detail.calibration, detail.split
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
    metrics = measure(scored, calibration, config.num_bootstrap)
    thresholds = bundle.list_thresholds() if bundle else {}
    metrics["operating_points"] = measure_operating_points(scored, thresholds)
    slices = measure_slices(scored, config.slice, calibration.threshold, config.num_bootstrap)
    metrics["slices"] = slices
    metrics["real_vs_real"] = compare_real_sources(scored, config.num_bootstrap)
    figures = draw_figures(metrics, history=read_history(bundle.path) if bundle else [])
    grid = measure_cells(run, scored, calibration)
    grid_figures = draw_grid_figures(grid) if grid else {}
    metrics |= {"grid": grid} if grid else {}
    command = ["cifake-ray evaluate", config.shards, "--out", config.out]
    for flag, value in (
        ("--bundle", config.bundle),
        ("--split", config.split),
        ("--grid", config.grid),
    ):
        command += [flag, value] if value else []
    command += ["--unseen"] * config.unseen + ["--gradient-maps"] * config.gradient_maps
    command += [] if config.threshold is None else ["--threshold", f"{config.threshold:g}"]
    command += [word for name in config.slice for word in ("--slice", name)]
    facts = {
        "Command": " ".join(command),
        "cifake-ray": __version__,
        "Listing (sha256)": hash_json([file.sha256 for file in run.manifest.files]),
        "Split": split or "all rows",
        "Temperature": f"{calibration.temperature:.4f}",
        "Threshold": format_threshold(calibration.threshold),
    }
    if bundle:
        facts |= {
            "Architecture": bundle.architecture,
            "Bundle": bundle.fingerprint,
            "Precision": run.settings.get("precision", "float32"),
            "Threshold for 1% FPR": format_threshold(calibration.threshold_fpr_1),
            "Threshold for 0.1% FPR": format_threshold(calibration.threshold_fpr_01),
        }
        if crops := bundle.preprocessing.num_crops:
            facts["Crops of an image"] = f"{crops} at most, of {bundle.preprocessing.image_size} px"
    detector = None
    if bundle and config.gradient_maps:  # in float32, whatever the precision of the scores
        detector, _ = load_bundle(
            bundle.path,
            expect_sha256=config.expect_sha256,
            allow_pickle=config.allow_pickle,
            fake_class=bundle.fake_class,
        )
    name = config.shards.rstrip("/").rpartition("/")[2]
    page = render_report(
        title=f"{bundle.architecture if bundle else 'Scores'} on {name}"
        + (f", split {split}" if split else ""),
        context=describe_context(metrics, facts, detail),
        warnings=list_warnings(scored, detail, is_unseen=config.unseen),
        metrics=metrics,
        figures=figures,
        examples=find_examples(run, source, scored, detector) if bundle else {},
        facts=facts,
        errors={row["values"]: row["counts"] for row in errors},
        grid_figures=grid_figures,
    )
    make_folder(run.out / "figures", parents=False)
    for name, svg in {**figures, **grid_figures}.items():
        write_bytes(run.out / "figures" / f"{name}.svg", svg)
    write_json(run.out / "metrics.json", {**metrics, "facts": facts})
    write_bytes(run.out / "slices.csv", encode_slices(slices))
    write_bytes(run.out / "report.html", page.encode())


def measure_operating_points(
    scored: pa.Table, thresholds: Mapping[str, float]
) -> dict[str, dict[str, Any]]:
    """Return threshold and confusion (labelled i, called j) of all but the default threshold."""
    label, p_fake = (scored.column(name).to_numpy() for name in ("label", "p_fake"))
    points = {}
    for name in thresholds.keys() - {"default"}:
        counts = np.bincount(2 * label + (p_fake >= thresholds[name]), minlength=4)
        points[name] = {"threshold": thresholds[name], "confusion": counts.reshape(2, 2).tolist()}
    return dict(sorted(points.items(), reverse=True))  # 1% before 0.1%


def describe_context(
    metrics: Mapping[str, Any], facts: Mapping[str, str], detail: Detail
) -> dict[str, str]:
    """Return what a reader wants to know first: which detector measured which data, and when."""
    minutes, seconds = divmod(round(time.monotonic() - detail.started_s), 60)
    bundle = detail.bundle
    detector = {"Detector": detail.detector}
    if bundle:
        name = f"{bundle.architecture}, bundle {bundle.fingerprint[:12]}, in {facts['Precision']}"
        detector = {"Detector": name, "Trained on": describe_domain(bundle.domain)}
    sources = metrics["slices"].get("source", [])
    split = f"split {detail.split}" if detail.split else "all rows"
    return {
        **detector,
        "Data": f"{metrics['num_images']:,} images: {metrics['num_real']:,} REAL and"
        f" {metrics['num_fake']:,} FAKE{f' of {len(sources)} sources' if sources else ''},"
        f" {split}; listing {facts['Listing (sha256)'][:12]}",
        "Measured": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, in {minutes} min {seconds} s, on"
        f" {platform.system()} {platform.machine()} with {os.cpu_count()} CPUs",
    }


def list_warnings(scored: pa.Table, detail: Detail, *, is_unseen: bool) -> list[str]:
    """Return why the numbers may not be believed, as the terminal says it."""
    warnings = []
    if detail.bundle and detail.split is None and not is_unseen:
        warnings.append(
            "There is no split `test`, so all labelled images are measured; those the detector was"
            " trained on look better than others would."
        )
    if detail.bundle and detail.bundle.domain:
        unlike = detail.bundle.domain.count_unlike(scored)
        if unlike["any"]:
            text = describe_unlike(unlike, scored.num_rows, detail.bundle.domain)
            warnings.append(f"{text}.")
    return warnings


def encode_slices(slices: dict[str, list[dict[str, Any]]]) -> bytes:
    """Return slices.csv: a row for each slice, with interval and reason of each metric."""
    rows = list(list_rows(slices))
    values = pa.array([row["value"] for row in rows], pa.string())
    escaped = escape_formulas(values).to_pylist()
    return encode_csv(ROW_NAMES, [row | {"value": v} for row, v in zip(rows, escaped, strict=True)])
