"""train --leave-one-source-out: a detector without each generator, measured on all of them.

    RUN/without-00/          a training that leaves nothing out, and report/ of what it has not seen
    RUN/without-01/ ...      the same without one FAKE source each, in the order of their names
    RUN/matrix.json .csv .html

Each step resumes by itself, so the same command continues where the one before ended.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pyarrow as pa

from cifake_ray.config import EvaluateConfig, TrainConfig, list_options
from cifake_ray.core.schema import FAKE, LABEL_NAMES, REAL
from cifake_ray.errors import RunMismatch, UsageError
from cifake_ray.report.source_matrix import list_cells, render_matrix
from cifake_ray.stages.batch.summary import Progress
from cifake_ray.stages.evaluate.driver import evaluate_detector, read_metrics
from cifake_ray.stages.train.driver import train_detector
from cifake_ray.storage.bundles.built_ins import locate_bundle
from cifake_ray.storage.io.files import exists, make_folder, write_bytes, write_json
from cifake_ray.storage.io.paths import AnyPath, link_path
from cifake_ray.storage.io.text_rows import encode_csv
from cifake_ray.storage.s3.location import open_path
from cifake_ray.storage.sources.parquet import ParquetSource, choose_columns

COMMAND = "train --leave-one-source-out"
TEST_FRACTION = 0.2  # of shards without a split `test`


def measure_sources(
    config: TrainConfig,
    on_epoch: Callable[[dict[str, Any], int], None],
    on_progress: Callable[[Progress], None],
    log: Callable[[str], None],
    on_step: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Train a detector without each FAKE source and write how well it finds every source.

    The images that are measured are those that a detector has not seen, of all splits. The same
    call again resumes. UsageError with fewer than two FAKE sources to train on.
    """
    started_s = time.monotonic()
    shards, root = open_path(config.shards, config.store), open_path(config.run, config.store)
    if exists(root / "_run.json"):
        raise RunMismatch(f"{root} belongs to another run; choose a new folder")
    sources, has_test = list_sources(shards, config)
    trained = sources.keys() - set(config.val_source_names)
    names = [name for name, label in sources.items() if label == FAKE and name in trained]
    if len(names) < 2:
        raise UsageError(
            f"--leave-one-source-out: {shards} has {len(names)} FAKE sources to train on, and it"
            " takes two; sources are the folders below FAKE, or the column --source-column"
        )
    command = shlex.join(["cifake-ray", "train", *list_options(config)])
    config = replace(
        config,
        leave_one_source_out=False,
        test_fraction=config.test_fraction or (0.0 if has_test else TEST_FRACTION),
    )
    left_out: list[str | None] = [None, *names]
    plan = {"command": COMMAND, "out": str(root), "detectors": len(left_out), "left_out": names}
    if config.dry_run:
        return plan
    rows = []
    for number, name in enumerate(left_out):
        folder = root / f"without-{number:02d}"
        log(
            f"train: detector {number + 1} of {len(left_out)}, without {name or 'nothing left out'}"
        )
        excluded = (*config.exclude_source, *([] if name is None else [name]))
        train = replace(config, run=str(folder), exclude_source=excluded)
        train_detector(train, on_epoch, time.monotonic(), log, on_step)
        report = folder / "report"
        evaluate = EvaluateConfig(
            shards=config.shards,
            bundle=str(folder),
            out=str(report),
            unseen=True,
            device=config.device,
            **asdict(config.cluster),
        )
        bundle = locate_bundle(str(folder), config.store)
        evaluate_detector(evaluate, shards, report, bundle, on_progress, time.monotonic(), log)
        metrics = read_metrics(report)
        found = {one["value"]: one for one in metrics["slices"].get("source", [])}
        rows.append({"left_out": name, "folder": folder.name, "slices": found})
    matrix = {
        **plan,
        "sources": {name: LABEL_NAMES[label] for name, label in sources.items()},
        "test_fraction": config.test_fraction,
        "excluded": list(config.exclude_source),
        "rows": rows,
    }
    cells = list_cells(matrix)
    make_folder(root)
    write_json(root / "matrix.json", matrix)
    write_bytes(root / "matrix.csv", encode_csv(list(cells[0]), cells))
    write_bytes(root / "matrix.html", render_matrix(matrix, command).encode())
    return {
        **plan,
        "cells": [cell for cell in cells if cell["source"] == cell["left_out"]],
        "seen": {cell["source"]: cell for cell in cells if cell["left_out"] is None},
        "elapsed_s": round(time.monotonic() - started_s, 1),
        "report": link_path(root / "matrix.html"),
    }


def list_sources(shards: AnyPath, config: TrainConfig) -> tuple[dict[str, int], bool]:
    """Return the sources to train on and their labels, and whether there is a split `test`.

    A source that has both labels counts as FAKE.
    """
    counts: set[tuple[str, int, str | None]] = set()
    listing = ParquetSource(shards, choose_columns(shards), labelled=True).list_images()
    for batch in listing.batches:
        table = pa.Table.from_batches([batch]).select(["source", "label", "split"])
        for row in table.group_by(table.column_names).aggregate([]).to_pylist():
            counts.add((row["source"], row["label"], row["split"]))
    trained = {
        (label, source)
        for source, label, split in counts
        if source is not None and split in (None, "train") and source not in config.exclude_source
    }
    sources = {source: label for label, source in sorted(trained)}  # FAKE after REAL
    test_labels = {label for _, label, split in counts if split == "test"}
    return dict(sorted(sources.items())), test_labels == {REAL, FAKE}
