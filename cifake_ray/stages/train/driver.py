"""train: shards -> a bundle, with Ray Train.

Every worker runs `train_rank`; with `--num-workers 0` this process does. Rank 0 writes the latest
checkpoint, the history and, at the end, the bundle. A checkpoint is one file below RUN that is
written atomically, so a run resumes after a killed worker or a killed driver.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from cifake_ray.config import TrainConfig
from cifake_ray.core.training.device_limits import check_batch_share
from cifake_ray.core.training.early_stopping import explain_end
from cifake_ray.errors import CifakeError
from cifake_ray.stages.resources import count_local_cpus
from cifake_ray.stages.train.placement import (
    choose_gpu_here,
    describe_plan,
    describe_resizing,
    describe_start,
    describe_workers,
    trains_here,
)
from cifake_ray.stages.train.prepare import (
    Prepared,
    build_checked,
    describe_options,
    prepare_training,
)
from cifake_ray.stages.train.progress import receive
from cifake_ray.stages.train.worker import train_rank
from cifake_ray.storage.bundles.built_ins import pin_bundle
from cifake_ray.storage.bundles.bundle import read_bundle_info
from cifake_ray.storage.bundles.pretrained import load_starting_weights
from cifake_ray.storage.bundles.teachers import identify_teachers, load_teachers, pin_teachers
from cifake_ray.storage.datasets.pixel_cache import locate_cache
from cifake_ray.storage.io.paths import resolve_path
from cifake_ray.storage.presets.augmentation import read_augmentation
from cifake_ray.storage.runs.run import read_record
from cifake_ray.storage.runs.trackers import Tracking, check_trackers
from cifake_ray.storage.runs.train_run import TrainRun
from cifake_ray.storage.s3.location import open_path

POLL_S = 0.5  # between two reads of the history


@dataclass(frozen=True)
class TrainSummary:
    """Result of a finished training, printed and stored in `_SUCCESS`."""

    command: str
    out: str
    bundle: str
    model: str
    num_parameters: int
    train_images: int
    val_images: int
    unusable: dict[str, int]
    epochs: int
    epochs_resumed: int
    stopped: str  # why the training ended
    steps: int
    best_epoch: int
    averaged_epochs: list[int]  # their mean weights are those of the bundle
    val_accuracy: float  # of the bundle
    train_s: float  # in training epochs, over all attempts
    images_per_s: float  # training images, over all attempts
    elapsed_s: float
    weights: str | None = None  # the starting weights, unless initialised at random
    images_in_both_classes: int = 0  # whose bytes also occur with the other label
    precision: str | None = None  # what `auto` became; None in runs of before
    # Of the bundle, on p_fake; None in runs of before, and if no threshold keeps the rate.
    threshold: float | None = None
    threshold_fpr_1: float | None = None
    threshold_fpr_01: float | None = None
    untracked: dict[str, int] = field(
        default_factory=dict
    )  # rows that could not be logged, per tracker


def train_detector(
    config: TrainConfig,
    on_epoch: Callable[[dict[str, Any], int], None],
    started_s: float,
    log: Callable[[str], None] = lambda message: None,
    on_step: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    """Train to `config.run`/bundle. The same call again resumes; a finished run is left untouched.

    Call `on_epoch(row, epochs)` once per finished epoch, `on_step(row)` now and then within one,
    and `log` for other messages. With
    `config.track`, log to the trackers of a finished run the rows that they lack.
    """
    check_trackers(config.track)
    # Absolute, because a Ray worker has another working folder.
    config = replace(
        config,
        weights=config.weights and pin_bundle(config.weights, config.store),
        teacher=config.teacher and pin_teachers(config.teacher, config.store),
        shards=str(open_path(config.shards, config.store)),
        twins=config.twins and str(open_path(config.twins, config.store)),
        run=str(open_path(config.run, config.store)),
        cache_dir=config.cache_dir and str(locate_cache(config.cache_dir)),  # else each node's own
        augment=read_augmentation(config),
        num_workers="0" if trains_here(config) else config.num_workers,
    )
    run = TrainRun(resolve_path(config.run, config.store))
    if not config.dry_run and (summary := _find_finished(config, run, log)) is not None:
        return summary
    log(f"train: reading {config.shards} ...")
    prepared = prepare_training(
        config
    )  # fails here, not in every worker, if options do not fit together
    num_train = int((~prepared.rows.is_val).sum())
    check_batch_share(
        prepared.detector,
        config,
        device="cpu" if config.device == "cpu" else "cuda",  # workers check it where they run
        num_images=num_train,
        num_ranks=max(1, (config.worker_range or (1, 1))[0]),
    )
    log(f"train: {prepared.rows}")
    if prepared.rows.num_in_both:
        log(
            f"train: {prepared.rows.num_in_both:,} images have the same bytes as one with the other"
            " label; check the labels"
        )
    for note in (*prepared.rows.notes, *describe_resizing(prepared)):
        log(f"train: {note}")
    if config.dry_run:
        return {
            "command": "train",
            "out": str(run.path),
            "model": config.model,
            "num_parameters": prepared.detector.num_parameters,
            "train_images": num_train,
            "val_images": int(prepared.rows.is_val.sum()),
            "epochs": config.epochs,
            **describe_plan(prepared),
        }
    with run.lock():
        run.open(prepared.settings, asdict(config))
        if prepared.rows.digests:
            run.write_digests(prepared.rows.digests)
        with Tracking(config.track, run, prepared.settings, log) as tracking:
            for line in describe_start(prepared, run, tracking.resumed):
                log(f"train: {line}")

            def show(row: dict[str, Any]) -> None:
                if message := row.get("message"):
                    log(message)
                else:
                    on_step(row)

            def report_epoch(row: dict[str, Any], epochs: int) -> None:
                tracking.log_epoch(row)
                on_epoch(row, epochs)

            def look_within() -> None:
                if (row := receive(config.run)) is not None:
                    show(row)

            watch = _HistoryWatch(run, tracking.resumed, config.epochs, report_epoch, look_within)
            if config.worker_range == (0, 0):
                use_gpu = choose_gpu_here(config.device)
                num_threads = config.cpus_per_worker or count_local_cpus()
                log(f"train: {describe_workers(config, 1, num_threads, use_gpu)}, without Ray")
                train_rank(
                    prepared,
                    use_gpu=use_gpu,
                    num_threads=num_threads,
                    on_save=watch.look,
                    send=show,
                )
            else:
                from cifake_ray.stages.train.ray_train import train_on_ray

                with watch:
                    train_on_ray(prepared, run, log)
            finished = _summarise(prepared, run, tracking.resumed, started_s)
            if finished.threshold_fpr_01 is None:
                rate = "1%" if finished.threshold_fpr_1 is None else "0.1%"
                log(
                    f"train: no threshold keeps {rate} false positives, since more of the REAL"
                    " validation images have p_fake = 1.0; check their labels"
                )
            finished = replace(finished, untracked=tracking.finish(asdict(finished)))
        run.write_success(asdict(finished))
    return asdict(finished)


def _find_finished(
    config: TrainConfig, run: TrainRun, log: Callable[[str], None]
) -> dict[str, Any] | None:
    """Return the summary of a finished run without reading its rows; None when it is not finished.

    Log to its trackers what they lack. RunMismatch when it has other settings.
    """
    if (summary := run.read_success()) is None:
        return None
    settings, unread = describe_options(config), ["rows"]
    begun = read_record(run.path).get("config", {})
    if config.teacher == begun.get("teacher"):
        unread.append("teacher")
    else:  # another path may lead to the same bundle
        settings["teacher"] = identify_teachers(load_teachers(config))
    if config.weights == begun.get("weights"):
        unread.append("weights")
    elif config.weights is not None:  # and to the same weights
        loaded = load_starting_weights(config, build_checked(config))
        settings["weights"] = loaded and loaded.digest
    settings = run.check_options(settings, unread)
    log("train: had finished before, so nothing is trained; give a new RUN to train again")
    if not config.track:
        return summary
    with Tracking(config.track, run, settings, log) as tracking:
        return {**summary, "untracked": tracking.finish(summary)}


def finish_training(config: TrainConfig, use_gpu: bool) -> None:
    """Write the bundle of a run that was stopped between two epochs, from its checkpoint."""
    train_rank(
        prepare_training(replace(config, num_workers="0")),
        use_gpu=use_gpu,
        num_threads=config.cpus_per_worker or count_local_cpus(),
        is_over=True,
    )


def _summarise(prepared: Prepared, run: TrainRun, resumed: int, started_s: float) -> TrainSummary:
    config = prepared.config
    history = run.read_history()
    bundle = read_bundle_info(run.bundle_path)
    training = bundle.training
    train_s = sum(row["train_s"] for row in history)
    images = sum(row["images_per_s"] * row["train_s"] for row in history)
    return TrainSummary(
        command="train",
        out=str(run.path),
        bundle=str(run.bundle_path),
        model=config.model,
        num_parameters=prepared.detector.num_parameters,
        train_images=training["train_images"],
        val_images=training["val_images"],
        unusable=training["unusable"],
        epochs=len(history),
        epochs_resumed=resumed,
        stopped=explain_end(history, config),
        steps=history[-1]["step"],
        best_epoch=training["best_epoch"],
        averaged_epochs=training["averaged_epochs"],
        val_accuracy=round(training["val_accuracy"], 6),
        train_s=round(train_s, 1),
        images_per_s=round(images / train_s, 1),
        elapsed_s=round(time.monotonic() - started_s, 1),
        weights=str(prepared.weights) if prepared.weights else None,
        images_in_both_classes=prepared.rows.num_in_both,
        precision=training["precision"],
        threshold=bundle.calibration.threshold,
        threshold_fpr_1=bundle.calibration.threshold_fpr_1,
        threshold_fpr_01=bundle.calibration.threshold_fpr_01,
    )


class _HistoryWatch:
    """Polls the history in a thread, and calls `on_epoch` for each epoch that a worker finished."""

    def __init__(
        self,
        run: TrainRun,
        seen: int,
        epochs: int,
        on_epoch: Callable[[dict[str, Any], int], None],
        look_within: Callable[[], None] = lambda: None,  # an epoch
    ) -> None:
        self.run, self.seen, self.epochs, self.on_epoch = run, seen, epochs, on_epoch
        self.look_within = look_within
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._poll, daemon=True)

    def look(self) -> None:
        for row in self.run.read_history()[self.seen :]:
            self.seen = row["epoch"]
            self.on_epoch(row, self.epochs)

    def _poll(self) -> None:
        while not self.ended.wait(POLL_S):
            self.look_within()
            with suppress(CifakeError):  # a short failure of the store: the next look reports it
                self.look()

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self.ended.set()
        self.thread.join()
        with suppress(CifakeError) if kind else nullcontext():
            self.look_within()
            self.look()
