"""Format the list of architectures as a table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cifake_ray.report.numbers import format_interval

GAP = "  "


def format_models_table(catalogue: Mapping[str, Any]) -> str:
    """Format the rows of `core.training.model_cost.list_models`, with notes on the columns.

    `catalogue` holds them as `models`; `made_by` is the command that made their results. Results at
    another size or on other images have their own lines.
    """
    rows = catalogue["models"]
    counted = [row for row in rows if row["num_parameters"] is not None]
    problems = [f"{row['model']}: {row['problem']}" for row in rows if row["problem"]]
    if not counted:
        sizes = [(row["model"], str(row["image_size"])) for row in rows]
        notes = [] if problems else [f"{len(rows):,} match: too many to count parameters and MACs."]
        return "\n".join((align_table(("model", "input"), sizes, "<>"), "", *notes, *problems))
    has_results = any(row["results"] for row in rows)
    speeds = [row["speed"] for row in rows if row["speed"]]
    head = ["model", "input", "parameters", "MACs"]
    head += ["train/s", "score/s", "batch"] if speeds else []
    head += ["accuracy", "trained on"] if has_results else []
    lines = [
        line
        for row in rows
        for line in _list_lines(row, with_speed=bool(speeds), with_results=has_results)
    ]
    sides = "<" + ">" * (len(head) - 1)
    table = align_table(head, lines, sides[:-1] + "<" if has_results else sides)
    notes = ["MACs: multiply-accumulates for one image."]
    if speeds:
        speed = speeds[0]
        notes.append(
            f"train/s, score/s: images per second on this machine ({speed['device']},"
            f" {speed['num_threads']} threads, {speed['dtype']}), at the batch size shown."
        )
    if has_results:
        notes.append(
            "accuracy: on CIFAKE's test images, with a 95% interval; measured by"
            f" `{catalogue['made_by']}`."
        )
    ours = [row for row in counted if not row["about"].startswith("timm, ")]
    about = align_table(None, [(row["model"], row["about"]) for row in ours], "<<")
    return "\n".join((table, "", *notes, *problems, *(["", about] if ours else [])))


def _list_lines(row: Mapping[str, Any], *, with_speed: bool, with_results: bool) -> list[list[str]]:
    """Return an architecture's lines: the first result at its own size, then the others."""
    cost = [format_count(row["num_parameters"]), format_count(row["macs"])]
    speed = row["speed"]
    rates = ["-"] * 3
    if speed:
        rates = [format_rate(speed[f"{verb}_images_per_s"]) for verb in ("train", "score")]
        rates.append(str(speed["batch_size"]))
    first = [row["model"], str(row["image_size"]), *cost, *(rates if with_speed else [])]
    if not with_results:
        return [first]
    here = [r for r in row["results"] if r["image_size"] == row["image_size"]]
    lines = [first + (_format_result(here[0]) if here else ["-", ""])]
    for result in row["results"]:
        if here and result is here[0]:
            continue
        cells = ["", str(result["image_size"]), "", format_count(result["macs"])]
        lines.append(cells + [""] * (3 * with_speed) + _format_result(result))
    return lines


def _format_result(result: Mapping[str, Any]) -> list[str]:
    accuracy = format_interval(result["test_accuracy"], percent=True)
    return [accuracy, f"{result['train_images']:,} images, {result['epochs']} epochs"]


def align_table(head: Sequence[str] | None, rows: Sequence[Sequence[str]], sides: str) -> str:
    """Align columns under their heads, `<` left and `>` right, without trailing blanks."""
    table = [*([head] if head else []), *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        GAP.join(
            f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)
        ).rstrip()
        for row in table
    )


def format_count(number: int | None) -> str:
    """Format to three significant digits: `39.1 k`, `556 M`, `1.30 G`; a dash for None."""
    if number is None:
        return "-"
    for unit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * unit:
            return f"{number / unit:#.3g}".rstrip(".") + f" {letter}"
    return str(number)


def format_rate(images_per_s: float) -> str:
    """Format as `1,234`, or with one decimal below 100."""
    return f"{images_per_s:,.1f}" if images_per_s < 100 else f"{images_per_s:,.0f}"
