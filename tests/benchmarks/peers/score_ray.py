"""score_ray.py SRC OUT BUNDLE: read_images -> map_batches(actors) -> write_parquet, as documented.

Actors that hold every CPU leave none for the reading and the plan hangs, so one CPU stays free.
"""

from __future__ import annotations

import sys
from typing import Any

from score_bare import BATCH_SIZE, Scorer
from shared import NUM_CORES, list_files, run_ray_data


def make_dataset() -> Any:
    import ray

    source, _, bundle = sys.argv[1:]
    return ray.data.read_images(source, include_paths=True, mode="RGB").map_batches(
        Scorer,
        fn_constructor_args=(bundle,),
        batch_size=BATCH_SIZE,
        num_cpus=1,
        compute=ray.data.ActorPoolStrategy(size=max(1, NUM_CORES - 1)),
    )


if __name__ == "__main__":
    run_ray_data(make_dataset, sys.argv[2], len(list_files(sys.argv[1])))
