"""compare: reports of several detectors -> one table, and what differs on the images they share."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cifake_ray.config import CompareConfig, list_options
from cifake_ray.core.evaluation.comparison import average_seeds, compare_pair, compare_seeds
from cifake_ray.core.evaluation.metrics import compute_metrics
from cifake_ray.errors import UsageError, suggest_word
from cifake_ray.report.compare_page import draw_comparison, render_comparison
from cifake_ray.report.compare_table import flatten_rows, format_latex
from cifake_ray.stages.compare.candidates import Candidate, read_candidate
from cifake_ray.stages.evaluate.measure import measure_slices
from cifake_ray.storage.io.files import exists, make_folder, write_chunks
from cifake_ray.storage.io.paths import resolve_path
from cifake_ray.storage.io.text_rows import encode_csv
from cifake_ray.storage.runs.export import EXISTS

METRICS = ("accuracy", "auroc", "tpr_at_fpr_1pct", "tpr_at_fpr_0.1pct", "ece")
NO_IMAGES = "no report"
SECONDS_PER_HOUR = 3600


def compare_reports(
    config: CompareConfig, log: Callable[[str], None] = lambda message: None
) -> dict[str, Any]:
    """Return the rows of the comparison: see `_measure_candidate` and `_merge_seeds`.

    Rows with images are measured anew, on the images that all reports have, by key; the others have
    only a cost. Each but the baseline has a `difference`.
    """
    refuse_existing(config)
    named = config.named_reports
    if twice := [uri for uri, count in Counter(uri for _, uri in named).items() if count > 1]:
        raise UsageError(f"{twice[0]} is given twice")
    candidates = []
    for _, uri in named:
        log(f"compare: reading {uri} ...")
        candidates.append(read_candidate(uri, config.store))
    shared, left_out = _share_images(candidates)
    groups: dict[str, list[int]] = {}
    for number, name in enumerate(_name_all(named)):
        groups.setdefault(name, []).append(number)
    baseline = config.baseline or next(iter(groups))
    if baseline not in groups:
        raise UsageError(
            f"--baseline {baseline}: no report has this name{suggest_word(baseline, groups)}; there"
            f" are {', '.join(groups)}"
        )
    rows = []
    for name, numbers in groups.items():
        log(f"compare: measuring {name} ...")
        measured = [
            _measure_candidate(candidates[n], shared.get(n), config, has_interval=len(numbers) == 1)
            for n in numbers
        ]
        rows.append({"name": name, **_merge_seeds(measured)})
    by_name = {row["name"]: row for row in rows}
    for name, row in by_name.items():
        if name != baseline:
            ours, theirs = ([shared.get(n) for n in groups[each]] for each in (name, baseline))
            row["difference"] = _find_difference(row, by_name[baseline], ours, theirs, config)
    return {
        "command": "compare",
        "baseline": baseline,
        "num_images": len(next(iter(shared.values()))) if shared else 0,
        "left_out": left_out,
        "price_per_hour": config.price_per_hour,
        "rows": rows,
    }


def refuse_existing(config: CompareConfig) -> None:
    """Raise UsageError when the file to write exists and is not to be replaced."""
    if config.out is None or config.overwrite:
        return
    file = resolve_path(config.out, config.store)
    if exists(file):
        raise UsageError(EXISTS.format(file))


def write_comparison(result: dict[str, Any], config: CompareConfig) -> None:
    """Write what `compare_reports` returned to the file that is asked for, whole or not at all."""
    assert config.out is not None
    file = resolve_path(config.out, config.store)
    command = shlex.join(["cifake-ray", "compare", *list_options(config)])
    encode: dict[str, Callable[[], bytes]] = {
        "csv": lambda: encode_csv(*flatten_rows(result)),
        "html": lambda: render_comparison(result, command).encode(),
        "json": lambda: (json.dumps(result, indent=2) + "\n").encode(),
        "svg": lambda: draw_comparison(result),
        "tex": lambda: format_latex(result).encode(),
    }
    make_folder(file.parent)
    try:
        write_chunks(file, [encode[config.chosen_format]()], overwrite=config.overwrite)
    except FileExistsError as error:  # it appeared meanwhile
        raise UsageError(EXISTS.format(file)) from error


def _name_all(named: Sequence[tuple[str | None, str]]) -> list[str]:
    """Return the name of each report; one without takes the end of its path that is its alone."""
    given = {name for name, _ in named if name}
    tails = [uri.rstrip("/").split("/") for name, uri in named if not name]
    names = []
    for name, uri in named:
        parts = uri.rstrip("/").split("/")
        lengths = range(1, len(parts) + 1)
        own = (
            "/".join(parts[-n:])
            for n in lengths
            if sum(tail[-n:] == parts[-n:] for tail in tails) == 1
            and "/".join(parts[-n:]) not in given
        )
        names.append(name or next(own, uri))
    return names


def _share_images(candidates: Sequence[Candidate]) -> tuple[dict[int, pa.Table], dict[str, int]]:
    """Return the images that all reports have, in one order, and how many others each has.

    UsageError when there is none, or when their labels differ.
    """
    tables = {n: c.scored for n, c in enumerate(candidates) if c.scored is not None}
    if not tables:
        return {}, {}
    first = next(iter(tables))
    keys = tables[first]["key"].combine_chunks()
    for number, table in tables.items():
        keys = keys.filter(pc.is_in(keys, table["key"].combine_chunks()))
        if not len(keys):
            raise UsageError(
                f"{candidates[first].uri} and {candidates[number].uri} share no image: their keys"
                " are others; compare reports on the same images"
            )
    shared = {
        n: table.take(pc.index_in(keys, table["key"].combine_chunks()))
        for n, table in tables.items()
    }
    label = shared[first]["label"].combine_chunks()
    for number, table in shared.items():
        differs = pc.not_equal(label, table["label"].combine_chunks())
        if pc.any(differs).as_py():
            raise UsageError(
                f"{candidates[first].uri} and {candidates[number].uri} label"
                f" {pc.sum(differs).as_py():,} of the same images otherwise, such as"
                f" {keys.filter(differs)[0].as_py()!r}"
            )
    left_out = {candidates[n].uri: table.num_rows - len(keys) for n, table in tables.items()}
    return shared, {uri: count for uri, count in left_out.items() if count}


def _measure_candidate(
    candidate: Candidate, scored: pa.Table | None, config: CompareConfig, *, has_interval: bool
) -> dict[str, Any]:
    """Return the metrics and the cost of one candidate; `missing` says why there is no value."""
    missing: dict[str, str] = {}
    row: dict[str, Any] = {"uri": candidate.uri, "num_images": 0 if scored is None else len(scored)}
    summary, grid = candidate.summary, candidate.grid
    undefined = {"value": None, "low": None, "high": None, "reason": NO_IMAGES}
    row |= dict.fromkeys(METRICS, undefined)
    row["worst_source"] = row["worst_cell"] = None
    if scored is not None and summary is not None:
        threshold = 0.5 if summary.threshold is None else summary.threshold
        metrics = compute_metrics(
            scored["logit"].to_numpy(),
            scored["label"].to_numpy(),
            temperature=1.0,  # stands in p_fake; of what is kept nothing else uses it
            threshold=threshold,
            p_fake=scored["p_fake"].to_numpy(),
            num_bootstrap=config.num_bootstrap if has_interval else 0,
        )
        row |= {name: metrics[name] for name in METRICS}
        sources = measure_slices(scored, (), threshold, 0).get("source", [])
        worst = next((found for found in sources if not found["is_small"]), None)
        if worst is not None:
            row["worst_source"] = {"name": worst["value"], "auroc": worst["auroc"]["value"]}
        else:
            missing["worst_source"] = "fewer than two sources, or none of 30 images"
        if grid and grid.worst_cell and grid.worst_accuracy:
            value = grid.worst_accuracy.value
            row["worst_cell"] = {"name": grid.worst_cell, "accuracy": value}
        else:
            missing["worst_cell"] = "evaluate it with --grid"
    row |= _find_cost(candidate, missing)
    rate, row["ran_on"] = 0.0, ""
    if summary is not None and summary.precision and not grid:
        rate = summary.steady_images_per_s or summary.images_per_s
        row["ran_on"] = f"{summary.ran_on}, {summary.precision}"
    row |= {"images_per_s": rate or None, "price_of_million": None}
    if not rate:
        missing["images_per_s"] = "its run scored a grid too, or measured stored scores"
    elif config.price_per_hour is not None:
        row["price_of_million"] = config.price_per_hour / SECONDS_PER_HOUR / rate * 1e6
    return {**row, "missing": missing}


def _find_cost(candidate: Candidate, missing: dict[str, str]) -> dict[str, Any]:
    """Return parameters and MACs of an image."""
    nothing = {"architecture": candidate.architecture, "num_parameters": None, "macs": None}
    if candidate.architecture is None or candidate.image_size is None:
        missing["macs"] = "the report names no architecture: give its bundle too"
        return nothing
    try:
        num_parameters, macs = _count_cost(candidate.architecture, candidate.image_size)
    except (ValueError, RuntimeError) as error:  # one that this version does not have
        missing["macs"] = str(error).splitlines()[0]
        return nothing
    return {**nothing, "num_parameters": num_parameters, "macs": macs * candidate.num_views}


@cache
def _count_cost(architecture: str, image_size: int) -> tuple[int, int]:
    from cifake_ray.core.training.model_cost import count_cost  # it imports torch

    cost = count_cost(architecture, image_size)
    return cost.num_parameters, cost.macs


def _merge_seeds(measured: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the row of one variant: of several seeds the means, with Student's intervals.

    `seeds` keeps the rows of each. The worst cell and source are those of the worst seed.
    """
    first = dict(measured[0])
    uri = first.pop("uri")
    if len(measured) == 1:
        return {**first, "reports": [uri], "seeds": [], "difference": None}
    merged: dict[str, Any] = {}
    for name in METRICS:
        why = first[name].get("reason")  # that of each: they have the same images
        values = [row[name]["value"] for row in measured]
        merged[name] = first[name] if why else average_seeds(values)
    for name, value in (("worst_cell", "accuracy"), ("worst_source", "auroc")):
        found = [row[name] for row in measured if row[name] and row[name][value] is not None]
        merged[name] = min(found, key=itemgetter(value)) if found else None
    for name in ("images_per_s", "price_of_million"):
        merged[name] = average_seeds([row[name] for row in measured])["value"]
    for name in ("architecture", "num_parameters", "macs", "ran_on"):
        is_same = len({row[name] for row in measured}) == 1
        merged[name] = first[name] if is_same else None
    missing = {name: why for row in measured for name, why in row["missing"].items()}
    reports = [row["uri"] for row in measured]
    return {
        **first,
        **merged,
        "missing": missing,
        "reports": reports,
        "seeds": [{name: row[name] for name in ("uri", *METRICS)} for row in measured],
        "difference": None,
    }


