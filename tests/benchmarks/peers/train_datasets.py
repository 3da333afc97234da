"""train_datasets.py SHARDS OUT EPOCHS: the bare loop, fed by Hugging Face's `datasets`.

A data set made by load_dataset, in a torch DataLoader. The rate is that of the last epoch.
"""

from __future__ import annotations

import sys
from typing import Any

from shared import list_shards
from torch.utils.data import default_collate
from train_loader import train


def main() -> None:
    import numpy as np
    from datasets import Image, disable_progress_bars, load_dataset

    from cifake_ray.config import TrainConfig

    shards, out, epochs = sys.argv[1:]
    disable_progress_bars()
    kept = load_dataset(
        "parquet",
        data_files=list_shards(shards),
        columns=["image", "label", "split"],
        filters=[("split", "==", "train")],
        split="train",
        cache_dir=f"{out}/cache",
    ).cast_column("image", Image())

    def decode(batch: dict[str, Any]) -> dict[str, Any]:
        pixels = [np.array(image.convert("RGB")) for image in batch["image"]]
        return {"pixels": pixels, "label": batch["label"]}

    def collate(items: list[dict[str, Any]]) -> Any:
        return default_collate([(item["pixels"], item["label"]) for item in items])

    config = TrainConfig(shards=shards, run=out, epochs=int(epochs))
    train(kept.with_transform(decode), config, collate)


if __name__ == "__main__":
    main()
