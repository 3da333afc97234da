"""Measure trainings on crops, step by step of the recipe, on sources that none of them saw.

    python tests/benchmarks/wild_rows.py --wild WILD --mixed MIXED --twins TWINS/esrgan --work DIR
        --val-sources A,B --run native=RUN0 --run native=RUN1 --run twins=RUN2 ...
        [--crops twins=1 --crops twins=16]

Prints a Markdown table with a line for each name: the runs of one name are its seeds, of which the
mean and the range are shown; `--crops` adds a line of these runs with another number of crops.
WILD, MIXED, TWINS and the threshold are those of rivals.py. Under JPEG 75, `web` and `hard` (of the
grid `default`) it is the AUROC of WILD's test images. DIR keeps the scores.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from measure import format_table, log
from rivals import (
    Compute,
    LabelledImage,
    compute_cached,
    find_worst,
    list_mixed,
    list_twins,
    list_wild,
    measure,
)
from rivals_detectors import Floats, open_rgb
from sklearn.metrics import roc_auc_score

from cifake_ray.api import load_detector
from cifake_ray.config import EvaluateConfig
from cifake_ray.config.grid import Cell
from cifake_ray.core.imaging.perturbation import perturb_image, seed_noise
from cifake_ray.storage.presets.grid import read_grid

CELLS = ("jpeg_75", "web", "hard")
GROUPS = ("unseen", "wild", "mixed", "twins")


def load_score(run: Path, num_crops: int | None, cell: Cell) -> Compute:
    """Return what computes the logit of an image under a cell, by `num_crops` crops at most."""
    loaded = load_detector(str(run))
    if num_crops:
        preprocessing = replace(loaded.detector.preprocessing, num_crops=num_crops)
        loaded.detector.preprocessing = preprocessing

    def compute(data: bytes) -> float:
        image: Any = data
        if cell:
            image = perturb_image(np.asarray(open_rgb(data)), cell, seed_noise(data))
        return float(loaded.predict_logit([image])[0])

    return compute


def measure_run(
    run: Path, num_crops: int | None, images: Sequence[LabelledImage], work: Path
) -> dict[str, float]:
    """Return the columns of a run."""
    name = f"{load_detector(str(run)).bundle.fingerprint[:16]}-{num_crops or 'own'}"

    def score(chosen: Sequence[LabelledImage], cell_name: str, cell: Cell) -> Floats:
        cache = work / f"{name}-{cell_name}.npz"
        return compute_cached(cache, chosen, lambda: load_score(run, num_crops, cell))

    logit = score(images, "clean", {})
    is_readable = np.isfinite(logit)
    if not is_readable.all():
        log(f"{run}: {(~is_readable).sum()} images left out as unreadable")
    images = [image for image, keep in zip(images, is_readable, strict=True) if keep]
    found = measure(images, logit[is_readable])
    row = {f"AUROC {group}": found["auroc"][group] for group in GROUPS}
    row["worst generator"] = find_worst(found["sources"], "FAKE")[1]
    row["TPR"], row["FPR"] = found["tpr"], found["fpr"]
    row["worst REAL source, right"] = find_worst(found["sources"], "REAL")[1]
    wild = [image for image in images if image.group == "wild"]
    label = np.array([image.label for image in wild])
    grid = read_grid(EvaluateConfig(shards="-", out="-", grid="default")) or {}
    for cell_name in CELLS:
        logit = score(wild, cell_name, grid[cell_name])
        row[cell_name] = float(roc_auc_score(label, logit))
    return row


def format_column(name: str, values: Sequence[float]) -> str:
    """Format the mean of all seeds and, of several, their range."""
    form = "{:.0%}" if name in ("TPR", "FPR") or name.endswith("right") else "{:.3f}"
    middle = form.format(mean(values))
    if len(values) == 1:
        return middle
    return f"{middle} ({form.format(min(values))}-{form.format(max(values))})"


def split_pair(text: str) -> tuple[str, str]:
    name, found, value = text.partition("=")
    if not found:
        raise argparse.ArgumentTypeError(f"{text}: give NAME=VALUE")
    return name, value


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("--wild", "--mixed", "--twins", "--work"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--val-sources", required=True)
    parser.add_argument("--run", type=split_pair, action="append", required=True)
    parser.add_argument("--crops", type=split_pair, action="append", default=[])
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    images = [
        image
        for image in (
            *list_wild(options.wild, options.val_sources.split(",")),
            *list_mixed(options.mixed),
            *list_twins(options.twins),
        )
        if image.group != "train"
    ]
    runs: dict[str, list[Path]] = {}
    for name, run in options.run:
        runs.setdefault(name, []).append(Path(run))
    if unknown := {name for name, _ in options.crops} - runs.keys():
        raise SystemExit(f"--crops: no --run is named {', '.join(sorted(unknown))}")
    lines: list[tuple[str, str, int | None]] = [(name, name, None) for name in runs]
    lines += [(f"{name}, {n} crops", name, int(n)) for name, n in options.crops]
    table: list[list[str]] = []
    for title, name, num_crops in lines:
        rows = [measure_run(run, num_crops, images, options.work) for run in runs[name]]
        table = table or [["training", "seeds", *rows[0]]]
        columns = [format_column(key, [row[key] for row in rows]) for key in rows[0]]
        table.append([title, str(len(rows)), *columns])
    print(format_table(table))


if __name__ == "__main__":
    main()
