"""Say in sentences what `decide` has decided, what it promises, and on what that rests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cifake_ray.core.evaluation.fit_policy import FEW, count_needed
from cifake_ray.report.numbers import format_share

MAX_LINES = 40  # of values of a column

Record = Mapping[str, Any]


def describe_decisions(record: Record) -> list[str]:
    listed, out = record["listed"], record["out"].rstrip("/")
    confidence, target = (f"{100 * record[n]:.4g}%" for n in ("confidence", "target_fpr"))
    verdicts = ", ".join(
        f"{name} {record[name]:,} ({format_share(record[name] / listed)})"
        for name in ("FAKE", "unsure", "REAL")
    )
    errors = f" Unsure are {record['errors']:,} unreadable ones." if record["errors"] else ""
    lines = [f"{verdicts} of {listed:,} images.{errors}"]
    if record["settled"] or record["settled_elsewhere"]:
        other = record["settled_elsewhere"]
        others = f"; {other:,} settled keys are not among these scores" if other else ""
        lines.append(f"Settled by persons: {record['settled']:,}{others}.")
    lines += [
        f"The promise: with {confidence} confidence, at most {target} of images drawn like these"
        " REAL ones are called FAKE.",
        f"Overall: {_describe_cut(record['overall'])}.",
    ]
    if record["by"]:
        groups = list(record["groups"].items())
        lines += [f"{name}: {_describe_cut(cut)}." for name, cut in groups[:MAX_LINES]]
        if len(groups) > MAX_LINES:
            lines.append(f"and {len(groups) - MAX_LINES:,} more: see {record['policy_file']}.")
        if record["too_few"]:
            few = ", ".join(f"{name} {n:,}" for name, n in [*record["too_few"].items()][:MAX_LINES])
            few += ", ..." * (len(record["too_few"]) > MAX_LINES)
            needed = count_needed(record["target_fpr"], record["confidence"])
            lines.append(f"Too few REAL images to promise that, {needed:,} are needed: {few}.")
        others = record["others"]
        lines.append(
            f"These and every other {record['by']}: FAKE if all thresholds say so"
            f" (>= {others['threshold']:.4g}), REAL if all do (< {others['unsure_from']:.4g})."
        )
    for label in ("REAL", "FAKE"):
        if counts := {n: c for n, c in record["labelled"].items() if n.startswith(label)}:
            total = sum(counts.values())
            said = ", ".join(
                f"{name.rpartition(' ')[2]} {format_share(count / total)}"
                for name, count in counts.items()
            )
            lines.append(f"Of {total:,} images labelled {label}: {said}.")
    resumed = record["shards_resumed"]
    before = f"; {resumed:,} had been decided before" if resumed else ""
    return [
        *lines,
        f"Rows in {out}/decisions, {record['shards_total']:,}"
        f" shard{'s' * (record['shards_total'] != 1)}{before}.",
        f"Policy: {record['policy_file']} ({record['policy']}), for score --policy",
    ]


def _describe_cut(cut: Record) -> str:
    low, high = cut["fpr_interval"]
    text = (
        f"FAKE from {cut['threshold']:.4g}, {cut['num_above']:,} of {cut['num_real']:,} REAL images"
        f" ({100 * low:.2g}% to {100 * high:.2g}%); unsure from {cut['unsure_from']:.4g}"
    )
    if cut["num_above"] < FEW:
        text += f"; it rests on fewer than {FEW} images above it"
    return text
