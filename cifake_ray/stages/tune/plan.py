"""Plan the trials of a search: their common options of `train`, and the budget of the networks."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import torch

from cifake_ray.config import POLICIES, TrainConfig, TuneConfig
from cifake_ray.core.search.space import AUGMENT, Space, parse_space, to_train_options
from cifake_ray.core.training.model_cost import count_cost, measure_speed
from cifake_ray.errors import UsageError
from cifake_ray.storage.bundles.built_ins import pin_bundle
from cifake_ray.storage.bundles.teachers import pin_teachers
from cifake_ray.storage.io.paths import resolve_path
from cifake_ray.storage.presets.augmentation import read_augmentation
from cifake_ray.storage.presets.yaml_presets import RECIPES, find_preset, read_recipe, read_searches
from cifake_ray.storage.runs.tune_run import Trial, TuneRun


@dataclass(frozen=True)
class TrialPlan:
    """Options and budget that all trials of a search share."""

    config: TuneConfig
    options: dict[str, Any]  # of `train`; chosen steps change the policy `augment`

    @property
    def search(self) -> TuneRun:
        return TuneRun(resolve_path(self.config.run, self.config.store))

    def to_train_config(self, trial: Trial) -> TrainConfig:
        """Return a trial's options of `train`. UsageError when they do not fit together."""
        return TrainConfig(
            **{**self.options, **to_train_options(trial.chosen, self.options["augment"])},
            run=str(self.search.run_of(trial).path),
        )

    def find_baseline(self, space: Space) -> dict[str, Any]:
        """Return what the recipe gives each searched option: the trial that others must beat."""
        train = self.to_train_config(Trial(0, {}))
        steps = {AUGMENT + name: value for name, value in asdict(train.policy).items()}
        options = {**vars(train), "augment": str(train.policy), **steps}
        return {name: options[name] for name in space}

    def measure(self, trial: Trial) -> Trial:
        """Return the trial with the size of its network.

        UsageError when the network is beyond the budget, or the options do not fit together.
        """
        train = self.to_train_config(trial)
        size = _count_parameters(train.model, train.image_size)
        most, most_ms = self.config.max_parameters, self.config.max_latency_ms
        if most is not None and size > most:
            raise UsageError("more than --max-parameters")
        if most_ms is not None and _measure_latency_ms(train.model, train.image_size) > most_ms:
            raise UsageError("more than --max-latency-ms")
        return replace(trial, num_parameters=size)


@cache
def _count_parameters(model: str, image_size: int | None) -> int:
    return count_cost(model, image_size).num_parameters


@cache
def _measure_latency_ms(model: str, image_size: int | None) -> float:
    """Measure on one thread, or on the GPU if there is one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return 1000 / measure_speed(model, image_size).score_images_per_s
    finally:
        torch.set_num_threads(threads)


def make_plan(config: TuneConfig) -> TrialPlan:
    """Read the recipe. UsageError when it has options that `train` does not have."""
    options: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in read_recipe(find_preset(config.recipe, RECIPES)).items()
    }
    options |= {
        **asdict(config.store),
        "shards": config.shards,
        "seed": config.seed,
        "monitor": config.objective,  # so the kept epoch is the one that is compared
        "num_workers": str(config.num_workers),
        "cpus_per_worker": config.cpus_per_worker,
        "device": config.device,
        "cache_dir": config.cache_dir,
        "track": config.track,
    }
    if config.epochs is not None:
        options["epochs"] = config.epochs
    try:
        train = TrainConfig(**options, run="")
    except TypeError as error:
        raise UsageError(
            f"--recipe {config.recipe}: {error}; a recipe has options of `train`"
        ) from error
    options["epochs"] = train.epochs
    for name in ("weights", "teacher", "twins"):
        options[name] = _pin_file(name, getattr(train, name), train)
    options["augment"] = read_augmentation(train)
    return TrialPlan(config, options)


def read_space(config: TuneConfig, shared: TrainConfig) -> Space:
    """Read the search space. UsageError when it is missing or cannot be searched."""
    return {
        name: replace(domain, values=tuple(_pin_file(name, v, shared) for v in domain.values))
        for name, domain in parse_space(read_searches(config.search)).items()
    }


def _pin_file(name: str, value: Any, train: TrainConfig) -> Any:
    """Make a path absolute, or replace a file of steps by its text: trials run elsewhere."""
    if name == "twins" and value is not None:
        return str(resolve_path(value, train.store))
    if name == "weights" and value is not None:
        return pin_bundle(value, train.store)
    if name == "teacher" and value is not None:
        return pin_teachers(value, train.store)
    if name == "augment" and value not in POLICIES:
        return json.dumps(read_augmentation(replace(train, augment=value)).to_dict())
    return value
