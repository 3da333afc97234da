"""convert_ray.py SRC OUT images|binary: how one writes convert with Ray Data alone.

`images`: read_images -> write_parquet, which keeps pixels and loses the files.
`binary`: read_binary_files -> map_batches (header facts, sha256) -> write_parquet.
"""

from __future__ import annotations

import sys
from typing import Any

from convert_bare import inspect_bytes
from shared import list_files, run_ray_data


def make_dataset() -> Any:
    import ray

    source, kind = sys.argv[1], sys.argv[3]
    if kind == "images":
        return ray.data.read_images(source, include_paths=True)
    return ray.data.read_binary_files(source, include_paths=True).map_batches(
        lambda batch: {**batch, **inspect_bytes(list(batch["bytes"]))}
    )


if __name__ == "__main__":
    run_ray_data(make_dataset, sys.argv[2], len(list_files(sys.argv[1])))
