"""Read what is compared: the report of an evaluation, scores of labelled images, or a bundle."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cifake_ray.config import StoreConfig
from cifake_ray.errors import StorageError, UsageError
from cifake_ray.stages.batch.summary import BatchSummary, read_summary
from cifake_ray.stages.evaluate.write_report import MEASURED_FIELDS
from cifake_ray.storage.bundles.built_ins import list_built_ins, locate_bundle
from cifake_ray.storage.bundles.bundle import read_bundle_info
from cifake_ray.storage.io.files import exists, read_json
from cifake_ray.storage.io.paths import AnyPath
from cifake_ray.storage.io.records import parse_record
from cifake_ray.storage.runs.read_scores import open_scores, read_footer
from cifake_ray.storage.s3.location import open_path


@dataclass(frozen=True)
class _Share:
    value: float | None


@dataclass(frozen=True)
class _Grid:
    worst_cell: str | None = None
    worst_accuracy: _Share | None = None


@dataclass(frozen=True)
class _Stored:
    """What is read of a report's `metrics.json`."""

    facts: dict[str, Any] = field(default_factory=dict)
    grid: _Grid | None = None


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A report, or a bundle without one."""

    uri: str
    architecture: str | None
    image_size: int | None
    num_views: int = 1  # of an image that the network sees at most: mirror images, crops
    scored: pa.Table | None = None  # MEASURED_FIELDS of the images with a label and a score
    summary: BatchSummary | None = None
    grid: _Grid | None = None


def read_candidate(uri: str, store: StoreConfig) -> Candidate:
    """Return what is known of a report or a bundle. StorageError, UsageError or BundleError."""
    path = locate_bundle(uri) if uri in list_built_ins() else open_path(uri, store)
    if exists(path / "config.json") or exists(path / "bundle" / "config.json"):
        info = read_bundle_info(locate_bundle(uri, store))
        preprocessing = info.preprocessing
        return Candidate(
            uri=uri,
            architecture=info.architecture,
            image_size=preprocessing.image_size,
            num_views=(1 + preprocessing.test_time_flip) * (preprocessing.num_crops or 1),
        )
    return _read_report(uri, path)


def _read_report(uri: str, path: AnyPath) -> Candidate:
    if not exists(path / "_run.json"):
        raise StorageError(f"{uri}: no _run.json; give the output of evaluate, or a bundle")
    scores = open_scores(path)
    run = scores.require_run()
    if run.command not in ("evaluate", "score"):
        raise StorageError(
            f"{uri} is the output of {run.command}; give that of evaluate, or a bundle"
        )
    tables = [table for _, table in scores.read_shards(MEASURED_FIELDS)]
    names = [measured.name for measured in MEASURED_FIELDS]
    table = pa.concat_tables([table.select(names) for table in tables])
    scored = table.filter(pc.and_(pc.is_null(table["error"]), pc.is_valid(table["label"])))
    if not scored.num_rows:
        raise UsageError(f"{uri}: no image has both a label and a score; give labelled images")
    if not all(pc.all(pc.is_finite(scored[name])).as_py() for name in ("logit", "p_fake")):
        raise StorageError(f"{uri}: damaged: a score is no number; `cifake-ray repair` restores it")
    stored = _Stored()
    if exists(path / "metrics.json"):
        try:
            stored = parse_record(_Stored, read_json(path / "metrics.json"))
        except ValueError as error:
            raise StorageError(
                f"{path / 'metrics.json'}: not the metrics of an evaluation ({error})"
            ) from error
    image_size, num_views = _read_input(read_footer(tables[0]))
    architecture = stored.facts.get("Architecture")
    return Candidate(
        uri=uri,
        architecture=architecture if isinstance(architecture, str) else None,
        image_size=image_size,
        num_views=num_views,
        scored=scored,
        summary=read_summary(path),
        grid=stored.grid,
    )


def _read_input(footer: dict[str, Any]) -> tuple[int | None, int]:
    """Return image size and views of the detector that made a shard, from its footer."""
    try:
        found = json.loads(footer.get("preprocessing", "{}"))
        size, crops = found["image_size"], found.get("num_crops", 1)
        views = (1 + (found.get("test_time_flip") is True)) * (crops if type(crops) is int else 1)
        return (size if type(size) is int else None), views
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None, 1
