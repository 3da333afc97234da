"""All of it, in order: the list of stage calls behind `demo`, `pipeline` and `repair`.

Floor: doors.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from cifake_ray.config import (
    ConvertConfig,
    EvaluateConfig,
    PipelineConfig,
    SampleConfig,
    ScoreConfig,
    TrainConfig,
)
from cifake_ray.console import ProgressLine, say, show_epoch
from cifake_ray.errors import ExitCode, StorageError
from cifake_ray.storage.files import resolve_path

# Enough for the cnn to learn the sample, in about half a minute on two cores.
DEMO_TRAINING: dict[str, Any] = {"epochs": 12, "batch_size": 32, "lr": 0.001, "warmup": 0.3}


def run_verb(config: Any, started_s: float) -> tuple[Any, int]:
    """Run the verb a config belongs to: its result and exit code."""
    if isinstance(config, SampleConfig):
        from cifake_ray.storage.samples import write_sample

        out = write_sample(config)
        return {"command": "sample", "out": str(out), "images": config.images}, ExitCode.OK
    if isinstance(config, TrainConfig):
        from cifake_ray.stages.train import train_detector

        return train_detector(config, show_epoch, started_s), ExitCode.OK
    from cifake_ray.stages.batch import BatchSummary

    if isinstance(config, ConvertConfig):
        from cifake_ray.stages.convert import convert_images

        result = convert_images(config, ProgressLine("convert"), started_s)
    elif isinstance(config, ScoreConfig):
        from cifake_ray.stages.score import score_images

        result = score_images(config, ProgressLine("score"), started_s)
    else:
        from cifake_ray.stages.evaluate import evaluate_detector

        result = evaluate_detector(config, ProgressLine("evaluate"), started_s)
    if isinstance(result, BatchSummary):
        return result, result.exit_code(config.max_error_rate)
    return result, ExitCode.OK


def run_pipeline(config: PipelineConfig, training: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """convert, train, evaluate and score below one root; finished stages are left untouched."""
    from cifake_ray.stages.cluster import connect_cluster
    from cifake_ray.storage.files import read_json

    root = resolve_path(config.root)
    shards, run, report, scores = (str(root / n) for n in ("shards", "run", "report", "scores"))
    common: dict[str, Any] = {"address": config.address}
    codes = []
    with connect_cluster(config.address):
        for step in (
            ConvertConfig(src=config.src, out=shards, **common),
            TrainConfig(
                shards=shards,
                run=run,
                model=config.model,
                seed=config.seed,
                num_workers=config.num_workers,
                **training,
                **common,
            ),
            EvaluateConfig(shards=shards, bundle=run, out=report, **common),
            ScoreConfig(src=config.src, out=scores, bundle=run, **common),
        ):
            codes.append(run_verb(step, time.time())[1])
    metrics = read_json(Path(report) / "metrics.json")
    result = {
        "command": "pipeline",
        "out": str(root),
        "test_images": metrics["num_images"],
        "accuracy": metrics["accuracy"]["value"],
        "auroc": metrics["auroc"]["value"],
        "bundle": str(root / "run" / "bundle"),
        "report": str(root / "report" / "report.html"),
        "scores": str(root / "scores" / "scores"),
    }
    return result, max(codes)


def run_demo(out: str, *, images: int, seed: int) -> tuple[dict[str, Any], int]:
    """The whole pipeline on the sample: a report to look at in about two minutes."""
    root = resolve_path(out)
    say(f"demo: writing a sample of {images:,} images to {root / 'images'}")
    run_verb(SampleConfig(out=str(root / "images"), images=images, seed=seed), time.time())
    config = PipelineConfig(src=str(root / "images"), root=str(root), seed=seed)
    result, code = run_pipeline(config, DEMO_TRAINING)
    return {**result, "command": "demo"}, code


def repair_run(out: str, started_s: float) -> tuple[Any, int]:
    """Redo the shards that are not what was committed, and only those."""
    from cifake_ray.storage.runs import read_run, set_damage_aside

    path = resolve_path(out)
    run = read_run(path)
    if run is None:
        raise StorageError(f"{path}: no _run.json; give the output of convert, score or evaluate")
    config_class: Any = {
        "convert": ConvertConfig,
        "score": ScoreConfig,
        "evaluate": EvaluateConfig,
    }[run.command]
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in run.config.items()}
    config = config_class(**values, out=str(path))
    aside = set_damage_aside(path)
    try:
        result = run_verb(config, started_s)
        aside.discard()
    finally:
        aside.restore()  # if it could not be done, nothing is worse than before
    return result
