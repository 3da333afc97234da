"""convert_bare.py SRC OUT: the work of convert in a plain loop, one process per core."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from typing import Any

from shared import NUM_CORES, Share, list_files, read_bytes, run_processes

PART_ROWS = 1024


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
    files = list_files(source)[rank::NUM_CORES]
    started_s = time.time()
    for start in range(0, len(files), PART_ROWS):
        some = files[start : start + PART_ROWS]
        data = [read_bytes(path) for path in some]
        table = pa.table({"path": some, "bytes": data, **inspect_bytes(data)})
        compression = {n: "none" if n == "bytes" else "zstd" for n in table.column_names}
        pq.write_table(table, f"{out}/{rank}-{start}.parquet", compression=compression)
    return Share(len(files), len(files), started_s, time.time())


if __name__ == "__main__":
    run_processes(convert_share)
