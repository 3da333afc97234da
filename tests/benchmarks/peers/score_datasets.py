"""score_datasets.py SRC OUT BUNDLE: Hugging Face's `datasets`: its Image feature, map, to_parquet.

One process of `map` per core, as its documentation has it for work on the CPU.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from score_bare import Scorer
from shared import (
    BATCH_SIZE,
    NUM_CORES,
    Share,
    count_images,
    list_files,
    list_shards,
    print_result,
)


def open_dataset(source: str, cache: str) -> Any:
    """A dataset of `path` and `image`, of which no image has been decoded."""
    from datasets import Dataset, Image, load_dataset

    if shards := list_shards(source):
        columns = ["key", "image"]
        kept = load_dataset(
            "parquet", data_files=shards, columns=columns, split="train", cache_dir=cache
        )
        return kept.rename_column("key", "path").cast_column("image", Image())
    files = list_files(source)
    return Dataset.from_dict({"path": files, "image": files}).cast_column("image", Image())


def main() -> None:
    import numpy as np
    import torch
    from datasets import disable_progress_bars

    source, out, bundle = sys.argv[1:]
    disable_progress_bars()
    scorer = Scorer(bundle)
    _ = scorer.detector  # before the processes of `map`, which inherit it

    def score(batch: dict[str, Any]) -> dict[str, Any]:
        torch.set_num_threads(1)
        pixels = np.stack([scorer.fit(image) for image in batch["image"]])
        return {"path": batch["path"], "logit": scorer.score_pixels(pixels)}

    num_images = count_images(source)
    started_s = time.time()
    dataset = open_dataset(source, f"{out}/cache")
    scored = dataset.map(
        score,
        batched=True,
        batch_size=BATCH_SIZE,
        num_proc=NUM_CORES,
        remove_columns=["image"],
        cache_file_name=f"{out}/cache/scored.arrow",
    )
    scored.to_parquet(f"{out}/scores.parquet")
    print_result([Share(num_images, num_images, started_s, time.time())])


if __name__ == "__main__":
    main()
