"""Write metrics, figures and the page of an evaluation from its predictions."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from cifake_ray.config import EvaluateConfig
from cifake_ray.core.schema import SCORE_FIELDS
from cifake_ray.errors import UsageError
from cifake_ray.report.figures import draw_figures
from cifake_ray.report.grid import draw_grid_figures
from cifake_ray.report.html import render_report
from cifake_ray.report.text import describe_unlike, format_threshold
from cifake_ray.stages.evaluate.examples import find_mistakes
from cifake_ray.stages.evaluate.grid import measure_cells
from cifake_ray.stages.evaluate.measure import compare_real_sources, measure, measure_slices
from cifake_ray.storage.bundles.bundle import BundleInfo
from cifake_ray.storage.io.files import make_folder, write_bytes, write_json
from cifake_ray.storage.runs.run import Run
from cifake_ray.storage.runs.shards import read_shard
from cifake_ray.storage.runs.train_run import read_history
from cifake_ray.storage.sources.parquet import ParquetSource
from cifake_ray.version import __version__

MEASURED_FIELDS = [
    f for f in SCORE_FIELDS if f.name in ("key", "logit", "p_fake", "error", "label", "source")
]


def write_report(
    run: Run, source: ParquetSource, bundle: BundleInfo, config: EvaluateConfig, split: str | None
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
    unlike = bundle.domain.count_unlike(scored) if bundle.domain else {"any": 0}
    calibration = bundle.calibration
    metrics = measure(scored, calibration, config.num_bootstrap)
    slices = measure_slices(scored, (), calibration.threshold, config.num_bootstrap)
    floor = compare_real_sources(scored, config.num_bootstrap)
    sources = {found["value"]: found for found in slices.get("source", [])}
    figures = draw_figures(metrics, history=read_history(bundle.path), slices=sources)
    grid = measure_cells(run, scored, bundle)
    grid_figures = draw_grid_figures(grid) if grid else {}
    command = ["cifake-ray evaluate", config.shards, "--out", config.out]
    for flag, value in (
        ("--bundle", config.bundle),
        ("--split", config.split),
        ("--grid", config.grid),
    ):
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
        slices=sources,
        unlike=describe_unlike(unlike, scored.num_rows, bundle.domain)
        if bundle.domain and unlike["any"]
        else "",
        grid=grid,
        grid_figures=grid_figures,
    )
    make_folder(run.out / "figures", parents=False)
    for name, svg in {**figures, **grid_figures}.items():
        write_bytes(run.out / "figures" / f"{name}.svg", svg)
    stored = {**metrics, "slices": slices, "real_vs_real": floor, "facts": facts}
    write_json(run.out / "metrics.json", stored | ({"grid": grid} if grid else {}))
    write_bytes(run.out / "report.html", page.encode())