def _find_difference(
    row: dict[str, Any],
    baseline: dict[str, Any],
    ours: Sequence[pa.Table | None],
    theirs: Sequence[pa.Table | None],
    config: CompareConfig,
) -> dict[str, Any] | None:
    """Return how a row differs from the baseline; None if one of them has no images."""
    if any(table is None for table in (*ours, *theirs)):
        return None
    if len(ours) == len(theirs) == 1:
        found = compare_pair(
            _read_column(ours[0], "label"),
            _read_scores(ours[0]),
            _read_scores(theirs[0]),
            config.num_bootstrap,
        )
        return {"method": "paired bootstrap and McNemar's exact test", **found}
    difference: dict[str, Any] = {"method": "Welch's t over seeds"}
    for name in ("accuracy", "auroc"):
        values = [
            [seed[name]["value"] for seed in each["seeds"] or [each]] for each in (row, baseline)
        ]
        difference[name] = compare_seeds(*values)
    return difference


def _read_scores(table: pa.Table | None) -> tuple[np.ndarray, np.ndarray]:
    return _read_column(table, "logit"), _read_column(table, "p_fake")


def _read_column(table: pa.Table | None, name: str) -> np.ndarray:
    assert table is not None
    column: np.ndarray = table[name].to_numpy()
    return column
