"""Training: plain PyTorch over batches that somebody else draws.

Floor: core. Ray Train's workers, `--num-workers 0` and unit tests all run this loop. What is
distributed about it goes through `torch.distributed`, and only if that has been initialised: then
each rank sees its share of every global batch, and gradients, losses and logits are those of the
whole batch whatever the number of ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from sklearn.metrics import roc_auc_score
from torch import nn

from cifake_ray.config import TrainConfig
from cifake_ray.core.augmentation import POLICIES, Augmentation, Draws, augment, draw_augmentation
from cifake_ray.core.mixing import draw_mix, mix_images, mix_labels
from cifake_ray.core.models import Detector, find_head, to_logit
from cifake_ray.core.recipe import make_optimizer, make_schedule
from cifake_ray.core.schema import FAKE
from cifake_ray.core.stopping import Patience, to_score
from cifake_ray.errors import CifakeError

EVAL_BATCH_SIZE = 512


class Images(Protocol):
    """Decoded, labelled images by number."""

    labels: np.ndarray  # int64[N], REAL or FAKE

    def order_epoch(self, rng: np.random.Generator) -> np.ndarray:
        """int64[N]: a fresh permutation, in which reading is cheap."""
        ...

    def read(self, indices: np.ndarray) -> np.ndarray:
        """uint8[len(indices), S, S, 3]."""
        ...


@dataclass
class TrainState:
    """Where training stands; a checkpoint is this and the weights."""

    epoch: int = 0  # epochs finished
    step: int = 0  # optimiser steps taken
    history: list[dict[str, Any]] = field(default_factory=list)
    patience: Patience = field(default_factory=Patience)
    best_weights: dict[str, torch.Tensor] = field(default_factory=dict)
    best_logit: torch.Tensor = field(default_factory=lambda: torch.zeros(0))


@dataclass(frozen=True)
class Numerics:
    """In what precision, and where, the loop computes."""

    device: str
    dtype: torch.dtype  # float32 means no autocast

    @property
    def autocast(self) -> AbstractContextManager[Any]:
        if self.dtype is torch.float32:
            return nullcontext()
        return torch.autocast(self.device, self.dtype)


def choose_numerics(device: str, precision: str) -> Numerics:
    """`auto` is float32 on CPU, on GPU bf16 where the device computes it, else fp16."""
    if precision == "auto":
        if device == "cpu":
            precision = "float32"
        else:
            precision = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    dtypes = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if device == "cpu" and precision == "fp16":
        raise ValueError("--precision fp16 needs a GPU; use float32 or bf16")
    return Numerics(device, dtypes[precision])


def count_steps(num_images: int, batch_size: int) -> int:
    """Optimiser steps in an epoch: whole batches only, unless there is not one."""
    return max(1, num_images // batch_size)


def _make_ema(detector: Detector, decay: float) -> Any:
    """timm's moving average: its decay rises to `decay` as the steps go on, so short runs gain."""
    from timm.utils.model_ema import ModelEmaV3

    return ModelEmaV3(detector, decay=decay, use_warmup=True)


