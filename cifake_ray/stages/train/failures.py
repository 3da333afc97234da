"""Decide which failures of Ray Train's workers another attempt may mend, and return the others."""

from __future__ import annotations

from typing import Any

import ray.train

from cifake_ray.errors import CacheError, CifakeError, StorageError


class EndAtOnce(ray.train.UserCallback):
    """Ends a training, instead of starting it again, for what every attempt would meet."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for failure in map(_unwrap, worker_exceptions.values()):
            may_pass = isinstance(failure, StorageError) and not isinstance(failure, CacheError)
            if isinstance(failure, CifakeError) and not may_pass:
                raise failure  # Ray Train repeats no attempt that a callback ended


def find_failure(error: ray.train.TrainingFailedError) -> CifakeError | None:
    """Return the first error for the user among those that ended a training."""
    if isinstance(error, ray.train.WorkerGroupError):
        failures: list[object] = [_unwrap(failure) for failure in error.worker_failures.values()]
    else:
        failures = [getattr(error, "controller_failure", None)]
    return next((failure for failure in failures if isinstance(failure, CifakeError)), None)


def _unwrap(failure: Exception) -> BaseException:
    """Return what a worker raised; Ray Train wraps it to keep the text of its traceback."""
    return getattr(failure, "_base_exc", failure)
