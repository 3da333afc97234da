"""What a run will be before it starts: its workers and, for --dry-run, what the listing knows."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow.compute as pc

from cifake_ray.config import BatchConfig, Device
from cifake_ray.core.schema import SPLITS
from cifake_ray.errors import ExitCode
from cifake_ray.stages.resources import (
    Placement,
    Resources,
    choose_gpu,
    names_cluster,
    place_workers,
    read_local_resources,
)
from cifake_ray.storage.sources.source import Listing


@dataclass(frozen=True)
class DryRun:
    """Plan of a run that was not started."""

    command: str
    out: str
    listed: int
    size_bytes: int
    left_out: dict[str, int]
    shards_total: int
    labels: dict[str, int]
    splits: dict[str, int]
    sources: dict[str, int]
    num_workers: int | None  # None where a cluster decides
    device: str
    bundle: str | None = None
    threshold: float | None = None
    precision: str | None = None

    def exit_code(self, max_error_rate: float) -> ExitCode:
        return ExitCode.OK


@dataclass
class ListingSize:
    """How much a listing holds."""

    size_bytes: int = 0
    num_batches: int = 0
    by_split: Counter[str | None] = field(default_factory=Counter)  # as shards are dealt

    @property
    def listed(self) -> int:
        return self.by_split.total()


def count_listing(listing: Listing) -> ListingSize:
    """Read a listing to its end and count."""
    size = ListingSize()
    for batch in listing.batches:
        size.size_bytes += int(np.nansum(batch.column("size_bytes").to_numpy(False)))
        size.num_batches += 1
        for item in pc.value_counts(batch.column("split")).to_pylist():
            split = item["values"] if item["values"] in SPLITS else None
            size.by_split[split] += item["counts"]
    return size


def describe_workers(num_workers: int, is_local: bool) -> str:
    """Return how many workers there are, and of what."""
    return f"{num_workers} worker{'s' * (num_workers > 1)} {'without' if is_local else 'on'} Ray"


def guess_placement(config: BatchConfig, wanted: Device) -> tuple[int | None, str]:
    """Return how many workers would run, on what, without asking Ray; None and auto elsewhere."""
    if names_cluster(config) and config.num_workers != 0:
        return config.num_workers, wanted
    placement = choose_placement(read_local_resources(wanted), config.num_workers, wanted)
    return placement.num_workers, "cuda" if placement.gpus_per_worker else "cpu"


def choose_placement(resources: Resources, num_workers: int | None, device: Device) -> Placement:
    """Return a placement of a worker per CPU, or per GPU with tasks on all other CPUs to feed it.

    ResourceError, with the numbers, when the cluster is too small.
    """
    use_gpu = choose_gpu(device, resources)
    placement = place_workers(
        resources,
        num_workers=num_workers or max(1, resources.num_gpus if use_gpu else resources.num_cpus),
        use_gpu=use_gpu,
        cpus_per_worker=1,
    )
    spare = resources.num_cpus - placement.num_workers if use_gpu else 0
    return replace(placement, num_feeders=-(-spare // placement.num_workers))
