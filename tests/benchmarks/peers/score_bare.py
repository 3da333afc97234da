"""score_bare.py SRC OUT BUNDLE: read, decode, forward, Parquet; a loop in one process per core."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from shared import NUM_CORES, Share, list_files, read_bytes, run_processes

from cifake_ray.stages.malloc import keep_freed_memory

BATCH_SIZE = 256


class Scorer:
    """The detector of a bundle: uint8[B, S, S, 3] -> float32[B] logits."""

    def __init__(self, bundle: str) -> None:
        from cifake_ray.storage.bundles.bundle import load_bundle

        self.detector, _ = load_bundle(Path(bundle))

    def score_pixels(self, pixels: Any) -> Any:
        import torch

        with torch.inference_mode():
            return self.detector.find_logit(torch.as_tensor(pixels)).numpy()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch of Ray Data, whose arrays are read-only."""
        return {"path": batch["path"], "logit": self.score_pixels(batch["image"].copy())}


def write_logits(files: list[str], logits: list[Any], path: str) -> None:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    os.makedirs(os.path.dirname(path), exist_ok=True)
    pq.write_table(pa.table({"path": files, "logit": np.concatenate(logits)}), path)


def score_share(rank: int) -> Share:
    import numpy as np
    import torch

    source, out, bundle = sys.argv[1:]
    torch.set_num_threads(1)
    keep_freed_memory()  # as our workers do, so that the ratio is about everything else
    scorer = Scorer(bundle)
    load_image = scorer.detector.preprocessing.load_image
    files = list_files(source)[rank::NUM_CORES]
    started_s = time.time()
    logits = []
    for start in range(0, len(files), BATCH_SIZE):
        batch = files[start : start + BATCH_SIZE]
        logits.append(scorer.score_pixels(np.stack([load_image(read_bytes(p)) for p in batch])))
    write_logits(files, logits, f"{out}/{rank}.parquet")
    return Share(len(files), len(files), started_s, time.time())


if __name__ == "__main__":
    run_processes(score_share)
