"""Render the report of a search: its page and figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from cifake_ray.core.search.trial_table import MIN_TRIALS, format_value, measure_importance, to_axis
from cifake_ray.report.figures import (
    COLOURS,
    GRID,
    INK,
    MUTED,
    encode_figure,
    label_epochs,
    new_figure,
    shorten,
)
from cifake_ray.report.html import render_page
from cifake_ray.report.numbers import format_share
from cifake_ray.report.tune_text import describe_end, sort_trials

BEST = COLOURS["FAKE"]
ROW_HEIGHT = 0.32  # inches per bar
MIN_SHARE = 0.03  # of the importance: an option below it did not matter
MAX_OPTIONS = 6  # that are shown as having mattered
TOO_FEW_TRIALS = f"Which options mattered needs {MIN_TRIALS} trials with different results."

CAPTIONS = {
    "objective": "Each trial over its epochs; the best is thick, stopped trials end early.",
    "parallel": "What mattered, in each trial: the better, the darker; the best is thick.",
    "importance": (
        "Effect of each option on the objective: permutation importance of a random forest."
    ),
}


def render_tune_page(
    summary: Mapping[str, Any],
    rows: Sequence[dict[str, Any]],
    histories: Mapping[int, Sequence[Mapping[str, Any]]],
    recipe: str,
    command: str,
) -> str:
    """Return the page, to be written as UTF-8.

    `rows` are from `core.search.trial_table.to_row`, `histories` maps a trial's number to its
    epochs, `summary` is that of the stage.
    """
    objective, best_trial = summary["objective"], summary["best_trial"]
    names = list(summary["chosen"])
    varied = [name for name in names if len({str(row[name]) for row in rows}) > 1]
    importance = measure_importance(rows, names, objective)
    mattered = [name for name, share in importance.items() if share >= MIN_SHARE][:MAX_OPTIONS]
    figures = {"objective": draw_objective(histories, objective, best_trial)}
    if mattered:
        figures["importance"] = draw_bars(importance, "Share of the importance")
        figures["parallel"] = draw_parallel(rows, mattered, objective, best_trial)
    ends = Counter(describe_end(row) for row in rows)
    saved = 1 - summary["epochs"] / summary["epochs_planned"]
    best = f"{summary['best']:.4f}"
    ordered = [
        {**row, "state": describe_end(row), "values": {n: format_value(row[n]) for n in varied}}
        for row in sort_trials(rows, objective)
    ]
    return render_page(
        "tuning.html.j2",
        title=f"Search {summary['out'].rstrip('/').rpartition('/')[2]}",
        sentence=f"The best of {len(rows)} trials is trial {best_trial}:"
        f" {objective} {best}{_describe_baseline(summary)}.",
        cards={
            objective: (best, f"trial {best_trial}{_format_interval(summary)}"),
            "Trials": (f"{len(rows)}", f"{len(names)} options searched"),
            "Epochs trained": (
                f"{summary['epochs']:,}",
                f"of {summary['epochs_planned']:,}, {format_share(saved)} saved by stopping early",
            ),
        },
        ends=", ".join(f"{end} ({count:,})" for end, count in ends.most_common()),
        figures=figures,
        captions=CAPTIONS,
        note="" if importance else TOO_FEW_TRIALS,
        objective=objective,
        # A few trials fit side by side with all of their options; of many, what mattered.
        is_small=len(rows) < MIN_TRIALS,
        names=mattered or varied,
        varied=varied,
        fixed={n: format_value(rows[0][n]) for n in names if n not in varied} if rows else {},
        rows=ordered,
        best_trial=best_trial,
        recipe=recipe,
        facts={
            "Command": command,
            "Bundle": summary["bundle"],
            "Recipe": summary["recipe"],
            "Optimiser steps": f"{summary['steps']:,}",
        },
    )


def _format_interval(summary: Mapping[str, Any]) -> str:
    interval = summary["best_interval"]
    return f", 95% interval {interval[0]:.4f} to {interval[1]:.4f}" if interval else ""


def _describe_baseline(summary: Mapping[str, Any]) -> str:
    """Compare the best trial with the recipe as it is, if that was a trial."""
    if summary["baseline"] is None:
        return ""
    if summary["baseline"] == summary["best"]:
        return ", no better than the recipe as it is"
    return f"; the recipe as it is has {summary['baseline']:.4f}"


def draw_objective(
    histories: Mapping[int, Sequence[Mapping[str, Any]]], objective: str, best_trial: int
) -> bytes:
    """Draw the objective of every trial over its epochs."""
    figure, (axes,) = new_figure()
    for number, history in histories.items():
        is_best = number == best_trial
        axes.plot(
            [row["epoch"] for row in history],
            [row[objective] for row in history],
            "o-",
            color=BEST if is_best else MUTED,
            alpha=1.0 if is_best else 0.45,
            linewidth=2.4 if is_best else 1.0,
            markersize=4 if is_best else 2.5,
            zorder=3 if is_best else 2,
            label=f"trial {number}" if is_best else None,
        )
    label_epochs(axes)
    axes.set_ylabel(objective)
    axes.legend(loc="best")
    axes.set_title("Objective over the epochs")
    return encode_figure(figure)


def draw_parallel(
    rows: Sequence[Mapping[str, Any]], names: Sequence[str], objective: str, best_trial: int
) -> bytes:
    """Draw parallel coordinates with stacked axes, the objective last."""
    trained = [row for row in rows if row[objective] is not None]
    axes_of = {name: to_axis([row[name] for row in trained]) for name in (*names, objective)}
    figure, (axes,) = new_figure(height=1.2 + 0.55 * len(axes_of))
    reached = axes_of[objective][0]
    levels = 1 - reached if objective == "val_loss" else reached
    heights = list(range(len(axes_of)))[::-1]
    for index, row in enumerate(trained):
        is_best = row["trial"] == best_trial
        axes.plot(
            [positions[index] for positions, _ in axes_of.values()],
            heights,
            color=BEST if is_best else INK,
            alpha=1.0 if is_best else 0.1 + 0.6 * float(levels[index]),
            linewidth=2.4 if is_best else 1.0,
            zorder=3 if is_best else 2,
        )
    for height, (_, marks) in zip(heights, axes_of.values(), strict=True):
        axes.axhline(height, color=GRID, linewidth=1)
        for position, text in marks.items():
            axes.annotate(
                shorten(text),
                (position, height),
                (0, 4),
                textcoords="offset points",
                ha="center",
                fontsize=7,
                color=INK,
                parse_math=False,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85},
                zorder=4,
            )
    axes.grid(False)
    axes.set_xticks([])
    axes.set_yticks(heights, [shorten(name) for name in axes_of], parse_math=False)
    axes.set_xlim(-0.06, 1.06)
    axes.set_ylim(-0.4, len(axes_of) - 0.4)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_title("Options of the trials")
    return encode_figure(figure)


def draw_bars(values: Mapping[str, float], label: str) -> bytes:
    """Draw a bar for each name, the first on top."""
    from matplotlib.ticker import MaxNLocator

    figure, (axes,) = new_figure(height=1.4 + ROW_HEIGHT * len(values))
    names = [shorten(name) for name in values]
    axes.barh(range(len(names)), list(values.values()), color=COLOURS["REAL"])
    axes.set_yticks(range(len(names)), names, parse_math=False)
    are_counts = all(isinstance(value, int) for value in values.values())
    axes.xaxis.set_major_locator(MaxNLocator(integer=are_counts))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(label)
    return encode_figure(figure)