class Trainer:
    """One rank's share of a training run."""

    def __init__(
        self,
        detector: Detector,
        wrapped: nn.Module,
        config: TrainConfig,
        train: Images,
        val: Images,
        numerics: Numerics,
        augmentation: Augmentation = POLICIES["flip"],
    ) -> None:
        """`wrapped` is the detector itself, or the detector in DistributedDataParallel."""
        is_distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if is_distributed else 0
        self.num_ranks = dist.get_world_size() if is_distributed else 1
        self.detector, self.wrapped, self.config = detector, wrapped, config
        self.train_images, self.val_images, self.numerics = train, val, numerics
        self.augmentation = augmentation
        self.batch_size = min(config.batch_size, len(train.labels))
        self.steps_per_epoch = count_steps(len(train.labels), self.batch_size)
        self.optimizer = make_optimizer(detector.network, config)
        self.schedule = make_schedule(self.optimizer, config, self.steps_per_epoch * config.epochs)
        self.scaler = torch.amp.GradScaler(numerics.device, enabled=numerics.dtype is torch.float16)
        self.ema = None if config.ema_decay is None else _make_ema(detector, config.ema_decay)
        # Whose weights are validated and kept.
        self.judged: Detector = detector if self.ema is None else self.ema.module
        self.state = TrainState()

    def fit(self, save: Callable[[], None]) -> None:
        """Train the epochs that are left; `save` is called after each, on every rank.

        Ends before the last epoch when `--patience` is over. CifakeError when the loss is no
        longer finite.
        """
        while self.state.epoch < self.config.epochs and not self.state.patience.is_over(
            self.config.patience
        ):
            started_s = time.perf_counter()
            train_loss = self._train_epoch()
            trained_s = time.perf_counter()
            logit = self.predict(self.val_images)
            row = self._measure(logit, train_loss)
            train_s = trained_s - started_s
            row["train_s"] = round(train_s, 3)
            row["val_s"] = round(time.perf_counter() - trained_s, 3)
            row["images_per_s"] = round(self.steps_per_epoch * self.batch_size / train_s, 1)
            self.state.epoch += 1
            self.state.history.append(row)
            score = self._agree(to_score(row, self.config.monitor))
            if self.state.patience.watch(score, self.config.min_delta):
                self.state.best_logit = logit
                self.state.best_weights = {
                    name: t.detach().cpu().clone()
                    for name, t in self.judged.network.state_dict().items()
                }
            save()

    def _train_epoch(self) -> float:
        """One pass over the training images: the mean loss over all ranks."""
        is_frozen = self.state.epoch < self.config.freeze_epochs
        self.wrapped.train()
        if is_frozen:  # norms and drop-outs of the body stand still too
            self.detector.network.eval()
            find_head(self.detector.network).train()
        total = torch.zeros((), dtype=torch.float64, device=self.numerics.device)
        for images, labels, batch_size in self._draw_batches():
            total += self._find_gradient(images, labels, batch_size)
            if is_frozen:  # not requires_grad: DDP waits for every gradient it was born with
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
        if self.num_ranks > 1:
            dist.all_reduce(total)
        mean = float(total) / (self.steps_per_epoch * self.batch_size)
        if not np.isfinite(mean):
            raise CifakeError(
                f"the training loss became {mean} in epoch {self.state.epoch + 1}; lower --lr"
            )
        return mean

    def _find_gradient(
        self, images: torch.Tensor, labels: torch.Tensor, batch_size: int
    ) -> torch.Tensor:
        """The gradient of a global batch, in pieces; gives the sum of this rank's losses."""
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), dtype=torch.float64, device=self.numerics.device)
        num_pieces = max(1, min(self.config.grad_accum, batch_size // self.num_ranks))
        pieces = zip(images.tensor_split(num_pieces), labels.tensor_split(num_pieces), strict=True)
        for number, (piece, piece_labels) in enumerate(pieces, start=1):
            with self._synchronised(number == num_pieces):
                with self.numerics.autocast:
                    outputs = self.wrapped(piece)
                losses = nn.functional.cross_entropy(
                    outputs,
                    piece_labels,
                    reduction="sum",
                    label_smoothing=self.config.label_smoothing,
                )
                # DDP divides the sum of the ranks' gradients by their number; this makes it the
                # gradient of the mean over the whole batch, however it was dealt.
                loss = losses * (self.num_ranks / batch_size)
                self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total += losses.detach()
        return total

    def _synchronised(self, is_last: bool) -> AbstractContextManager[Any]:
        """Ranks exchange gradients with the last piece only."""
        if is_last or not isinstance(self.wrapped, nn.parallel.DistributedDataParallel):
            return nullcontext()
        held: AbstractContextManager[Any] = self.wrapped.no_sync()
        return held

    def _drop_gradients_of_the_body(self) -> None:
        head = {id(p) for p in find_head(self.detector.network).parameters()}
        for parameter in self.detector.parameters():
            if id(parameter) not in head:
                parameter.grad = None

    def _draw_batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
        """This rank's share of each global batch: images, labels, size of the global batch."""
        rng = np.random.default_rng((self.config.seed, self.state.epoch))
        order = self.train_images.order_epoch(rng)
        mirrored = rng.random(len(order)) < self.augmentation.flip
        for step in range(self.steps_per_epoch):
            batch = slice(step * self.batch_size, (step + 1) * self.batch_size)
            # Not (seed, epoch, step): numpy seeds (s, e, 0) as it does (s, e).
            step_rng = np.random.default_rng((self.config.seed, self.state.epoch, step + 1))
            draws = draw_augmentation(step_rng, mirrored[batch])
            places = np.arange(self.rank, self.batch_size, self.num_ranks)
            images, labels = self._read(order[batch], draws, places)
            mix = draw_mix(step_rng, self.config, images.shape[1])
            if mix is not None:  # partners are read too: they may be another rank's
                others = self._read(order[batch], draws, self.batch_size - 1 - places)
                images = mix_images(images, others[0], mix)
                labels = mix_labels(labels, others[1], mix)
            yield images, labels, self.batch_size

    def _read(
        self, batch: np.ndarray, draws: Draws, places: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Augmented images and labels at some places of a global batch."""
        indices = batch[places]
        images = self._to_device(torch.from_numpy(self.train_images.read(indices)))
        labels = self._to_device(torch.from_numpy(self.train_images.labels[indices]))
        return augment(images, self.augmentation, draws.take(places)), labels

    def _agree(self, value: float) -> float:
        """Rank 0's value: another processor may round the last digit of its own differently."""
        if self.num_ranks == 1:
            return value
        shared = torch.tensor(value, dtype=torch.float64, device=self.numerics.device)
        dist.broadcast(shared, 0)
        return float(shared)

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.numerics.device == "cpu":
            return tensor
        return tensor.pin_memory().to(self.numerics.device, non_blocking=True)

    @torch.inference_mode()
    def predict(self, images: Images) -> torch.Tensor:
        """float32[N] on the CPU, the same on every rank: each computes its share, once."""
        self.judged.eval()
        if self.num_ranks > 1:  # batch-norm statistics are each rank's own until its next step
            for buffer in self.judged.network.buffers():
                dist.broadcast(buffer, 0)
        logit = torch.zeros(len(images.labels), device=self.numerics.device)
        for start in range(0, len(logit), EVAL_BATCH_SIZE * self.num_ranks):
            stop = min(start + EVAL_BATCH_SIZE * self.num_ranks, len(logit))
            indices = np.arange(start + self.rank, stop, self.num_ranks)
            if len(indices):
                batch = self._to_device(torch.from_numpy(images.read(indices)))
                with self.numerics.autocast:
                    outputs = self.judged(batch)
                logit[start + self.rank : stop : self.num_ranks] = to_logit(outputs)
        if self.num_ranks > 1:
            dist.all_reduce(logit)  # every image is non-zero on one rank only
        return logit.cpu()

    def _measure(self, logit: torch.Tensor, train_loss: float) -> dict[str, Any]:
        """A row of the history. CifakeError when there is nothing to measure."""
        if not logit.isfinite().all():
            raise CifakeError(
                f"validation outputs became infinite in epoch {self.state.epoch + 1}; lower --lr"
            )
        is_fake = torch.from_numpy(self.val_images.labels == FAKE)
        loss = nn.functional.binary_cross_entropy_with_logits(logit, is_fake.float())
        return {
            "epoch": self.state.epoch + 1,
            "step": self.state.step,
            "train_loss": round(train_loss, 6),
            "val_loss": round(float(loss), 6),
            "val_accuracy": round(float(((logit >= 0) == is_fake).double().mean()), 6),
            "val_auroc": round(float(roc_auc_score(is_fake, logit)), 6),
            "lr": max(self.schedule.get_last_lr()),
        }

    def to_checkpoint(self) -> dict[str, Any]:
        """Everything `resume` needs: tensors and plain values only."""
        return {
            "network": self.detector.network.state_dict(),
            "ema": self.ema.module.network.state_dict() if self.ema is not None else {},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "state": {**self.state.__dict__, "patience": asdict(self.state.patience)},
            "rng": torch.get_rng_state(),
        }

    def resume(self, checkpoint: dict[str, Any]) -> None:
        """Go on where `to_checkpoint` was called."""
        self.detector.network.load_state_dict(checkpoint["network"])
        if self.ema is not None:
            self.ema.module.network.load_state_dict(checkpoint["ema"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.schedule.load_state_dict(checkpoint["schedule"])
        self.scaler.load_state_dict(checkpoint["scaler"])
        state = checkpoint["state"]
        self.state = TrainState(**{**state, "patience": Patience(**state["patience"])})
        torch.set_rng_state(checkpoint["rng"])
