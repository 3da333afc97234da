"""audit: labelled images -> what gives their labels away, and their duplicates."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cifake_ray.config import AuditConfig, list_options
from cifake_ray.core.audit.match_classes import TRAIT_COLUMNS, choose_unmatched
from cifake_ray.core.processing.audit import AuditProcessor
from cifake_ray.core.schema import AUDIT_FIELDS, FAKE, LABEL_NAMES, REAL
from cifake_ray.errors import StorageError, UsageError
from cifake_ray.report.audit_text import Verdict, judge_audit
from cifake_ray.stages.batch.driver import run_batch
from cifake_ray.stages.batch.plan import BatchPlan, DryRun
from cifake_ray.stages.batch.summary import BatchSummary, Progress
from cifake_ray.stages.resources import Placement
from cifake_ray.storage.io.files import exists, read_json, write_bytes, write_json
from cifake_ray.storage.io.paths import AnyPath, link_path
from cifake_ray.storage.io.records import parse_record
from cifake_ray.storage.runs.run import Run
from cifake_ray.storage.sources.open_source import open_source
from cifake_ray.version import __version__

# Counted by class, with the columns that came with the images, if they have so few values.
COUNTED_FIELDS = ("split", "source", "format", "mode", "subsampling")
MAX_VALUES = 100


@dataclass(frozen=True)
class AuditSummary(BatchSummary):
    """Summary of an audit, with what it found."""

    verdicts: list[dict[str, Any]] = field(default_factory=list)
    report: str = ""  # a link


def make_processor(placement: Placement) -> AuditProcessor:
    """Return the processor of a worker, the same for every placement."""
    return AuditProcessor()


def audit_images(
    config: AuditConfig,
    src: AnyPath,
    out: AnyPath,
    on_progress: Callable[[Progress], None],
    started_s: float,
    log: Callable[[str], None] = lambda message: None,
) -> AuditSummary | DryRun:
    """Measure the images of `src`, and write what gives their labels away into `out`."""

    def write_findings(run: Run) -> None:
        log("audit: looking for leaks and duplicates ...")
        write_audit(run, config)

    plan = BatchPlan(
        command="audit",
        config=config,
        out=out,
        source=open_source(config, src, out),
        paths={"src": str(src)},
        needs_labels=True,
        make_processor=make_processor,
        on_progress=on_progress,
        started_s=started_s,
        log=log,
        before_success=write_findings,
    )
    result = run_batch(plan)
    if isinstance(result, DryRun):
        return result
    return AuditSummary(
        **vars(result), verdicts=read_verdicts(out), report=link_path(out / "audit.html")
    )


@dataclass(frozen=True)
class _Findings:
    """What is read of `audit.json`."""

    verdicts: list[Verdict]


def read_verdicts(out: AnyPath) -> list[dict[str, Any]]:
    """Return the verdicts of a finished audit, none if a person has removed their file."""
    path = out / "audit.json"
    if not exists(path):
        return []
    try:
        found = parse_record(_Findings, read_json(path))
    except ValueError as error:
        raise StorageError(
            f"{path}: not the findings of an audit ({error}); remove {out / '_SUCCESS'} and run the"
            " same command again"
        ) from error
    return [asdict(verdict) for verdict in found.verdicts]


def write_audit(run: Run, config: AuditConfig) -> None:
    """Write audit.json, audit.html and the table of duplicates from the rows of a run."""
    from cifake_ray.core.audit.duplicates import GROUP_COLUMNS, count_duplicates, find_duplicates
    from cifake_ray.core.audit.label_leaks import find_typical, measure_leaks
    from cifake_ray.report.audit_page import render_audit_page
    from cifake_ray.storage.runs.audit_rows import read_audit_rows, write_duplicates

    rows = read_audit_rows(run)
    rows = rows.filter(pc.is_null(rows.column("error")))
    if not rows.num_rows:
        raise UsageError(f"{config.src}: not one image could be decoded; see {run.results_folder}")
    duplicates = find_duplicates(rows)
    write_duplicates(run, duplicates)
    probed = sample_classes(rows, config.probe_images, config.seed)
    leaks = measure_leaks(probed, config.seed)
    balance = count_by_class(rows)
    short_sides = pc.min_element_wise(rows.column("width"), rows.column("height"))
    findings = {
        "images": rows.num_rows,
        "classes": {name: sum(row[name] for row in balance["label"]) for name in LABEL_NAMES},
        "probed": probed.num_rows,
        "leaks": {name: {**asdict(k), "is_leak": k.is_leak} for name, k in leaks.items()},
        "typical": find_typical(rows),
        "duplicates": {name: count_duplicates(duplicates, name) for name in GROUP_COLUMNS},
        "matched": {trait: count_matched(rows, trait) for trait in TRAIT_COLUMNS},
        "median_side": pc.quantile(short_sides)[0].as_py(),
        "balance": balance,
    }
    findings["verdicts"] = judge_audit(findings, config)
    facts = {
        "Command": shlex.join(["cifake-ray", "audit", *list_options(config)]),
        "cifake-ray": __version__,
        "Fingerprint": run.fingerprint,
    }
    page = render_audit_page(findings, f"Audit of {config.src}", facts)
    write_json(run.out / "audit.json", findings)
    write_bytes(run.out / "audit.html", page.encode())


def sample_classes(rows: pa.Table, most: int, seed: int) -> pa.Table:
    """Return at most so many labelled rows of each class, at random, in their order."""
    labels = rows.column("label").fill_null(-1).to_numpy()
    rng = np.random.default_rng(seed)
    chosen = []
    for label in (REAL, FAKE):
        places = np.flatnonzero(labels == label)
        chosen.append(rng.choice(places, min(most, len(places)), replace=False))
    return rows.take(np.sort(np.concatenate(chosen)))


def count_by_class(rows: pa.Table) -> dict[str, list[dict[str, Any]]]:
    """Return, for each column of a few words, how many images of each class have each value."""
    known = {field.name for field in AUDIT_FIELDS} - set(COUNTED_FIELDS)
    names = [f.name for f in rows.schema if f.name not in known and pa.types.is_string(f.type)]
    found = {}
    for name in ["label", *names]:
        counts = rows.group_by([name, *{"label"} - {name}]).aggregate([([], "count_all")])
        values: dict[Any, dict[str, Any]] = {}
        for row in counts.to_pylist():
            label = "none" if row["label"] is None else LABEL_NAMES[row["label"]]
            empty = {"value": row[name], **dict.fromkeys((*LABEL_NAMES, "none"), 0)}
            values.setdefault(row[name], empty)[label] += row["count_all"]
        if name == "label" or 1 < len(values) <= MAX_VALUES:
            # By the value too: Arrow's groups come in the order of its threads.
            found[name] = sorted(
                values.values(),
                key=lambda row: (
                    -sum(row[label] for label in (*LABEL_NAMES, "none")),
                    str(row["value"]),
                ),
            )
    return found


def count_matched(rows: pa.Table, trait: str) -> int:
    """Return how many images `convert --match` would keep."""
    return int(rows.num_rows) - sum(1 for _ in choose_unmatched(rows, [trait], (), 0))
