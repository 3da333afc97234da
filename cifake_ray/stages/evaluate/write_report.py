"""Write metrics, figures and the page of an evaluation from its predictions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
from cifake_ray.report.text import describe_unlike, format_threshold
from cifake_ray.stages.evaluate.examples import find_mistakes
from cifake_ray.stages.evaluate.grid import measure_cells
from cifake_ray.stages.evaluate.measure import compare_real_sources, measure, measure_slices
from cifake_ray.storage.bundles.bundle import BundleInfo
from cifake_ray.storage.io.files import make_folder, write_bytes, write_json
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
    bundle: BundleInfo | None = None  # None for scores that were made elsewhere


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
    domain = bundle and bundle.domain
    unlike = domain.count_unlike(scored) if domain else {"any": 0}
    metrics = measure(scored, calibration, config.num_bootstrap)
    slices = measure_slices(scored, config.slice, calibration.threshold, config.num_bootstrap)
    floor = compare_real_sources(scored, config.num_bootstrap)
    sources = {found["value"]: found for found in slices.get("source", [])}
    history = read_history(bundle.path) if bundle else []
    figures = draw_figures(metrics, history=history, slices=sources)
    grid = measure_cells(run, scored, calibration)
    grid_figures = draw_grid_figures(grid) if grid else {}
    command = ["cifake-ray evaluate", config.shards, "--out", config.out]
    for flag, value in (
        ("--bundle", config.bundle),
        ("--split", config.split),
        ("--grid", config.grid),
    ):
        command += [flag, value] if value else []
    command += ["--unseen"] * config.unseen
    command += [] if config.threshold is None else ["--threshold", f"{config.threshold:g}"]
    command += [word for name in config.slice for word in ("--slice", name)]
    facts = {
        "Command": " ".join(command),
        "cifake-ray": __version__,
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
    name = config.shards.rstrip("/").rpartition("/")[2]
    page = render_report(
        title=f"{bundle.architecture if bundle else 'Scores'} on {name}"
        + (f", split {split}" if split else ""),
        metrics=metrics,
        figures=figures,
        mistakes=find_mistakes(run, source, scored) if bundle else [],
        facts=facts,
        errors={row["values"]: row["counts"] for row in errors},
        slices=sources,
        unlike=describe_unlike(unlike, scored.num_rows, domain) if domain and unlike["any"] else "",
        grid=grid,
        grid_figures=grid_figures,
    )
    make_folder(run.out / "figures", parents=False)
    for name, svg in {**figures, **grid_figures}.items():
        write_bytes(run.out / "figures" / f"{name}.svg", svg)
    stored = {**metrics, "slices": slices, "real_vs_real": floor, "facts": facts}
    write_json(run.out / "metrics.json", stored | ({"grid": grid} if grid else {}))
    write_bytes(run.out / "slices.csv", encode_slices(slices))
    write_bytes(run.out / "report.html", page.encode())


def encode_slices(slices: dict[str, list[dict[str, Any]]]) -> bytes:
    """Return slices.csv: a row for each slice, with interval and reason of each metric."""
    rows = list(list_rows(slices))
    values = pa.array([row["value"] for row in rows], pa.string())
    escaped = escape_formulas(values).to_pylist()
    return encode_csv(ROW_NAMES, [row | {"value": v} for row, v in zip(rows, escaped, strict=True)])
