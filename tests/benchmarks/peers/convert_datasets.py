"""convert_datasets.py SRC OUT: `datasets` of Hugging Face: header facts, sha256, to_parquet."""

from __future__ import annotations

import sys
import time
from typing import Any

from convert_bare import inspect_bytes
from score_datasets import open_dataset
from shared import NUM_CORES, Share, count_images, print_result


def main() -> None:
    from datasets import Image, disable_progress_bars
    from datasets.utils.file_utils import xopen

    source, out = sys.argv[1:]
    disable_progress_bars()

    def convert(batch: dict[str, Any]) -> dict[str, Any]:
        data = []
        for path in batch["path"]:
            with xopen(path, "rb") as file:
                data.append(file.read())
        return {"bytes": data, **inspect_bytes(data)}

    num_images = count_images(source)
    started_s = time.time()
    dataset = open_dataset(source, f"{out}/cache").cast_column("image", Image(decode=False))
    converted = dataset.map(
        convert,
        batched=True,
        num_proc=NUM_CORES,
        remove_columns=["image"],
        cache_file_name=f"{out}/cache/converted.arrow",
    )
    converted.to_parquet(f"{out}/images.parquet")
    print_result([Share(num_images, num_images, started_s, time.time())])


if __name__ == "__main__":
    main()
