"""score_daft.py SRC OUT BUNDLE: Daft: download, a batch function on the bytes, write_parquet.

`pip install daft`. Its own decoder is another one (of Rust, with other pixels), which would be
another job: images are decoded where they are scored, in one process per core.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
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


def open_frame(source: str) -> Any:
    """A frame of `path` and `bytes`."""
    import daft
    from daft.functions import download

    if shards := list_shards(source):
        frame = daft.read_parquet(shards)
        return frame.select(daft.col("key").alias("path"), daft.col("image")["bytes"])
    frame = daft.from_pydict({"path": list_files(source)})
    return frame.with_column("bytes", download(daft.col("path"), io_config=make_io_config()))


def find_peers_in_every_process() -> None:
    """Let Daft's processes import this folder, as this one does."""
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))


def make_io_config() -> Any:
    from daft.io import IOConfig, S3Config

    endpoint = os.environ.get("AWS_ENDPOINT_URL")
    return IOConfig(
        s3=S3Config(
            endpoint_url=endpoint,
            region_name=os.environ.get("AWS_REGION"),
            key_id=os.environ.get("AWS_ACCESS_KEY_ID"),
            access_key=os.environ.get("AWS_SECRET_ACCESS_KEY"),
            force_virtual_addressing=False,
        )
    )


def main() -> None:
    import daft

    source, out, bundle = sys.argv[1:]
    find_peers_in_every_process()

    @daft.cls(use_process=True, max_concurrency=NUM_CORES)
    class DaftScorer:
        def __init__(self, bundle: str) -> None:
            import torch

            torch.set_num_threads(1)
            self.scorer = Scorer(bundle)

        @daft.method.batch(return_dtype=daft.DataType.float32(), batch_size=BATCH_SIZE)
        def score(self, data: daft.Series) -> Any:
            return self.scorer.score_bytes(data.to_pylist())

    num_images = count_images(source)
    started_s = time.time()
    frame = open_frame(source)
    frame = frame.with_column("logit", DaftScorer(bundle).score(daft.col("bytes")))
    frame.select("path", "logit").write_parquet(out)
    print_result([Share(num_images, num_images, started_s, time.time())])


if __name__ == "__main__":
    main()
