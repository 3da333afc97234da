"""Options of `tune`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from cifake_ray.config.fields import ClusterConfig, Device, Doc, RuntimeDoc, check, check_least
from cifake_ray.config.train import TrackerName
from cifake_ray.config.validation import Monitor

Scheduler = Literal["asha", "median", "pbt", "none"]
Searcher = Literal["random", "grid", "tpe"]


@dataclass(frozen=True, kw_only=True)
class TuneConfig(ClusterConfig):
    """tune: search options of train; RUN gets the best trial's bundle and recipe, and a table."""

    PANEL: ClassVar[str] = "Search"

    shards: Annotated[str, Doc("Output of convert", positional=True)]
    run: Annotated[
        str, RuntimeDoc("Folder of this search; the same folder resumes", positional=True)
    ]
    search: Annotated[
        tuple[str, ...],
        Doc("Search space, built-in or a YAML file; repeat to search several"),
    ] = ("augmentation",)
    recipe: Annotated[
        str, Doc("Options of `train` that all trials share: a built-in recipe or a YAML file")
    ] = "fast"
    epochs: Annotated[int | None, Doc("Most epochs of a trial (default: the recipe's)")] = None
    objective: Annotated[Monitor, Doc("Validation metric that selects the best trial")] = (
        "val_accuracy"
    )
    max_parameters: Annotated[int | None, Doc("Leave out networks with more parameters")] = None
    max_latency_ms: Annotated[
        float | None,
        Doc("Leave out networks that need longer for an image, here, on one CPU thread or the GPU"),
    ] = None
    trials: Annotated[
        int,
        RuntimeDoc(
            "Trials, of which the first is the recipe as it is; with the grid searcher at most this"
            " many combinations. More of them extend a finished search"
        ),
    ] = 16
    time_budget: Annotated[
        float | None, RuntimeDoc("Stop the search after this many seconds (default: never)")
    ] = None
    max_concurrent: Annotated[
        int | None, RuntimeDoc("Trials at once (default: as many as the cluster holds)")
    ] = None
    scheduler: Annotated[Scheduler, Doc("Algorithm that stops trials that fall behind")] = "asha"
    grace_epochs: Annotated[int, Doc("Epochs before a trial may be stopped, or copied by pbt")] = 1
    reduction_factor: Annotated[int, Doc("asha: one trial in this many continues at each rung")] = 3
    searcher: Annotated[Searcher, Doc("Algorithm that chooses the options; tpe needs Optuna")] = (
        "random"
    )
    seed: Annotated[int, Doc("Same seed, same trials")] = 0
    num_workers: Annotated[
        int, RuntimeDoc("Data-parallel workers of each trial; 0 trains in the trial's own process")
    ] = 0
    cpus_per_worker: Annotated[int, RuntimeDoc("CPU threads of each worker")] = 1
    device: Annotated[Device, RuntimeDoc("auto: the GPUs if there are any")] = "auto"
    max_failures: Annotated[
        int, RuntimeDoc("Failures of a trial to recover from before it is given up")
    ] = 1
    cache_dir: Annotated[
        str | None, RuntimeDoc("Folder for decoded images (default: ~/.cache/cifake_ray)")
    ] = None
    track: Annotated[
        tuple[TrackerName, ...],
        RuntimeDoc("Log every trial's epochs to tensorboard or mlflow, as `train` does"),
    ] = ()
    dry_run: Annotated[bool, RuntimeDoc("Show the plan and stop")] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 1, "trials", "epochs", "max_concurrent", "grace_epochs")
        check_least(self, 1, "cpus_per_worker", "max_parameters")
        check_least(self, 0, "seed", "num_workers", "max_failures")
        check_least(self, 2, "reduction_factor")
        for name in ("time_budget", "max_latency_ms"):
            value = getattr(self, name)
            check(
                value is None or value > 0,
                f"--{name.replace('_', '-')} is {value}; give a number above 0",
            )
        check(len(self.search) > 0, "--search: give a built-in space or a YAML file")
        check(
            self.scheduler != "pbt" or self.searcher == "random",
            f"--scheduler pbt chooses for itself; leave --searcher {self.searcher} out",
        )
        check(
            self.scheduler != "pbt" or self.max_concurrent is None,
            "--scheduler pbt lets all trials take turns; leave --max-concurrent out",
        )
