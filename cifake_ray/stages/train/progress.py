"""Progress within an epoch: from rank 0 to the driver, in this process or through Ray.

Nothing is stored: the latest message is a value in Ray's control store, replaced every second.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from cifake_ray.core.training.trainer import Trainer

INTERVAL_S = 1.0
Send = Callable[[dict[str, Any]], None]  # a row of numbers, or {"message": what begins now}


class StepMeter:
    """Measures rank 0's steps, and sends a row of numbers about once a second."""

    def __init__(self, trainer: Trainer, send: Send) -> None:
        self.trainer, self.send = trainer, send
        self.epoch, self.batch, self.total, self.since_s = -1, 0, 0.0, 0.0

    def __call__(self, total: torch.Tensor) -> None:
        state, batches = self.trainer.state, self.trainer.batches
        now_s = time.monotonic()
        if state.batch == batches.steps_per_epoch:
            return self.send({"message": f"train: epoch {state.epoch + 1}, validating ..."})
        if state.epoch != self.epoch:  # the first step, whose time is not known
            self.epoch, self.batch = state.epoch, state.batch
            self.total, self.since_s = float(total), now_s
        elif now_s - self.since_s >= INTERVAL_S:
            steps, epochs = state.batch - self.batch, self.trainer.config.epochs
            steps_left = (epochs - state.epoch) * batches.steps_per_epoch - state.batch
            step_s = (now_s - self.since_s) / steps
            loss_sum = float(total) - self.total  # since the last row, of this rank's images
            row = {
                "epoch": state.epoch + 1,
                "epochs": epochs,
                "batch": state.batch,
                "batches": batches.steps_per_epoch,
                "loss": loss_sum * self.trainer.num_ranks / (steps * batches.batch_size),
                "images_per_s": batches.batch_size / step_s,
                "eta_s": steps_left * step_s,
            }
            self.batch, self.total, self.since_s = state.batch, float(total), now_s
            self.send(row)


def _make_key(run: str) -> bytes:
    return f"cifake_ray/train/{run}".encode()


def send_to_driver(run: str, row: dict[str, Any]) -> None:
    """Leave a message for the driver of the training in folder `run`."""
    import ray
    from ray.experimental.internal_kv import _internal_kv_put

    with suppress(ray.exceptions.RayError):  # training does not depend on it
        _internal_kv_put(_make_key(run), json.dumps(row).encode(), overwrite=True)


def receive(run: str) -> dict[str, Any] | None:
    """Return the latest message, once; None when there is none, or Ray is not connected."""
    import ray
    from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get

    if not ray.is_initialized():
        return None
    with suppress(ray.exceptions.RayError):
        if (data := _internal_kv_get(_make_key(run))) is not None:
            _internal_kv_del(_make_key(run))
            row: dict[str, Any] = json.loads(data)
            return row
    return None
