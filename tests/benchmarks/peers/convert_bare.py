"""convert_bare.py SRC OUT: the work of convert in a plain loop, one process per core."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from typing import Any

from shared import NUM_CORES, Share, read_batches, run_processes


def inspect_bytes(data: list[bytes]) -> dict[str, list[Any]]:
    """The columns of convert that are computed: header facts and sha256."""
    from cifake_ray.core.imaging.decode import inspect_image

    facts = [inspect_image(d) for d in data]
    return {
        "sha256": [hashlib.sha256(d).digest() for d in data],
        **{name: [getattr(f, name) for f in facts] for name in facts[0].__dataclass_fields__},
    }


def convert_share(rank: int) -> Share:
    import pyarrow as pa
    import pyarrow.parquet as pq

    import cifake_ray.core.imaging.decode  # noqa: F401 - the clock starts after the imports

    source, out = sys.argv[1:]
    os.makedirs(out, exist_ok=True)
    batches = read_batches(source, rank, NUM_CORES)
    next(batches)
    started_s = time.time()
    num_images = 0
    for files, data in batches:
        table = pa.table({"path": files, "bytes": data, **inspect_bytes(data)})
        compression = {n: "none" if n == "bytes" else "zstd" for n in table.column_names}
        pq.write_table(table, f"{out}/{rank}-{num_images}.parquet", compression=compression)
        num_images += len(files)
    return Share(num_images, num_images, started_s, time.time())


if __name__ == "__main__":
    run_processes(convert_share)
