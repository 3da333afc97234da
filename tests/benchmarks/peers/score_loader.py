"""score_loader.py SRC OUT BUNDLE: Pillow in a torch DataLoader, forward in the main process."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterator
from typing import Any

from score_bare import Scorer, write_logits
from shared import BATCH_SIZE, NUM_CORES, Share, print_result, read_batches
from torch.utils.data import DataLoader, IterableDataset, get_worker_info


class Pictures(IterableDataset[tuple[str, Any]]):
    """Paths and pixels; each process of the loader yields its share."""

    def __init__(self, source: str, scorer: Scorer) -> None:
        self.source, self.scorer = source, scorer

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        from PIL import Image

        worker = get_worker_info()
        assert worker is not None
        for files, data in read_batches(self.source, worker.id, worker.num_workers):
            for path, each in zip(files, data, strict=True):
                yield path, self.scorer.fit(Image.open(io.BytesIO(each)))


def main() -> None:
    source, out, bundle = sys.argv[1:]
    scorer = Scorer(bundle)
    _ = scorer.detector  # before the processes of the loader, which inherit it
    loader = DataLoader(Pictures(source, scorer), batch_size=BATCH_SIZE, num_workers=NUM_CORES)
    started_s = time.time()
    files: list[str] = []
    logits = []
    for some, pixels in loader:
        files += some
        logits.append(scorer.score_pixels(pixels))
    write_logits(files, logits, f"{out}/scores.parquet")
    print_result([Share(len(files), len(files), started_s, time.time())])


if __name__ == "__main__":
    main()
