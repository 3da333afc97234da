"""Train as one rank, in a worker of Ray Train or in the command's own process.

Rank 0 writes the checkpoint, the history and the bundle.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from cifake_ray.config import TrainConfig
from cifake_ray.core.evaluation.calibration import calibrate
from cifake_ray.core.evaluation.metrics import compute_metrics
from cifake_ray.core.imaging.training_domain import TrainingDomain
from cifake_ray.core.models.detector import Detector
from cifake_ray.core.training.check_precision import check_precisions
from cifake_ray.core.training.device_limits import agree_on_precision, check_batch_share
from cifake_ray.core.training.early_stopping import KeptEpoch
from cifake_ray.core.training.optimizer import sync_batch_norms
from cifake_ray.core.training.share_errors import share_errors
from cifake_ray.core.training.trainer import Trainer
from cifake_ray.core.training.validation import read_scored
from cifake_ray.errors import CifakeError
from cifake_ray.report.text import model_card
from cifake_ray.stages.malloc import keep_freed_memory
from cifake_ray.stages.train.prepare import Prepared, describe_options
from cifake_ray.stages.train.progress import Send, StepMeter
from cifake_ray.storage.bundles.weights import UNPICKLING_ERRORS
from cifake_ray.storage.bundles.write_bundle import write_bundle
from cifake_ray.storage.datasets.domain import read_domain
from cifake_ray.storage.datasets.training_set import TrainingData, open_training_data
from cifake_ray.storage.io.paths import resolve_path
from cifake_ray.storage.runs.train_run import TrainRun


def train_rank(
    prepared: Prepared,
    *,
    use_gpu: bool,
    num_threads: int,
    is_over: bool = False,
    on_save: Callable[[], None] = lambda: None,
    send: Send = lambda row: None,
) -> None:
    """Resume and train as one rank; rank 0 writes, and calls `on_save` for a new history.

    Rank 0 sends its progress.

    With `is_over` only write the bundle, and train no further.
    """
    config, detector = prepared.config, prepared.detector
    run = TrainRun(resolve_path(config.run, config.store))
    keep_freed_memory()
    torch.set_num_threads(num_threads)
    device = "cuda" if use_gpu else "cpu"
    teachers = [teacher.detector for teacher in prepared.teachers]
    if config.compile:
        for each in (detector, *teachers):
            each.network.compile()
    send({"message": f"train: opening {len(prepared.rows.label):,} images ..."})
    data = open_training_data(
        prepared.rows,
        detector.preprocessing,
        config,
        num_threads,
        log=lambda message: send({"message": message}),
    )
    wrapped, report = _join_group(config, detector, device)
    checkpoint = run.read_checkpoint()
    wanted: str = config.precision
    if wanted == "auto" and checkpoint is not None:  # what it became when the run began
        wanted = checkpoint.get("precision", wanted)
        wanted = "float32" if (wanted, device) == ("fp16", "cpu") else wanted
    precision = agree_on_precision(device, wanted)
    trainer = Trainer(
        detector, wrapped, config, data.train, data.val, precision, config.policy, teachers
    )
    check_batch_share(
        detector,
        config,
        device=device,
        num_images=len(data.train.labels),
        num_ranks=trainer.num_ranks,
    )
    if trainer.rank == 0:
        trainer.on_step = StepMeter(trainer, send)
    domain = read_domain(data.train, detector.preprocessing) if trainer.rank == 0 else None
    if checkpoint is not None:
        try:
            trainer.resume(checkpoint)
        except UNPICKLING_ERRORS as error:
            raise run.refuse_checkpoint(error) from error
        data.errors.update(checkpoint.get("unusable", {}))
        if trainer.rank == 0:  # an earlier attempt may have died before it wrote the history
            _show_history(run, trainer, on_save)

    def save() -> None:
        unusable = dict(data.errors)  # threads that decode the next batches add to it
        share_errors(unusable, len(prepared.rows.label), device)
        data.errors.update(unusable)
        if trainer.rank == 0:
            buffer = io.BytesIO()
            torch.save({**trainer.to_checkpoint(), "unusable": unusable}, buffer)
            run.write_checkpoint(buffer.getvalue())
            _show_history(run, trainer, on_save)
        report({"epoch": trainer.state.epoch, "step": trainer.state.step})

    if not is_over:
        with _explain_compiler(config):
            trainer.fit(save)
    best, averaged = trainer.choose_best()
    if trainer.rank == 0:
        send({"message": "train: writing the bundle ..."})
        _write_best(prepared, run, trainer, data, domain, best, averaged, send)


@contextmanager
def _explain_compiler(config: TrainConfig) -> Iterator[None]:
    """Raise CifakeError when `--compile` fails, such as without a C++ compiler."""
    if not config.compile:
        yield
        return
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        reason = str(error).splitlines()[0]
        raise CifakeError(
            f"--compile: {reason}; install what is missing, or leave --compile out"
        ) from error


def _show_history(run: TrainRun, trainer: Trainer, on_save: Callable[[], None]) -> None:
    if trainer.state.history:
        run.write_history(trainer.state.history)
        on_save()


def _join_group(
    config: TrainConfig, detector: Detector, device: str
) -> tuple[nn.Module, Callable[[dict[str, Any]], None]]:
    """Return the detector as this rank trains it, and the function that reports its progress."""
    if config.worker_range == (0, 0):
        return detector.to(device), lambda row: None
    import ray.train
    from ray.train.torch import prepare_model

    detector.network = sync_batch_norms(detector.network, device)
    return prepare_model(detector), ray.train.report


def _write_best(
    prepared: Prepared,
    run: TrainRun,
    trainer: Trainer,
    data: TrainingData,
    domain: TrainingDomain | None,
    best: KeptEpoch,
    averaged: list[int],
    send: Send,
) -> None:
    """Write the bundle: the best weights, calibrated on the validation images."""
    config, state = prepared.config, trainer.state
    trainer.detector.network.load_state_dict(best.weights)
    logit, label = best.logit.numpy(), data.val.labels
    calibration = calibrate(logit, label)
    read = partial(read_scored, data.val, trainer.detector.preprocessing)
    checks = check_precisions(trainer.detector, calibration, logit, label, read)
    for name, check in checks.items():
        use = "may" if check.is_harmless else "does not"
        what = f"{name} is {check.speedup:.1f} times as fast; {check}"
        send({"message": f"train: {what}; score --precision auto {use} use it"})
    metrics = compute_metrics(
        logit, label, temperature=calibration.temperature, threshold=calibration.threshold
    )
    settings = describe_options(config)
    # Without the folders above, which are private.
    shards, twins = (path and path.rpartition("/")[2] for path in (config.shards, config.twins))
    del settings["shards"]
    training = {
        **settings,
        "twins": twins,
        "precision": trainer.precision.name,
        "weights": config.weights and config.weights.rpartition("/")[2],
        "teacher": ", ".join(map(str, prepared.teachers)) or None,
        "distill": config.distill_weight if prepared.teachers else None,
        "train_images": data.train.count_usable(data.errors),
        "val_images": data.val.count_usable(data.errors),
        "val_accuracy": metrics["accuracy"]["value"],
        "best_epoch": best.epoch,
        "averaged_epochs": averaged,
        "steps": state.step,
    }
    card = model_card(
        name=f"{config.model} trained by cifake-ray",
        architecture=config.model,
        num_parameters=trainer.detector.num_parameters,
        trained_on=f"{training['train_images']:,} labelled images, REAL and FAKE ({shards}).",
        domain=domain,
        preprocessing=trainer.detector.preprocessing.to_dict(),
        training=training,
        calibration=calibration,
        metrics=metrics,
    )
    write_bundle(
        run.bundle_path,
        trainer.detector,
        calibration,
        domain,
        training={**training, "unusable": data.unusable},
        metrics=metrics,
        history=state.history,
        model_card=card,
        checks=checks,
    )
