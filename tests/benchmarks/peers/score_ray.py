"""score_ray.py SRC OUT BUNDLE: read_images -> map_batches(actors) -> write_parquet, as documented.

Shards are read with read_parquet. Actors that hold every CPU leave none for the reading and the
plan hangs: those on N cores hold N - 1 together.
"""

from __future__ import annotations

import io
import sys
from typing import Any

from score_bare import Scorer
from shared import BATCH_SIZE, NUM_CORES, count_images, list_shards, open_s3, run_ray_data


class RayScorer(Scorer):
    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Ray Data's arrays are read-only, and torch wants them writable."""
        return {"path": batch["path"], "logit": self.score_pixels(batch["image"].copy())}


def make_dataset() -> Any:
    import ray

    source, _, bundle = sys.argv[1:]
    scorer = Scorer(bundle)

    def fit(row: dict[str, Any]) -> dict[str, Any]:
        from PIL import Image

        if "key" in row:
            image = Image.open(io.BytesIO(row["image"]["bytes"]))
            return {"path": row["key"], "image": scorer.fit(image)}
        return {"path": row["path"], "image": scorer.fit(row["image"])}

    if shards := list_shards(source):
        dataset = ray.data.read_parquet(shards, columns=["key", "image"])
    else:
        store = open_s3() if source.startswith("s3://") else None
        dataset = ray.data.read_images(
            source.removeprefix("s3://"), filesystem=store, include_paths=True, mode="RGB"
        )
    return dataset.map(fit).map_batches(
        RayScorer,
        fn_constructor_args=(bundle,),
        batch_size=BATCH_SIZE,
        num_cpus=(NUM_CORES - 1) / NUM_CORES,
        compute=ray.data.ActorPoolStrategy(size=NUM_CORES),
    )


if __name__ == "__main__":
    run_ray_data(make_dataset, sys.argv[2], count_images(sys.argv[1]))
