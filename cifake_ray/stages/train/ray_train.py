"""Run the workers of a training with Ray Train, which restarts those that are lost."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray.train
from ray.train.torch import TorchTrainer

from cifake_ray.errors import CifakeError
from cifake_ray.stages.cluster import connect_cluster
from cifake_ray.stages.resources import Placement, find_cause
from cifake_ray.stages.train.placement import describe_workers, place_training
from cifake_ray.stages.train.prepare import Prepared
from cifake_ray.stages.train.rank_group import (
    EndAtOnce,
    RankGroup,
    RankTask,
    start_rank,
    unwrap_failure,
)
from cifake_ray.storage.io.paths import to_arrow
from cifake_ray.storage.runs.train_run import TrainRun


def train_on_ray(prepared: Prepared, run: TrainRun, log: Callable[[str], None]) -> None:
    """Train in workers of Ray Train. CifakeError when it fails."""
    config = prepared.config
    filesystem, storage_path = to_arrow(run.path)
    # Ray Train takes one report per worker and check: every 2 s by default, for which an epoch of a
    # small run would wait.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    threads = ThreadPoolExecutor(1)  # in the main thread, Ray Train would handle Ctrl-C
    least, most = config.worker_range or (None, None)
    room = Placement(least or 1, config.cpus_per_worker or 1, int(config.device == "cuda"))
    with connect_cluster(config, room, log) as resources:
        placement = place_training(config, resources)
        # In a range, Ray Train restarts with another number of workers as nodes come or go.
        workers: Any = placement.num_workers if least == most else (placement.num_workers, most)
        use_gpu = placement.gpus_per_worker > 0
        at_most = "" if least == most else f", up to {most}"
        num_workers, num_threads = placement.num_workers, placement.cpus_per_worker
        log(f"train: {describe_workers(config, num_workers, num_threads, use_gpu)}{at_most}")
        log("train: starting workers ...")
        task = RankTask(
            config=config,
            rows_hash=prepared.rows_hash,
            teacher=prepared.settings["teacher"],
            use_gpu=use_gpu,
            num_threads=placement.cpus_per_worker,
        )
        trainer = TorchTrainer(
            start_rank,
            train_loop_config={"task": task},
            torch_config=RankGroup(),  # type: ignore[arg-type]
            scaling_config=ray.train.ScalingConfig(
                num_workers=workers,
                use_gpu=task.use_gpu,
                resources_per_worker={
                    "CPU": placement.cpus_per_worker,
                    **({"GPU": placement.gpus_per_worker} if task.use_gpu else {}),
                },
            ),
            run_config=ray.train.RunConfig(
                name="ray",
                storage_path=storage_path,
                storage_filesystem=filesystem,
                # Announced node removals are not counted: Ray Train allows any number.
                failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
                callbacks=[EndAtOnce()],  # type: ignore[list-item]
            ),
        )
        try:
            threads.submit(trainer.fit).result()
        except ray.train.TrainingFailedError as error:
            if (failure := _find_failure(error)) is not None:
                raise failure from error
            raise CifakeError(
                f"training failed: {find_cause(error)}; run the same command again to resume from"
                " the last epoch, with --debug for the whole traceback"
            ) from error
        finally:
            threads.shutdown(wait=False)


def _find_failure(error: ray.train.TrainingFailedError) -> CifakeError | None:
    """Return the first error for the user among those that ended a training."""
    if isinstance(error, ray.train.WorkerGroupError):
        failures: list[object] = [
            unwrap_failure(failure) for failure in error.worker_failures.values()
        ]
    else:
        failures = [getattr(error, "controller_failure", None)]
    return next((failure for failure in failures if isinstance(failure, CifakeError)), None)
