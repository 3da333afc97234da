"""Format a comparison: a table for the terminal, LaTeX, and flat rows for CSV."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from cifake_ray.report.models_table import align_table, format_count, format_rate
from cifake_ray.report.numbers import format_interval

Row = Mapping[str, Any]
NOTHING = "-"
TITLES = {
    "num_images": "Images",
    "accuracy": "Accuracy",
    "auroc": "AUROC",
    "tpr_at_fpr_1pct": "TPR at 1% FPR",
    "tpr_at_fpr_0.1pct": "TPR at 0.1% FPR",
    "ece": "ECE",
    "worst_cell": "Worst cell (accuracy)",
    "worst_source": "Worst source (AUROC)",
    "num_parameters": "Parameters",
    "macs": "MACs",
    "images_per_s": "Images/s",
    "price_of_million": "Price of 1,000,000 images",
    "accuracy_difference": "Accuracy against the baseline",
    "auroc_difference": "AUROC against the baseline",
    "p_value": "p (McNemar)",
}
# What `missing` of a row names, as it is said.
MISSING = {
    "worst_cell": "worst cell",
    "worst_source": "worst source",
    "macs": "parameters and MACs",
    "images_per_s": "images/s",
}
INTERVALS = ("accuracy", "auroc", "tpr_at_fpr_1pct", "tpr_at_fpr_0.1pct", "ece")
PERCENT = ("accuracy", "tpr_at_fpr_1pct", "tpr_at_fpr_0.1pct")
_TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_TEX |= {character: f"\\{character}" for character in "&%$#_{}"}


def list_table(result: Row) -> tuple[list[str], list[list[str]]]:
    """Return the titles and a row of cells for each variant; columns without a number are left out.

    The first cell is the name.
    """
    rows = result["rows"]
    columns = {title: [_format_cell(row, key) for row in rows] for key, title in TITLES.items()}
    filled = {title: cells for title, cells in columns.items() if {*cells} != {NOTHING}}
    names = [name_row(row) for row in rows]
    cells = [list(row) for row in zip(names, *filled.values(), strict=True)]
    return ["Detector", *filled], cells


def name_row(row: Row) -> str:
    return f"{row['name']} ({len(row['seeds'])} seeds)" if row["seeds"] else str(row["name"])


def _format_cell(row: Row, key: str) -> str:
    if key in INTERVALS:
        is_known = row[key]["value"] is not None
        return format_interval(row[key], percent=key in PERCENT) if is_known else NOTHING
    if key in ("accuracy_difference", "auroc_difference"):
        name = key.partition("_")[0]
        return format_difference((row["difference"] or {}).get(name), percent=name == "accuracy")
    if key == "p_value":
        value = (row["difference"] or {}).get("p_value")
        return NOTHING if value is None else "< 0.0001" if value < 1e-4 else f"{value:.4f}"
    value = row[key]
    if not value:
        return NOTHING
    if key in ("worst_cell", "worst_source"):
        number = value["accuracy"] if key == "worst_cell" else value["auroc"]
        return f"{value['name']} ({format_interval(_bare(number), percent=key == 'worst_cell')})"
    if key == "num_images":
        return f"{value:,}"
    if key == "price_of_million":
        return f"{value:,.2f}"
    return format_rate(value) if key == "images_per_s" else format_count(round(value))


def _bare(value: float | None) -> dict[str, float | None]:
    return {"value": value, "low": None, "high": None}


def format_difference(found: Mapping[str, Any] | None, *, percent: bool) -> str:
    """Format as `+1.20 points (+0.80 to +1.60)` or `-0.012 (-0.020 to -0.004)`."""
    if found is None or found["value"] is None:
        return NOTHING
    scale, digits = (100, 2) if percent else (1, 4)
    value, low, high = (
        None if found[name] is None else f"{found[name] * scale:+.{digits}f}"
        for name in ("value", "low", "high")
    )
    text = f"{value} points" if percent else str(value)
    return text if low is None else f"{text} ({low} to {high})"


def describe_comparison(result: Row) -> list[str]:
    """Return the lines of a summary: the table on its side, and what to know of its numbers."""
    titles, rows = list_table(result)
    head, *lines = (list(column) for column in zip(titles, *rows, strict=True))
    table = align_table(head, lines, "<" + ">" * len(rows))
    written = [f"Written to {result['out']}."] if result.get("out") else []
    return [*table.splitlines(), *list_notes(result), *written]


def list_notes(result: Row) -> list[str]:
    """Return what a reader must know of the numbers, a sentence each."""
    notes = []
    if result["num_images"]:
        notes.append(
            f"Measured on the {result['num_images']:,} images that all reports have; 95% intervals."
        )
    if any(row["worst_cell"] for row in result["rows"]):
        notes.append(
            "Accuracy is at 0.5; that of the worst cell is its report's: at the bundle's threshold,"
            " on all of its images."
        )
    for uri, count in result["left_out"].items():
        notes.append(f"{uri}: {count:,} images that not all have are left out.")
    if len(result["rows"]) > 1:
        notes.append(
            f"The baseline is {result['baseline']}. Differences of single reports: paired bootstrap"
            " and McNemar's exact test at 0.5; over seeds: Student's intervals and Welch's t."
        )
    rates = [row["ran_on"] for row in result["rows"] if row["images_per_s"] and row["ran_on"]]
    if rates:
        ran_on = "; ".join(dict.fromkeys(rates))
        notes.append(f"Images/s as the reports recorded it, decoding included ({ran_on}).")
    return notes + _list_gaps(result["rows"], result["price_per_hour"] is not None)


def _list_gaps(rows: Sequence[Row], needs_rate: bool) -> list[str]:
    """Return why numbers are missing: of metrics for all rows, else where another row has one."""
    wanted = {key for key in MISSING if any(row[key] for row in rows)}
    wanted |= {"images_per_s"} if needs_rate else set()
    reasons = {
        f"{TITLES[key]}: {row[key]['reason']}."
        for row in rows
        for key in INTERVALS
        if row["num_images"] and row[key].get("reason")
    }
    gaps = sorted(reasons)
    for row in rows:
        if not row["num_images"]:
            gaps.append(f"{row['name']}: only its cost is known; for the rest give its report.")
            continue
        for key, name in MISSING.items():
            if key in wanted and key in row["missing"]:
                gaps.append(f"{row['name']} has no {name}: {row['missing'][key]}.")
    return gaps


def flatten_rows(result: Row) -> tuple[list[str], list[dict[str, Any]]]:
    """Return names and rows for CSV; a name that a spreadsheet would compute gets a quote."""
    flat = []
    for row in result["rows"]:
        found = {"name": _quote(row["name"]), "num_seeds": len(row["seeds"]) or 1}
        found["num_images"] = row["num_images"]
        for name in INTERVALS:
            found |= _spread(name, row[name])
        for name, value in (("worst_cell", "accuracy"), ("worst_source", "auroc")):
            worst = row[name] or {"name": None, value: None}
            found[name] = worst["name"] and _quote(worst["name"])
            found[f"{name}_{value}"] = worst[value]
        names = ("num_parameters", "macs", "images_per_s", "price_of_million")
        found |= {name: row[name] for name in names}
        difference = row["difference"] or {}
        for name in ("accuracy", "auroc"):
            found |= _spread(f"{name}_difference", difference.get(name) or {})
        counts = ("only_ours_right", "only_baseline_right", "p_value")
        flat.append(found | {name: difference.get(name) for name in counts})
    return list(flat[0]), flat


def _spread(name: str, interval: Mapping[str, Any]) -> dict[str, Any]:
    parts = {"": "value", "_low": "low", "_high": "high"}
    return {f"{name}{suffix}": interval.get(part) for suffix, part in parts.items()}


def _quote(text: str) -> str:
    return f"'{text}" if re.match(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\t\r\n]", text) else text


def format_latex(result: Row) -> str:
    """Return a table for LaTeX's package booktabs."""
    titles, rows = list_table(result)
    lines = [" & ".join(map(_escape_tex, cells)) + r" \\" for cells in (titles, *rows)]
    return "\n".join(
        (
            r"% needs \usepackage{booktabs}",
            r"\begin{tabular}{l" + "r" * (len(titles) - 1) + "}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}",
            *(f"% {_keep_printable(note)}" for note in list_notes(result)),
            "",
        )
    )


def _escape_tex(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in _keep_printable(text))


def _keep_printable(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text)
