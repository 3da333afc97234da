"""train_loader.py SOURCE OUT EPOCHS: the bare loop, fed by Pillow in a torch DataLoader.

SOURCE is the `train` folder of the files. The rate is that of the last epoch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shared import NUM_CORES, list_files, print_result
from torch.utils.data import DataLoader, Dataset
from train_bare import fit

from cifake_ray.stages.malloc import keep_freed_memory


class Pictures(Dataset[tuple[Any, int]]):
    """A map-style dataset, as torchvision's ImageFolder is one."""

    def __init__(self, files: list[str]) -> None:
        from cifake_ray.core.schema import LABEL_NAMES

        self.files = files
        self.labels = [LABEL_NAMES.index(Path(path).parent.name) for path in files]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        import numpy as np
        from PIL import Image

        with Image.open(self.files[index]) as image:
            return np.array(image.convert("RGB")), self.labels[index]


def train(dataset: Any, config: Any, collate: Callable[[Any], Any] | None = None) -> None:
    """Train on the items of a dataset: pixels and a label, or what `collate` makes such pairs."""
    import torch

    from cifake_ray.core.training.optimizer import build_for_training

    keep_freed_memory()  # as our workers do, so that the ratio is about everything else
    torch.manual_seed(0)
    detector = build_for_training(config)
    loader = DataLoader(
        dataset,
        batch_size=config.batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=collate,
        num_workers=NUM_CORES,
        persistent_workers=True,
    )
    print_result([fit(config, detector, detector, len(loader), lambda epoch: loader)])


def main() -> None:
    from cifake_ray.config import TrainConfig

    source, out, epochs = sys.argv[1:]
    train(Pictures(list_files(source)), TrainConfig(shards=source, run=out, epochs=int(epochs)))


if __name__ == "__main__":
    main()
