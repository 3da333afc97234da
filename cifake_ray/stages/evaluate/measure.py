"""Measure stored predictions, all of them and slice by slice."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cifake_ray.core.evaluation.metrics import RANKING_METRICS, compute_metrics
from cifake_ray.storage.bundles.bundle import BundleInfo

MIN_SLICE_IMAGES = 30  # with fewer, the interval of a slice is too wide to be useful
MAX_SLICES = 50


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
