"""Refuse links in an output folder that lead out of it: all that is touched there is in it."""

from __future__ import annotations

import os
from pathlib import Path

from cifake_ray.errors import StorageError
from cifake_ray.storage.io.paths import AnyPath, explain_errors, is_inside

# What the verbs write into an output folder; entries of other names belong to a person.
OWN_NAMES = {
    *("_SUCCESS", "_attempts", "_files.parquet", "_manifest", "_run.json", ".huggingface.yaml"),
    *("attempts", "manifest", "audit", "shards", "scores", "predictions"),
    *("figures", "metrics.json", "report.html", "audit.html", "audit.json", "_duplicates.parquet"),
    "_changes.parquet",
    *(
        "bundle",
        "checkpoints",
        "digests.parquet",
        "history.jsonl",
        "mlflow.json",
        "summary.csv",
        "tensorboard",
    ),
    *("decisions", "policy.json", "_settled.parquet"),
    "_parts",
    *("ray", "recipe.yaml", "trials", "trials.csv", "trials.parquet"),
}


def check_links(out: AnyPath) -> None:
    """Raise StorageError for a link, among what the verbs write into a folder, that leads out."""
    if not isinstance(out, Path) or not out.is_dir():
        return
    pending = [out]
    while pending:
        folder = pending.pop()
        with explain_errors(folder), os.scandir(folder) as entries:
            for entry in entries:
                if folder == out and entry.name not in OWN_NAMES:
                    continue
                if entry.is_symlink():
                    if not is_inside(Path(entry.path), out):
                        raise StorageError(
                            f"{entry.path} is a link that leads out of {out}; put the files"
                            " themselves there, or choose a new output folder"
                        )
                elif entry.is_dir():
                    pending.append(folder / entry.name)
