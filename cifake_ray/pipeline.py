"""Calls the stages: one for most verbs, several in order for `demo`, `pipeline` and `repair`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from cifake_ray.config import (
    VERBS,
    AuditConfig,
    BatchConfig,
    BundleConfig,
    CompareConfig,
    ConvertConfig,
    DecideConfig,
    EvaluateConfig,
    ExportConfig,
    PipelineConfig,
    RepairConfig,
    ReviewConfig,
    SampleConfig,
    ScoreConfig,
    TrainConfig,
    TuneConfig,
    VerifyConfig,
)
from cifake_ray.config.export import STDOUT
from cifake_ray.console import ProgressLine, StepLine, log, show_bytes, show_epoch
from cifake_ray.errors import ExitCode, StorageError
from cifake_ray.files_line import FilesLine, format_speed
from cifake_ray.storage.io.paths import AnyPath, explain_os_error, link_path, resolve_path
from cifake_ray.storage.s3.location import open_path

if TYPE_CHECKING:
    from cifake_ray.storage.runs.verify import DamagedFile

# Enough to fit the sample with the cnn, in about half a minute on two cores.
DEMO_TRAINING: dict[str, Any] = {"epochs": 12, "batch_size": 32, "lr": 0.001, "warmup": 0.3}


def run_verb(config: Any, started_s: float) -> tuple[Any, int]:
    """Run the verb that a config belongs to; return its result and exit code."""
    verb = next(name for name, kind in VERBS.items() if kind is type(config))
    log(f"{verb}: working ...")
    return RUNNERS[type(config)](config, started_s)


def run_pipeline(config: PipelineConfig, training: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Convert, train, evaluate and score below one root; leave finished stages untouched."""
    from cifake_ray.stages.cluster import connect_cluster
    from cifake_ray.stages.evaluate.driver import read_metrics
    from cifake_ray.stages.resources import runs_here
    from cifake_ray.stages.train.placement import place_training, trains_here
    from cifake_ray.stages.train.prepare import build_checked
    from cifake_ray.storage.io.files import exists

    root = resolve_path(config.root, config.store)
    shards, run, report, scores = (str(root / n) for n in ("shards", "run", "report", "scores"))
    common = asdict(config.cluster)
    batch = {**common, "num_workers": config.batch_workers}
    train = TrainConfig(
        shards=shards,
        run=run,
        model=config.model,
        seed=config.seed,
        num_workers=config.num_workers,
        device=config.device,
        **training,
        **common,
    )
    steps = (
        ConvertConfig(src=config.src, out=shards, **batch),
        train,
        EvaluateConfig(shards=shards, bundle=run, out=report, device=config.device, **batch),
        ScoreConfig(src=config.src, out=scores, bundle=run, device=config.device, **batch),
    )
    build_checked(train)  # fail before hours of converting if the options do not fit together
    if config.dry_run:
        convert = replace(steps[0], dry_run=True)
        plan, code = run_verb(convert, time.monotonic())
        return {**asdict(plan), "command": "pipeline", "out": str(root)}, code
    with ExitStack() as stack:
        if not (trains_here(train) and runs_here(config, config.batch_workers, config.device)):
            resources = stack.enter_context(connect_cluster(config, log=log))
            is_trained = exists(root / "run" / "_SUCCESS")
            if not (is_trained or config.scale_timeout_s or trains_here(train)):
                place_training(train, resources)
        codes = [run_verb(step, time.monotonic())[1] for step in steps]
    metrics = read_metrics(root / "report")
    result = {
        "command": "pipeline",
        "out": str(root),
        "test_images": metrics["num_images"],
        "accuracy": metrics["accuracy"]["value"],
        "auroc": metrics["auroc"]["value"],
        "bundle": str(root / "run" / "bundle"),
        "report": link_path(root / "report" / "report.html"),
        "scores": str(root / "scores" / "scores"),
    }
    return result, max(codes)


def run_demo(out: str, *, images: int, seed: int) -> tuple[dict[str, Any], int]:
    """Run the whole pipeline on the sample, which makes a report in less than a minute."""
    root = resolve_path(out)
    log(f"demo: writing a sample of {images:,} images to {root / 'images'}")
    run_verb(SampleConfig(out=str(root / "images"), images=images, seed=seed), time.monotonic())
    config = PipelineConfig(src=str(root / "images"), root=str(root), seed=seed)
    result, code = run_pipeline(config, DEMO_TRAINING)
    return {**result, "command": "demo"}, code


