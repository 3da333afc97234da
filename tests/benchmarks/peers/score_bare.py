"""score_bare.py SRC OUT BUNDLE: read, decode, forward, Parquet; a loop in one process per core."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from shared import NUM_CORES, Share, read_batches, run_processes

from cifake_ray.stages.malloc import keep_freed_memory


class Scorer:
    """The detector of a bundle; it is loaded in the process that first scores with it."""

    def __init__(self, bundle: str) -> None:
        self.bundle = bundle

    @cached_property
    def detector(self) -> Any:
        from cifake_ray.storage.bundles.bundle import load_bundle

        return load_bundle(Path(self.bundle))[0]

    def fit(self, image: Any) -> Any:
        """Pillow's image of a peer -> uint8[S, S, 3], as `load_image` fits what it decodes."""
        import numpy as np

        from cifake_ray.core.imaging.preprocessing import fit_image

        wanted = self.detector.preprocessing
        pixels = np.array(image if isinstance(image, np.ndarray) else image.convert("RGB"))
        return fit_image(pixels, size=wanted.image_size, fit=wanted.fit)

    def score_pixels(self, pixels: Any) -> Any:
        """uint8[B, S, S, 3] -> float32[B] logits."""
        import torch

        with torch.inference_mode():
            return self.detector.find_logit(torch.as_tensor(pixels)).numpy()

    def score_bytes(self, data: Sequence[bytes]) -> Any:
        """Encoded images -> float32[B] logits."""
        import numpy as np

        load_image = self.detector.preprocessing.load_image
        return self.score_pixels(np.stack([load_image(each) for each in data]))


def write_logits(files: list[str], logits: list[Any], path: str) -> None:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    os.makedirs(os.path.dirname(path), exist_ok=True)
    pq.write_table(pa.table({"path": files, "logit": np.concatenate(logits)}), path)


def score_share(rank: int) -> Share:
    import torch

    source, out, bundle = sys.argv[1:]
    torch.set_num_threads(1)
    keep_freed_memory()  # as our workers do, so that the ratio is about everything else
    scorer = Scorer(bundle)
    _ = scorer.detector
    files: list[str] = []
    logits = []
    batches = read_batches(source, rank, NUM_CORES)
    next(batches)
    started_s = time.time()
    for some, data in batches:
        files += some
        logits.append(scorer.score_bytes(data))
    if files:
        write_logits(files, logits, f"{out}/{rank}.parquet")
    return Share(len(files), len(files), started_s, time.time())


if __name__ == "__main__":
    run_processes(score_share)
