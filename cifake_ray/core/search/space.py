"""Parse and sample search spaces: options of `train`, each with its values or its distribution.

Distributions have the names of Ray Tune. The options of trial n follow from the seed and n alone,
so that a killed search runs the same trials again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from cifake_ray.config import Augmentation, TrainConfig, doc_of, find_misfit
from cifake_ray.errors import UsageError

RANGES = ("uniform", "loguniform", "randint", "lograndint")
KINDS = ("choice", *RANGES)
AUGMENT = "augment."  # before the name of a step
# Options of the search itself. Epochs are averaged (`keep_epochs`) after the objective is known.
OF_THE_SEARCH = {
    *("shards", "twins", "epochs", "seed", "val_fraction", "val_split", "val_sources"),
    *("monitor", "keep_epochs"),
}
SEARCHED = {
    f.name
    for f in fields(TrainConfig)
    if f.name not in OF_THE_SEARCH and doc_of(TrainConfig, f.name).in_fingerprint
}
OFF = {"rescale": 0, "blur": 0, "noise": 0, "downscale": 0, "jpeg_quality": 100} | {
    "webp_quality": 100
}  # and their shares


@dataclass(frozen=True)
class ParameterRange:
    """The values of one option."""

    kind: str  # one of KINDS
    values: tuple[Any, ...]  # of choice; else the lowest and what the highest stays below

    def pick(self, share: float) -> Any:
        """Return the value at a share in [0, 1) of the distribution."""
        if self.kind == "choice":
            return self.values[int(share * len(self.values))]
        low, high = self.values
        if self.kind.startswith("log"):
            value = math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
        else:
            value = low + share * (high - low)
        return int(value) if self.kind.endswith("randint") else value

    def contains(self, value: Any) -> bool:
        """Return whether the value can be picked."""
        return value in self.values if self.kind == "choice" else self.clip(value) == value

    def clip(self, value: Any) -> Any:
        """Return the nearest value that can be picked; one of a choice is left as it is."""
        if self.kind == "choice":
            return value
        low, high = self.values
        highest = high - 1 if self.kind.endswith("randint") else math.nextafter(high, low)
        return min(max(value, low), highest)


Space = dict[str, ParameterRange]  # by the name of the option


def parse_space(values: Mapping[str, Any]) -> Space:
    """Parse a space. UsageError for names that cannot be searched and odd distributions.

    `lr: {loguniform: [0.001, 0.01]}`, `patience: {choice: [2, 4]}`, or a list of choices alone;
    `augment.shift` and the like are steps of the augmentation.
    """
    if not values:
        raise UsageError("searches nothing; write one `option: {choice: [...]}` a line")
    known = SEARCHED | {AUGMENT + f.name for f in fields(Augmentation)}
    if unknown := sorted(set(values) - known):
        raise UsageError(
            f"{', '.join(unknown)}: cannot be searched; it takes {', '.join(sorted(known))}"
        )
    if "augment" in values and any(name.startswith(AUGMENT) for name in values):
        raise UsageError("search either `augment` or its steps, `augment.flip` and the like")
    space = {name: _parse_domain(name, value) for name, value in values.items()}
    for name, domain in space.items():
        owner = Augmentation if name.startswith(AUGMENT) else TrainConfig
        for value in (domain.pick(0.0), *(domain.values if domain.kind == "choice" else ())):
            if misfit := find_misfit(owner, name.removeprefix(AUGMENT), value):
                raise UsageError(f"{name} {misfit}")
    return space


def _parse_domain(name: str, value: Any) -> ParameterRange:
    if isinstance(value, list):
        value = {"choice": value}
    if not isinstance(value, dict) or len(value) != 1 or next(iter(value)) not in KINDS:
        raise UsageError(f"{name}: give a list of values, or one of {', '.join(KINDS)}")
    ((kind, numbers),) = value.items()
    if not isinstance(numbers, list) or not numbers:
        raise UsageError(f"{name}: {kind} takes a list of values")
    if kind in RANGES:
        is_number = all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers)
        if not is_number or len(numbers) != 2 or not numbers[0] < numbers[1]:
            raise UsageError(f"{name}: {kind} takes [lowest, highest]")
        if kind.startswith("log") and numbers[0] <= 0:
            raise UsageError(f"{name}: {kind} begins above 0")
        if not kind.endswith("randint"):
            numbers = [float(n) for n in numbers]
        elif any(not isinstance(n, int) for n in numbers):
            raise UsageError(f"{name}: {kind} takes whole numbers; the highest is left out")
    return ParameterRange(kind, tuple(numbers))


def sample_space(space: Space, seed: int, number: int) -> dict[str, Any]:
    """Return the options of trial `number`, counted from 0."""
    shares = np.random.default_rng((seed, number)).random(len(space))
    return {n: d.pick(float(u)) for (n, d), u in zip(space.items(), shares, strict=True)}


def list_grid(space: Space) -> Iterator[dict[str, Any]]:
    """Yield every combination, the last option changing fastest. UsageError for a range."""
    for name, domain in space.items():
        if domain.kind != "choice":
            raise UsageError(f"--searcher grid: {name} is a {domain.kind}; give a list of values")
    for values in itertools.product(*(domain.values for domain in space.values())):
        yield dict(zip(space, values, strict=True))


def count_grid(space: Space) -> int:
    """Return the number of combinations of a grid."""
    return math.prod(len(domain.values) for domain in space.values())


def to_train_options(chosen: Mapping[str, Any], policy: Augmentation) -> dict[str, Any]:
    """Return options of `train`: `augment` is the policy with the steps that were chosen.

    A step of no strength or no share is left out.
    """
    steps = {k.removeprefix(AUGMENT): v for k, v in chosen.items() if k.startswith(AUGMENT)}
    options = {name: value for name, value in chosen.items() if not name.startswith(AUGMENT)}
    if steps:
        values = {**asdict(policy), **steps}
        for strength, nothing in OFF.items():
            share = f"{strength.removesuffix('_quality')}_share"
            if values[strength] == nothing or values[share] == 0:
                values[strength], values[share] = nothing, 0.0
        options["augment"] = Augmentation(**values)
    return options