def _write_sample(config: SampleConfig, started_s: float) -> tuple[Any, int]:
    from cifake_ray.storage.datasets.sample_folder import write_sample

    out = write_sample(config)
    return {"command": "sample", "out": str(out), "images": config.images}, ExitCode.OK


def judge_errors(result: Any, config: BatchConfig) -> ExitCode:
    """Return the exit code of a batch; say why if it is that of too many errors."""
    code: ExitCode = result.exit_code(config.max_error_rate)
    if code != ExitCode.OK:
        errors = ", ".join(f"{count:,} {error}" for error, count in result.errors.items())
        log(
            f"{result.command}: {result.failed:,} of {result.listed:,} images failed ({errors}),"
            f" which is more than --max-error-rate {config.max_error_rate:g}: exit code {code:d};"
            f" the rows of all images are in {result.out}"
        )
    return code


def _convert(config: ConvertConfig, started_s: float) -> tuple[Any, int]:
    from cifake_ray.stages.convert import convert_images

    src, out = open_path(config.src, config.store), open_path(config.out, config.store)
    result = convert_images(config, src, out, ProgressLine("convert"), started_s, log)
    return result, judge_errors(result, config)


def _audit(config: AuditConfig, started_s: float) -> tuple[Any, int]:
    from cifake_ray.stages.audit import audit_images

    src, out = open_path(config.src, config.store), open_path(config.out, config.store)
    result = audit_images(config, src, out, ProgressLine("audit"), started_s, log)
    return result, judge_errors(result, config)


def _train(config: TrainConfig, started_s: float) -> tuple[Any, int]:
    if config.leave_one_source_out:
        from cifake_ray.stages.evaluate.source_matrix import measure_sources

        line = ProgressLine("evaluate")
        return measure_sources(config, show_epoch, line, log, StepLine()), ExitCode.OK
    from cifake_ray.stages.train.driver import train_detector

    return train_detector(config, show_epoch, started_s, log, StepLine()), ExitCode.OK


def _tune(config: TuneConfig, started_s: float) -> tuple[Any, int]:
    from cifake_ray.stages.tune.driver import tune_detector

    return tune_detector(config, started_s, log), ExitCode.OK


def _evaluate(config: EvaluateConfig, started_s: float) -> tuple[Any, int]:
    from cifake_ray.stages.evaluate.driver import evaluate_detector

    shards, out = open_path(config.shards, config.store), open_path(config.out, config.store)
    bundle, line = _locate_given(config), ProgressLine("evaluate")
    result = evaluate_detector(config, shards, out, bundle, line, started_s, log)
    return result, judge_errors(result, config)


def _score(config: ScoreConfig, started_s: float) -> tuple[Any, int]:
    from cifake_ray.stages.score import score_images

    src, out = open_path(config.src, config.store), open_path(config.out, config.store)
    bundle, line = _locate_given(config), ProgressLine("score")
    result = score_images(config, src, out, bundle, line, started_s, log)
    return result, judge_errors(result, config)


def _locate_given(config: BundleConfig) -> AnyPath | None:
    """Return the path of `--bundle`, None where the images choose the detector."""
    from cifake_ray.storage.bundles.built_ins import locate_bundle

    return None if config.bundle is None else locate_bundle(config.bundle, config.store)


def _compare(config: CompareConfig, started_s: float) -> tuple[Any, int]:
    from cifake_ray.stages.compare.driver import compare_reports, write_comparison

    result = compare_reports(config, log)
    if config.out is not None:
        write_comparison(result, config)
    return {**result, "out": config.out}, ExitCode.OK


def _decide(config: DecideConfig, started_s: float) -> tuple[Any, int]:
    from cifake_ray.storage.runs.decisions import decide_scores

    scores, out = open_path(config.src, config.store), open_path(config.out, config.store)
    return decide_scores(config, out, scores, log), ExitCode.OK


def _verify(config: VerifyConfig, started_s: float) -> tuple[Any, int]:
    from cifake_ray.stages.verify import verify_output

    path = open_path(config.out, config.store)
    damage = verify_output(config, path, FilesLine("verify", format_speed), log)
    result = _describe_damage("verify", config.out, path, damage)
    return result, ExitCode.STORAGE if result["damaged"] else ExitCode.OK


def _describe_damage(
    command: str, out: str, path: AnyPath, damage: list[DamagedFile]
) -> dict[str, Any]:
    from cifake_ray.storage.runs.run import require_run

    manifest = require_run(path).manifest
    return {
        "command": command,
        "out": out,
        "files": manifest.num_shards + len(manifest.files),
        "rows": manifest.num_rows,
        "damaged": {item.name: item.reason for item in damage},
    }


