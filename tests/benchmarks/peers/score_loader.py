"""score_loader.py SRC OUT BUNDLE: Pillow in a torch DataLoader, forward in the main process."""

from __future__ import annotations

import sys
import time
from typing import Any

from score_bare import BATCH_SIZE, Scorer, write_logits
from shared import NUM_CORES, Share, list_files, print_result


class Pictures:
    """A map-style dataset, as torchvision's ImageFolder is one."""

    def __init__(self, files: list[str]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        import numpy as np
        from PIL import Image

        with Image.open(self.files[index]) as image:
            return np.array(image.convert("RGB"))


def main() -> None:
    from torch.utils.data import DataLoader

    source, out, bundle = sys.argv[1:]
    scorer = Scorer(bundle)
    files = list_files(source)
    loader = DataLoader(Pictures(files), batch_size=BATCH_SIZE, num_workers=NUM_CORES)
    started_s = time.time()
    logits = [scorer.score_pixels(pixels) for pixels in loader]
    write_logits(files, logits, f"{out}/scores.parquet")
    print_result([Share(len(files), len(files), started_s, time.time())])


if __name__ == "__main__":
    main()
