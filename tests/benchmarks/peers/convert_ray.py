"""convert_ray.py SRC OUT: read_binary_files -> map_batches (header facts, sha256) -> write_parquet.

read_images -> write_parquet would be another job: it keeps pixels and loses the files.
"""

from __future__ import annotations

import sys
from typing import Any

from convert_bare import inspect_bytes
from shared import count_images, open_s3, run_ray_data


def make_dataset() -> Any:
    import ray

    source = sys.argv[1]
    store = open_s3() if source.startswith("s3://") else None
    return ray.data.read_binary_files(
        source.removeprefix("s3://"), filesystem=store, include_paths=True
    ).map_batches(lambda batch: {**batch, **inspect_bytes(list(batch["bytes"]))})


if __name__ == "__main__":
    run_ray_data(make_dataset, sys.argv[2], count_images(sys.argv[1]))
