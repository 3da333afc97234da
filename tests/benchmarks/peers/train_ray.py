"""train_ray.py SHARDS OUT EPOCHS: the bare loop, fed by Ray Data: iter_torch_batches.

The images are shuffled among those of eight batches. The rate is that of the last epoch.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from typing import Any

from shared import NUM_CORES, list_shards, print_result
from train_bare import fit

from cifake_ray.stages.malloc import keep_freed_memory


def decode(row: dict[str, Any]) -> dict[str, Any]:
    import numpy as np
    from PIL import Image

    image = Image.open(io.BytesIO(row["image"]["bytes"]))
    return {"pixels": np.array(image.convert("RGB")), "label": row["label"]}


def main() -> None:
    import pyarrow.dataset as pd
    import ray
    import torch
    from ray.data.expressions import col

    from cifake_ray.config import TrainConfig
    from cifake_ray.core.training.optimizer import build_for_training

    shards, out, epochs = sys.argv[1:]
    config = TrainConfig(shards=shards, run=out, epochs=int(epochs))
    ray.init(address="local", num_cpus=NUM_CORES, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    keep_freed_memory()  # as our workers do, so that the ratio is about everything else
    torch.manual_seed(0)
    detector = build_for_training(config)
    is_train = pd.field("split") == "train"
    num_images = pd.dataset(list_shards(shards)).count_rows(filter=is_train)
    dataset = ray.data.read_parquet(list_shards(shards), columns=["image", "label", "split"])
    dataset = dataset.filter(expr=col("split") == "train").map(decode)

    def draw_epoch(epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch in dataset.iter_torch_batches(
            batch_size=config.batch_size,
            drop_last=True,
            local_shuffle_buffer_size=8 * config.batch_size,
            local_shuffle_seed=epoch,
        ):
            yield batch["pixels"], batch["label"]

    print_result([fit(config, detector, detector, num_images // config.batch_size, draw_epoch)])
    ray.shutdown()


if __name__ == "__main__":
    main()
