"""convert_daft.py SRC OUT: Daft: download, a batch function (header facts, sha256), write_parquet.

`pip install daft`.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from convert_bare import inspect_bytes
from score_daft import find_peers_in_every_process, open_frame
from shared import NUM_CORES, Share, count_images, print_result


def main() -> None:
    import daft
    from daft import DataType

    source, out = sys.argv[1:]
    find_peers_in_every_process()
    facts = DataType.struct(
        {
            "sha256": DataType.binary(),
            **dict.fromkeys(("width", "height", "jpeg_quality", "num_frames"), DataType.int64()),
            **dict.fromkeys(("format", "mode"), DataType.string()),
        }
    )

    @daft.cls(use_process=True, max_concurrency=NUM_CORES)
    class Inspector:
        @daft.method.batch(return_dtype=facts, unnest=True, batch_size=1024)
        def inspect(self, data: daft.Series) -> Any:
            columns = inspect_bytes(data.to_pylist())
            return [
                dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
            ]

    num_images = count_images(source)
    started_s = time.time()
    frame = open_frame(source)
    frame.select("path", "bytes", Inspector().inspect(daft.col("bytes"))).write_parquet(out)
    print_result([Share(num_images, num_images, started_s, time.time())])


if __name__ == "__main__":
    main()
