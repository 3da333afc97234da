"""Render the page of an audit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cifake_ray.core.schema import LABEL_NAMES
from cifake_ray.report.audit_text import CLEAN, COPIES, LEAK, describe_null
from cifake_ray.report.figures import COLOURS, INK, MUTED, encode_figure, new_figure
from cifake_ray.report.html import render_page
from cifake_ray.report.numbers import format_interval, format_share

CAPTIONS = {
    "leaks": "How well a classifier tells the classes apart by each group of facts alone, with 95%"
    " intervals: 0.5 is chance. Orange gives the label away; pixel statistics are the floor for a"
    " detector.",
}


def render_audit_page(findings: Mapping[str, Any], title: str, facts: Mapping[str, str]) -> str:
    """Return the page of what `write_audit` found, to be written as UTF-8."""
    leaks = findings["leaks"]
    return render_page(
        "audit.html.j2",
        title=title,
        sentence=describe_null(findings),
        cards=_make_cards(findings),
        verdicts=[v for v in findings["verdicts"] if v["level"] != CLEAN],
        clean=[v["text"] for v in findings["verdicts"] if v["level"] == CLEAN],
        figures={"leaks": draw_leaks(leaks)} if leaks else {},
        captions=CAPTIONS,
        leaks=[_make_leak_row(name, leak) for name, leak in leaks.items()],
        probed=findings["probed"],
        copies=[(what, findings["duplicates"][name]) for name, (_, what) in COPIES.items()],
        balance={name: rows for name, rows in findings["balance"].items() if name != "label"},
        labels=(*LABEL_NAMES, "none"),
        facts=facts,
    )


def _make_cards(findings: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    leaks, same = findings["leaks"], findings["duplicates"]["bytes_group"]
    classes = " and ".join(f"{n:,} {name}" for name, n in findings["classes"].items())
    cards = {"Images": (f"{findings['images']:,}", classes)}
    if leaks:
        null, linear = leaks["zero-pixel null"], leaks["pixel statistics, linear"]
        interval = f"AUROC without one pixel, {null['low']:.3f} to {null['high']:.3f}"
        cards["Zero-pixel null"] = (f"{null['auroc']:.3f}", interval)
        floor = f"accuracy by ten pixel statistics, AUROC {linear['auroc']:.3f}"
        cards["Floor"] = (format_share(linear["accuracy"]), floor)
    across = f"pairs with the same bytes, {same['pairs_across_splits']:,} across splits"
    return {**cards, "Duplicates": (f"{same['pairs']:,}", across)}


def _make_leak_row(name: str, leak: Mapping[str, Any]) -> dict[str, str]:
    values = {"value": leak["auroc"], "low": leak["low"], "high": leak["high"]}
    is_same = leak["constant"] is not None
    return {
        "name": name,
        "auroc": "0.5" if is_same else format_interval(values),
        "accuracy": format_share(leak["accuracy"]),
        "note": "the same in all images" if is_same else "",
    }


def draw_leaks(leaks: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Draw the AUROC of each group of facts with its interval, in their order."""
    figure, (axes,) = new_figure(height=1.2 + 0.3 * len(leaks))
    for position, (name, leak) in enumerate(leaks.items()):
        is_floor = name.startswith("pixel")
        colour = INK if is_floor else COLOURS["FAKE"] if leak["is_leak"] else COLOURS["REAL"]
        margins = [[leak["auroc"] - leak["low"]], [leak["high"] - leak["auroc"]]]
        axes.errorbar([leak["auroc"]], [position], xerr=margins, fmt="o", color=colour, capsize=3)
    axes.axvline(0.5, color=MUTED, linestyle=":", linewidth=1.2)
    axes.set_yticks(range(len(leaks)), list(leaks))
    axes.invert_yaxis()
    axes.set_xlim(min(0.4, *(leak["low"] - 0.02 for leak in leaks.values())), 1.02)
    axes.set_xlabel(f"AUROC ({LEAK.lower()} above 0.5)")
    return encode_figure(figure)
