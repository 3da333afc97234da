"""tune_ray.py SHARDS OUT CACHE EPOCHS RATE...: Ray Tune alone, a grid of learning rates."""

from __future__ import annotations

import sys
import time
from typing import Any

from shared import NUM_CORES, Share, print_result
from tune_bare import train_trials


def main() -> None:
    import ray
    from ray import tune

    arguments, rates = sys.argv[1:5], [float(word) for word in sys.argv[5:]]
    ray.init(address="local", num_cpus=NUM_CORES, include_dashboard=False, log_to_driver=False)

    def train(options: dict[str, Any]) -> None:
        (share,) = train_trials(arguments, [options["lr"]])
        tune.report({"images": share.images})

    started_s = time.time()
    tuner = tune.Tuner(
        train,
        param_space={"lr": tune.grid_search(rates)},
        run_config=tune.RunConfig(storage_path=f"{arguments[1]}/ray", verbose=0),
    )
    num_images = sum(result.metrics["images"] for result in tuner.fit())
    print_result([Share(num_images, num_images, started_s, time.time())])
    ray.shutdown()


if __name__ == "__main__":
    main()
