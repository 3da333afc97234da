"""Write a finished run of score whose scores are made up: real files, no detector, no decoding."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cifake_ray.config import ScoreConfig, fingerprint_settings
from cifake_ray.core.schema import MANIFEST_FIELDS, SCORE_FIELDS
from cifake_ray.storage.io.paths import resolve_path
from cifake_ray.storage.runs.finish import finish_run
from cifake_ray.storage.runs.manifest import read_manifest_shard
from cifake_ray.storage.runs.run import Run
from cifake_ray.storage.runs.run_plan import RunPlan
from cifake_ray.storage.runs.shards import commit_shard
from cifake_ray.storage.sources.open_source import open_source
from cifake_ray.storage.sources.source import Listing

THRESHOLD = 0.4
FOOTER = {
    "bundle": "ab" * 32,
    "precision": "float32",
    "threshold": str(THRESHOLD),
    "thresholds": json.dumps({"default": THRESHOLD}),
}


def write_score_run(
    src: str,
    out: Path,
    *,
    batches: Iterable[pa.RecordBatch] | None = None,
    make_logits: Callable[[pa.Table], np.ndarray] | None = None,
    shard_rows: int | None = None,
    **options: Any,
) -> Run:
    """Score `src`, or rows of a listing that are made up, without looking at an image.

    A NaN logit is an image that does not decode. `options` are those of score.
    """
    config = ScoreConfig(src=src, out=str(out), **options)
    place = resolve_path(src)

    def list_source() -> Listing:
        if batches is not None:
            return Listing(iter(batches))
        return open_source(config, place, out).list_images()

    settings = {**fingerprint_settings(config), "src": str(place)}
    inputs = {"bundle": FOOTER["bundle"], "precision": FOOTER["precision"]}
    run = RunPlan(
        out=out,
        command="score",
        settings={**settings, **inputs},
        config={**settings, "max_error_rate": 0.01, "allow_pickle": False},
        list_source=list_source,
        shard_rows=shard_rows,
    ).open()
    stats = []
    for shard in range(run.manifest.num_shards):
        rows = read_manifest_shard(run.manifest_folder, run.find_file(shard), shard)
        logit = (make_logits or draw_logits)(rows).astype(np.float32)
        stats.append(commit_shard(run, shard, make_scores(rows, logit), FOOTER, {"any": 0}))
    summary = {"command": "score", "threshold": THRESHOLD, "unlike_training": {"any": 0}}
    finish_run(run, stats, summary)
    return run


def draw_logits(rows: pa.Table) -> np.ndarray:
    """Return logits of two classes that overlap, the same for the same keys."""
    rng = np.random.default_rng([len(rows), *rows.column("key")[0].as_py().encode()])
    label = rows.column("label").fill_null(0).to_numpy()
    return rng.normal(label * 6.0 - 3.0, 2.5)


def make_scores(rows: pa.Table, logit: np.ndarray) -> pa.Table:
    """Return rows of SCORE_FIELDS, and the columns that the listing adds."""
    failed = np.isnan(logit)
    p_fake = (1 / (1 + np.exp(-logit.astype(np.float64)))).astype(np.float32)
    columns = {
        "key": rows.column("key"),
        "logit": pa.array(logit, mask=failed),
        "p_fake": pa.array(p_fake, mask=failed),
        "is_fake": pa.array(p_fake >= np.float32(THRESHOLD), mask=failed),
        "error": pa.array(np.where(failed, "not_an_image", ""), mask=~failed),
        "error_detail": pa.nulls(len(rows), pa.string()),
        "width": pa.array(np.full(len(rows), 32, np.int32), mask=failed),
        "height": pa.array(np.full(len(rows), 32, np.int32), mask=failed),
        "format": pa.array(np.full(len(rows), "JPEG"), mask=failed),
        "mode": pa.array(np.full(len(rows), "RGB"), mask=failed),
        "jpeg_quality": pa.array(np.full(len(rows), 75, np.int16), mask=failed),
        "num_frames": pa.array(np.full(len(rows), 1, np.int32), mask=failed),
        **{name: rows.column(name) for name in ("label", "split", "source")},
    }
    known = {field.name for field in MANIFEST_FIELDS}
    extra = [field for field in rows.schema if field.name not in known]
    columns |= {field.name: rows.column(field.name) for field in extra}
    return pa.table(columns, schema=pa.schema([*SCORE_FIELDS, *extra]))