def _repair(config: RepairConfig, started_s: float) -> tuple[Any, int]:
    """Redo the shards that differ from what was committed, and only those."""
    from cifake_ray.stages.batch.summary import read_summary
    from cifake_ray.stages.verify import verify_output
    from cifake_ray.storage.runs.run import require_run
    from cifake_ray.storage.runs.verify import find_damage, plan_seal_check, set_damaged_aside

    path = open_path(config.out, config.store)
    run = require_run(path)
    verbs = {
        "audit": AuditConfig,
        "convert": ConvertConfig,
        "score": ScoreConfig,
        "evaluate": EvaluateConfig,
    }
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in run.config.items()}
    here = {"out": config.out, "num_workers": config.num_workers, **asdict(config.cluster)}
    try:
        again = verbs[run.command](**values, **here)
    except (KeyError, TypeError, ValueError) as error:
        raise StorageError(
            f"{path}/_run.json: not the metadata of a run that can be repaired ({error}); it may"
            " have been edited"
        ) from error
    line = FilesLine("repair", format_speed)
    damage = find_damage(path, lambda out: verify_output(config, out, line, log))
    with suppress(StorageError):  # of a damaged summary
        if damage == [] and read_summary(path):
            return _describe_damage("repair", config.out, path, []), ExitCode.OK
    if damage is None:  # the run, which makes again what is missing, reads footers only
        damage = verify_output(config, path, line, log, plan_seal_check)
    for item in damage:
        log(f"repair: {item.name} is set aside: {item.reason}")
    aside = set_damaged_aside(path, damage)
    try:
        result = run_verb(again, started_s)
    finally:
        left = aside.restore()  # after a failure everything is as it was before
    for kept in left:
        log(f"repair: {kept} is a folder, or must not be removed: it stays")
    return result


def _export(config: ExportConfig, started_s: float) -> tuple[Any, int]:
    from cifake_ray.report.summary_text import describe_counts
    from cifake_ray.storage.runs.export import encode_scores, export_scores

    if config.chosen_format == "onnx":
        return _export_detector(config), ExitCode.OK
    scores = open_path(config.src, config.store)
    if config.makes_folder:
        from cifake_ray.stages.export import export_folder

        target = resolve_path(config.file, config.store)
        line = FilesLine("export", lambda rate: f"{rate:,.0f} rows/s")
        return export_folder(config, scores, target, line, log), ExitCode.OK
    counts: Counter[str] = Counter()
    if config.file == STDOUT:
        try:
            show_bytes(encode_scores(scores, config, counts))
        except OSError as error:
            raise explain_os_error(error, "standard output") from error
        log(f"export: {counts.pop('rows', 0):,} rows{describe_counts(counts)}")
        return None, ExitCode.OK
    export_scores(scores, resolve_path(config.file, config.store), config, counts)
    rows = counts.pop("rows", 0)
    result = {"command": "export", "out": config.file, "rows": rows, "left_out": dict(counts)}
    return result, ExitCode.OK


def _export_detector(config: ExportConfig) -> dict[str, Any]:
    from cifake_ray.storage.bundles.built_ins import locate_bundle
    from cifake_ray.storage.runs.export_onnx import export_detector

    file = resolve_path(config.file, config.store)
    info, found = export_detector(locate_bundle(config.src, config.store), file, config)
    return {
        "command": "export",
        "out": config.file,
        "architecture": info.architecture,
        "image_size": info.preprocessing.image_size,
        "num_crops": info.preprocessing.num_crops,
        "bundle_sha256": info.fingerprint,
        **asdict(found),
    }


def _review(config: ReviewConfig, started_s: float) -> tuple[Any, int]:
    from cifake_ray.stages.review import review_scores

    scores, file = open_path(config.src, config.store), resolve_path(config.file, config.store)
    decisions = config.decisions and open_path(config.decisions, config.store)
    return review_scores(config, scores, file, decisions or None, log), ExitCode.OK


# Each resolves the paths of its verb, and imports its stage itself.
RUNNERS: dict[type, Callable[[Any, float], tuple[Any, int]]] = {
    SampleConfig: _write_sample,
    AuditConfig: _audit,
    ConvertConfig: _convert,
    TrainConfig: _train,
    TuneConfig: _tune,
    EvaluateConfig: _evaluate,
    ScoreConfig: _score,
    PipelineConfig: lambda config, _: run_pipeline(config, {"epochs": config.epochs}),
    CompareConfig: _compare,
    DecideConfig: _decide,
    VerifyConfig: _verify,
    RepairConfig: _repair,
    ExportConfig: _export,
    ReviewConfig: _review,
}
