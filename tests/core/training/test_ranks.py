"""One, two and three ranks: the same loss at every step.

    python tests/core/training/test_ranks.py CIFAKE_FOLDER [OPTION=VALUE ...]

shows how far they are apart on real images, and beside it how far one rank is from itself when the
images of each batch come in another order: that is what rounding alone does.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import yaml
from test_trainer import ArrayImages
from torch import nn

from cifake_ray.config import TrainConfig
from cifake_ray.core.models.detector import build_detector
from cifake_ray.core.training.batches import Batch
from cifake_ray.core.training.device_limits import choose_precision
from cifake_ray.core.training.trainer import Trainer

NUM_STEPS = 50
NUM_IMAGES = 8_000


class FolderImages(ArrayImages):
    """The first images of both classes of CIFAKE's train split."""

    def __init__(self, folder: Path) -> None:
        from PIL import Image

        names = [sorted((folder / "train" / label).iterdir()) for label in ("REAL", "FAKE")]
        files = [path for pair in zip(*names, strict=True) for path in pair][:NUM_IMAGES]
        self.labels = np.arange(len(files), dtype=np.int64) % 2
        self.pixels = np.stack([np.asarray(Image.open(path)) for path in files])
        self.reads = []


class Enough(Exception):
    """All steps are taken."""


class Recorder(Trainer):
    """Keeps the mean loss of every global batch."""

    is_reversed = False

    def _find_gradient(self, batch: Batch) -> torch.Tensor:
        if self.is_reversed:
            batch = Batch(batch.images.flip(0), batch.labels.flip(0), batch.size)
        total = super()._find_gradient(batch)
        self.losses.append(self._add_up(total) / batch.size)
        if len(self.losses) == NUM_STEPS:
            raise Enough
        return total


def run_rank(rank: int, name: str, num_ranks: int, folder: str, source: str, options: Any) -> None:
    torch.set_num_threads(1)
    if sys.platform == "linux":  # where the host's own name need not resolve
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet-{name}", rank=rank, world_size=num_ranks
    )
    train = FolderImages(Path(source)) if source else ArrayImages(400, size=32)
    config = TrainConfig(shards="s", run="r", **options)
    torch.manual_seed(0)
    detector = build_detector("cnn")
    wrapped = nn.parallel.DistributedDataParallel(detector)
    val = ArrayImages(10, seed=1, size=32)
    teachers = [build_detector("cnn") for _ in config.teachers]
    trainer = Recorder(
        *(detector, wrapped, config, train, val, choose_precision("cpu", "float32")),
        teachers=teachers,
    )
    trainer.losses = []  # type: ignore[attr-defined]
    trainer.is_reversed = name == "reversed"
    with pytest.raises(Enough):
        trainer.fit(lambda: None)
    if rank == 0:
        np.save(f"{folder}/{name}.npy", trainer.losses)  # type: ignore[attr-defined]
    dist.barrier()  # none leaves while another may still exchange with it
    dist.destroy_process_group()


def record_losses(source: str, **options: Any) -> Iterator[tuple[str, np.ndarray]]:
    """float[NUM_STEPS] for one, two and three ranks, and for one with its batches reversed.

    Ranks are forked from a process that has only imported torch, its slow parts too, once for all.
    """
    torch.multiprocessing.set_forkserver_preload([__name__, "torch._dynamo"])
    with tempfile.TemporaryDirectory() as folder:
        for name, num_ranks in (("one", 1), ("two", 2), ("three", 3), ("reversed", 1)):
            arguments = (name, num_ranks, folder, source, options)
            torch.multiprocessing.start_processes(
                run_rank, arguments, nprocs=num_ranks, start_method="forkserver"
            )
            yield name, np.load(f"{folder}/{name}.npy")


@pytest.mark.parametrize("teacher", [None, "random"])
def test_the_loss_curve_does_not_depend_on_the_number_of_ranks(teacher: str | None) -> None:
    """A batch of 50 is dealt as 17, 17 and 16. SGD, because Adam blows rounding up: see above."""
    options = {"optimizer": "sgd", "lr": 0.05, "batch_size": 50, "epochs": 7}
    distill = None if teacher is None else 0.3
    curves = dict(record_losses("", **options, teacher=teacher, distill=distill))
    assert len(curves["one"]) == NUM_STEPS
    assert curves["one"][-1] < 0.9 * curves["one"][0]
    for name in ("two", "three", "reversed"):
        assert np.abs(curves[name] - curves["one"]).max() < 1e-4


if __name__ == "__main__":
    words = dict(word.split("=") for word in sys.argv[2:])
    options = {name: yaml.safe_load(value) for name, value in words.items()}
    curves = dict(record_losses(sys.argv[1], **options))
    for name in ("two", "three", "reversed"):
        apart = np.abs(curves[name] - curves["one"])
        steps = ", ".join(f"step {n}: {apart[:n].max():.1e}" for n in (10, 20, 30, 40, 50))
        print(f"one against {name}: {steps}")
    print(f"loss {curves['one'][0]:.3f} -> {curves['one'][-1]:.3f}")
