"""Train a detector: the loop in plain PyTorch.

Ray Train's workers, `--num-workers 0` and unit tests all run it. If `torch.distributed` has been
initialised, each rank sees its share of every global batch, and gradients, losses and logits are
those of the whole batch whatever the number of ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from cifake_ray.config import POLICIES, Augmentation, TrainConfig
from cifake_ray.core.evaluation.metrics import find_tpr
from cifake_ray.core.models.detector import Detector, find_head
from cifake_ray.core.schema import FAKE
from cifake_ray.core.training.batches import Batch, Batches, Images
from cifake_ray.core.training.device_limits import DevicePrecision, choose_eval_batch_size
from cifake_ray.core.training.early_stopping import (
    KeptEpoch,
    Patience,
    average_weights,
    keep_best,
    to_score,
)
from cifake_ray.core.training.losses import sum_losses
from cifake_ray.core.training.optimizer import load_optimizer, make_optimizer, make_schedule
from cifake_ray.core.training.validation import predict_shared
from cifake_ray.errors import CifakeError, UsageError


@dataclass
class TrainState:
    """The progress of training; a checkpoint is this and the weights."""

    epoch: int = 0  # epochs finished
    step: int = 0  # optimiser steps taken
    history: list[dict[str, Any]] = field(default_factory=list)
    patience: Patience = field(default_factory=Patience)
    kept: list[KeptEpoch] = field(default_factory=list)  # best first
    # Of the epoch in progress, when it was saved:
    batch: int = 0  # optimiser steps taken
    loss_sum: float = 0.0  # over the images of all ranks
    train_s: float = 0.0


class Trainer:
    """One rank's share of a training run."""

    def __init__(
        self,
        detector: Detector,
        wrapped: nn.Module,
        config: TrainConfig,
        train: Images,
        val: Images,
        precision: DevicePrecision,
        augmentation: Augmentation = POLICIES["flip"],
        teachers: Sequence[Detector] = (),
    ) -> None:
        """`wrapped` is the detector itself, or the detector in DistributedDataParallel.

        `teachers` are those of `--teacher`; they are moved to the device and not trained.
        """
        is_distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if is_distributed else 0
        self.num_ranks = dist.get_world_size() if is_distributed else 1
        self.detector, self.wrapped, self.config = detector, wrapped, config
        self.val_images, self.precision = val, precision
        self.teachers = [teacher.to(precision.device).eval() for teacher in teachers]
        self.batches = Batches(
            train, config, augmentation, precision.device, self.rank, self.num_ranks
        )
        self.optimizer = make_optimizer(detector.network, config)
        self.schedule = make_schedule(
            self.optimizer, config, self.batches.steps_per_epoch * config.epochs
        )
        self.scaler = torch.amp.GradScaler(
            precision.device, enabled=precision.dtype is torch.float16
        )
        self.ema: Any = None
        if config.ema_decay is not None:
            from timm.utils import ModelEmaV3  # type: ignore[attr-defined]

            # Its decay rises to `ema_decay` with the steps, so that short runs gain too.
            self.ema = ModelEmaV3(detector, decay=config.ema_decay, use_warmup=True)
        # The weights that are validated and kept.
        self.eval_model: Detector = detector if self.ema is None else self.ema.module
        per_pass = choose_eval_batch_size(
            detector.network, detector.preprocessing.image_size, precision.device
        )
        self.eval_batch_size = max(1, per_pass // (detector.preprocessing.num_crops or 1))
        self.state = TrainState()
        self.on_step: Callable[[torch.Tensor], None] = lambda total: None  # see `_train_epoch`

    def fit(self, save: Callable[[], None]) -> None:
        """Train the epochs that are left.

        `save` is called on every rank after each epoch, and after every `--checkpoint-steps` within
        one. Ends early when `--patience` is over. CifakeError when the loss is not finite.
        """
        state = self.state
        while state.epoch < self.config.epochs and not state.patience.is_over(self.config.patience):
            train_loss = self._train_epoch(save)
            validation_started_s = time.perf_counter()
            logit = self.predict(self.val_images)
            row = self._measure(logit, train_loss)
            row["workers"] = self.num_ranks
            row["train_s"] = round(state.train_s, 3)
            row["val_s"] = round(time.perf_counter() - validation_started_s, 3)
            num_images = self.batches.steps_per_epoch * self.batches.batch_size
            row["images_per_s"] = round(num_images / state.train_s, 1)
            state.epoch += 1
            state.batch, state.loss_sum, state.train_s = 0, 0.0, 0.0
            state.history.append(row)
            score = self._agree(to_score(row, self.config.monitor))
            state.patience.watch(score, self.config.min_delta)
            network, num_kept = self.eval_model.network, self.config.keep_epochs
            state.kept = keep_best(state.kept, score, state.epoch, logit, network, num_kept)
            save()

    def _train_epoch(self, save: Callable[[], None]) -> float:
        """Finish a pass over the training images; return the mean loss of all of it."""
        state = self.state
        self.wrapped.train()
        if self.is_frozen:  # norms and dropouts of the body are frozen too
            self.detector.network.eval()
            find_head(self.detector.network).train()
        started_s = time.perf_counter() - state.train_s
        total = torch.zeros((), dtype=torch.float64, device=self.precision.device)
        if self.rank == 0:
            total += state.loss_sum
        for batch in self.batches.draw(state.epoch, state.batch):
            total += self.train_step(batch)
            state.batch += 1
            self.on_step(total)  # the sum of this rank's losses in this epoch
            is_last = state.batch == self.batches.steps_per_epoch
            if is_last or self._is_time_to_save():
                state.loss_sum = self._add_up(total)
                state.train_s = time.perf_counter() - started_s
                if not is_last:
                    save()
        mean = state.loss_sum / (self.batches.steps_per_epoch * self.batches.batch_size)
        if not np.isfinite(mean):
            raise CifakeError(
                f"the training loss became {mean} in epoch {state.epoch + 1}; lower --lr"
            )
        return mean

    @property
    def is_frozen(self) -> bool:
        """Whether only the head is trained in this epoch."""
        return self.state.epoch < self.config.freeze_epochs

    def train_step(self, batch: Batch) -> torch.Tensor:
        """Take an optimiser step on a global batch; return the sum of this rank's losses."""
        losses = self._find_gradient(batch)
        if self.is_frozen:  # not by requires_grad: DDP waits for every gradient it was made with
            self._drop_gradients_of_the_body()
        if self.config.grad_clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.detector.parameters(), self.config.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.state.step += 1
        if self.ema is not None:
            self.ema.update(self.detector, self.state.step)
        return losses

    def _is_time_to_save(self) -> bool:
        steps = self.config.checkpoint_steps
        return steps is not None and self.state.batch % steps == 0

    def _add_up(self, value: torch.Tensor) -> float:
        """Return the sum over all ranks."""
        total = value.clone()
        if self.num_ranks > 1:
            dist.all_reduce(total)
        return float(total)

    def _find_gradient(self, batch: Batch) -> torch.Tensor:
        """Add up the gradient of a global batch in pieces; return the sum of this rank's losses."""
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), dtype=torch.float64, device=self.precision.device)
        num_pieces = max(1, min(self.config.grad_accum, batch.size // self.num_ranks))
        images, labels = (each.tensor_split(num_pieces) for each in (batch.images, batch.labels))
        clean = [None] * num_pieces if batch.clean is None else batch.clean.tensor_split(num_pieces)
        pieces = zip(images, clean, labels, strict=True)
        options = self.config, self.precision, self.teachers
        for number, piece in enumerate(pieces, start=1):
            with self._synchronised(number == num_pieces):
                losses = sum_losses(self.wrapped, self.detector.network, *piece, *options)
                # DDP divides the sum of the ranks' gradients by their number; this makes it the
                # gradient of the mean over the whole batch, however it was dealt.
                loss = losses * (self.num_ranks / batch.size)
                self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total += losses.detach()
        return total

    def _synchronised(self, is_last: bool) -> AbstractContextManager[Any]:
        """Return a context in which ranks exchange gradients with the last piece only."""
        if is_last or not isinstance(self.wrapped, nn.parallel.DistributedDataParallel):
            return nullcontext()
        held: AbstractContextManager[Any] = self.wrapped.no_sync()
        return held

    def _drop_gradients_of_the_body(self) -> None:
        head = {id(p) for p in find_head(self.detector.network).parameters()}
        for parameter in self.detector.parameters():
            if id(parameter) not in head:
                parameter.grad = None

    def _agree(self, value: float) -> float:
        """Return rank 0's value: another processor may round the last digit differently."""
        if self.num_ranks == 1:
            return value
        shared = torch.tensor(value, dtype=torch.float64, device=self.precision.device)
        dist.broadcast(shared, 0)
        return float(shared)

    def predict(self, images: Images) -> torch.Tensor:
        """Return float32[N] on the CPU, of the weights that are validated; called by every rank."""
        device, share = self.precision.device, (self.rank, self.num_ranks)
        return predict_shared(self.eval_model, images, self.eval_batch_size, device, *share)

    def _measure(self, logit: torch.Tensor, train_loss: float) -> dict[str, Any]:
        """Return a row of the history. CifakeError when an output is not finite."""
        if not logit.isfinite().all():
            raise CifakeError(
                f"validation outputs became infinite in epoch {self.state.epoch + 1}; lower --lr"
            )
        from sklearn.metrics import roc_auc_score  # not before the first step: it takes 0.7 s

        labels = self.val_images.labels
        is_fake = torch.from_numpy(labels == FAKE)
        loss = nn.functional.binary_cross_entropy_with_logits(logit, is_fake.float())
        return {
            "epoch": self.state.epoch + 1,
            "step": self.state.step,
            "train_loss": round(train_loss, 6),
            "val_loss": round(float(loss), 6),
            "val_accuracy": round(float(((logit >= 0) == is_fake).double().mean()), 6),
            "val_auroc": round(float(roc_auc_score(labels, logit)), 6),
            "val_tpr_at_fpr_1pct": round(find_tpr(logit.numpy(), labels, 0.01), 6),
            "lr": max(self.schedule.get_last_lr()),
        }

    def choose_best(self) -> tuple[KeptEpoch, list[int]]:
        """Return the best weights, and the epochs they are the mean of; called by every rank.

        With `--keep-epochs` the mean of the kept epochs' weights, if it is better than the best of
        them (Izmailov et al. 2018; timm's avg_checkpoints takes the mean without comparing).
        """
        best, *others = self.state.kept
        if not others:
            return best, [best.epoch]
        mean = average_weights([epoch.weights for epoch in self.state.kept])
        self.eval_model.network.load_state_dict(mean)
        logit = self.predict(self.val_images)
        if not logit.isfinite().all():  # the mean of good weights may be useless
            return best, [best.epoch]
        score = self._agree(to_score(self._measure(logit, 0.0), self.config.monitor))
        if score > best.score:
            epochs = sorted(epoch.epoch for epoch in self.state.kept)
            return KeptEpoch(best.epoch, score, logit, mean), epochs
        return best, [best.epoch]

    def to_checkpoint(self) -> dict[str, Any]:
        """Return all that `resume` needs, as tensors and plain values; every step seeds itself."""
        return {
            "precision": self.precision.name,
            "network": self.detector.network.state_dict(),
            "ema": self.ema.module.network.state_dict() if self.ema is not None else {},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "num_lanes": self.num_lanes,
            "num_images": self.num_images,
            "state": {
                **self.state.__dict__,
                "patience": asdict(self.state.patience),
                "kept": [epoch._asdict() for epoch in self.state.kept],
            },
        }

    @property
    def num_lanes(self) -> int:
        """The lanes in which images are streamed; 0 when all are decoded."""
        return 0 if self.batches.streamed is None else self.batches.streamed.num_lanes

    @property
    def num_images(self) -> list[int]:
        """The images of training and validation; if streamed, with those that do not decode."""
        return [len(self.batches.images.labels), len(self.val_images.labels)]

    def resume(self, checkpoint: dict[str, Any]) -> None:
        """Continue from where `to_checkpoint` was called.

        UsageError for other images, and within an epoch whose order was another.
        """
        is_within = checkpoint["state"]["batch"] > 0
        has_other_order = checkpoint.get("num_lanes", self.num_lanes) != self.num_lanes
        has_other_images = checkpoint.get("num_images", self.num_images) != self.num_images
        if has_other_images or (is_within and has_other_order):
            raise UsageError(
                "with this --cache-gb the rest of the training would have other images than before"
                " the run was stopped; resume with --cache-gb as before"
            )
        self.detector.network.load_state_dict(checkpoint["network"])
        if self.ema is not None:
            self.ema.module.network.load_state_dict(checkpoint["ema"])
        load_optimizer(self.optimizer, self.schedule, checkpoint)
        self.scaler.load_state_dict(checkpoint["scaler"])
        state = dict(checkpoint["state"])
        patience, kept = Patience(**state.pop("patience")), state.pop("kept")
        self.state = TrainState(
            **state, patience=patience, kept=[KeptEpoch(**epoch) for epoch in kept]
        )
