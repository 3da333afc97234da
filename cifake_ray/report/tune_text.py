"""Format the trials of a search: the table for a terminal, and the best trial's recipe."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from cifake_ray.config import Monitor
from cifake_ray.core.search.trial_table import format_value
from cifake_ray.core.training.early_stopping import to_score
from cifake_ray.report.text import format_rows


def describe_end(row: Mapping[str, Any]) -> str:
    """Return why a trial ended, else whether it runs or waits."""
    if row["end"] is not None:
        return str(row["end"])
    return "running" if row["epochs"] else "waiting"


def sort_trials(rows: Sequence[Mapping[str, Any]], objective: Monitor) -> list[Mapping[str, Any]]:
    """Return the rows of the trials, best first."""
    return sorted(
        rows,
        key=lambda row: math.inf if row[objective] is None else -to_score(dict(row), objective),
    )


def format_trials(
    rows: Sequence[Mapping[str, Any]], names: Sequence[str], objective: Monitor, width: int
) -> str:
    """Return a table with a line for each trial, best first, and what was chosen for it.

    `names` are those of the searched options. What does not fit into `width` characters is cut.
    """
    table = format_rows(
        ("trial", objective, "epoch", "state", "options"),
        [
            (
                str(row["trial"]),
                "-" if row[objective] is None else f"{row[objective]:.4f}",
                str(row["epochs"]),
                describe_end(row),
                ", ".join(f"{name} {format_value(row[name])}" for name in names),
            )
            for row in sort_trials(rows, objective)
        ],
    )
    lines = table.splitlines()
    return "\n".join(x if len(x) <= width else f"{x[: width - 5]}[...]" for x in lines)


def format_recipe(
    options: Mapping[str, Any],
    *,
    command: str,
    row: Mapping[str, Any],
    objective: str,
    is_alone: bool,
) -> str:
    """Return `recipe.yaml`: the options of a trial, for `train --recipe`.

    `is_alone`: the trial took no weights from another trial.
    """
    head = (
        f"# Trial {row['trial']} of a search: {objective} {row[objective]:.4f} after epoch"
        f" {row['best_epoch']} of {row['epochs']},\n# {row['train_s'] / 60:.1f} minutes of"
        f" training.\n#\n#   {command}\n"
    )
    if not is_alone:
        head += (
            "#\n# Population-based training changed options and weights during the trial. These are"
            " the\n# last options; on their own they give a different result.\n"
        )
    return head + yaml.safe_dump(dict(options), sort_keys=False)
