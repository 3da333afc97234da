"""evaluate: labelled shards and a bundle -> predictions, metrics and a report.

The shards are scored exactly as `score` would do it; the report is computed from the predictions.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from cifake_ray.config import EvaluateConfig
from cifake_ray.core.evaluation.metrics import compute_metrics
from cifake_ray.core.imaging.decode import decode_image
from cifake_ray.core.imaging.preprocessing import fit_image
from cifake_ray.core.schema import FAKE, REAL
from cifake_ray.errors import ImageError, UsageError
from cifake_ray.report.figures import draw_figures
from cifake_ray.report.html import Mistake, render_report
from cifake_ray.stages.batch.driver import BatchPlan, BatchSummary, Progress, run_batch
from cifake_ray.stages.batch.plan import DryRun
from cifake_ray.stages.score import MakeScoreProcessor
from cifake_ray.storage.bundles.bundle import BundleInfo, read_bundle_info
from cifake_ray.storage.io.files import write_bytes, write_json
from cifake_ray.storage.io.paths import AnyPath
from cifake_ray.storage.runs.manifest import read_manifest_shard
from cifake_ray.storage.runs.run import Run
from cifake_ray.storage.runs.shards import read_shard
from cifake_ray.storage.runs.train_run import read_history
from cifake_ray.storage.sources.parquet import ParquetSource, find_splits
from cifake_ray.version import __version__

MAX_MISTAKES = 48  # on the contact sheet, half of each kind
THUMBNAIL_SIZE = 96  # pixels; smaller images stay as they are
MIN_SLICE_IMAGES = 30  # with fewer, the interval of a slice is too wide to be useful
MAX_SLICES = 50


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
    split = config.split or ("test" if "test" in splits else None)
    if split is not None and split not in splits:
        names = ", ".join(sorted(splits)) or "none"
        raise UsageError(f"--split {split}: {shards} has no such split, it has {names}")
    if split is None:
        log(
            "evaluate: there is no split `test`, so all labelled images are measured; those the"
            " detector was trained on look better than others would"
        )
    source = ParquetSource(shards, split=split, labelled=True, min_shard_rows=config.shard_size)
    plan = BatchPlan(
        command="evaluate",
        config=config,
        out=out,
        source=source,
        paths={"shards": str(shards), "bundle": config.bundle and str(bundle.path)},
        inputs={"split": split, "bundle": bundle.fingerprint},
        facts={"bundle": str(bundle.path), "threshold": bundle.threshold(None)},
        device=config.device,
        make_processor=MakeScoreProcessor(bundle, bundle.threshold(None), config.batch_size),
        on_progress=on_progress,
        started_s=started_s,
        log=log,
        before_success=lambda run: write_report(run, source, bundle, config, split),
    )
    return run_batch(plan)


def write_report(
    run: Run, source: ParquetSource, bundle: BundleInfo, config: EvaluateConfig, split: str | None
) -> None:
    """Write metrics.json, figures/*.png and report.html from the predictions of a run."""
    shards = range(run.manifest.num_shards)
    predictions = pa.concat_tables([read_shard(run.shard_path(shard)) for shard in shards])
    scored = predictions.filter(pc.is_null(predictions.column("error")))
    errors = pc.value_counts(predictions.column("error").drop_null()).to_pylist()
    if not scored.num_rows:
        raise UsageError(
            f"{config.shards}: not one image could be scored; see {run.results_folder}"
        )
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
        "Temperature": f"{bundle.calibration.temperature:.4f}",
        "Threshold": f"{bundle.calibration.threshold:.6f}",
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
    )
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
        row["values"]: measure(
            scored.filter(pc.equal(scored.column("source"), row["values"])), bundle, 0
        )
        for row in counts
        if row["counts"] >= MIN_SLICE_IMAGES
    }


def find_mistakes(run: Run, source: ParquetSource, scored: pa.Table) -> list[Mistake]:
    """Return the mistakes with the most extreme logits of each kind, with thumbnails."""
    label = scored.column("label").to_numpy()
    logit = scored.column("logit").to_numpy()
    chosen: list[int] = []
    for kind, sign in ((REAL, 1), (FAKE, -1)):
        wrong = np.flatnonzero((label == kind) & (sign * logit >= 0))
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
