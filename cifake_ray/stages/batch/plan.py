"""What a run will be before it starts: all that its verb defines, its workers, and --dry-run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cifake_ray.config import BatchConfig, Device, fingerprint_settings
from cifake_ray.core.evaluation.policy import Policy
from cifake_ray.core.processing.processor import Processor
from cifake_ray.core.schema import SPLITS
from cifake_ray.errors import ExitCode, NothingToDo
from cifake_ray.stages.batch.summary import Progress
from cifake_ray.stages.resources import (
    Placement,
    Resources,
    choose_gpu,
    names_cluster,
    place_workers,
    read_local_resources,
)
from cifake_ray.storage.io.paths import AnyPath
from cifake_ray.storage.runs.list_parts import PART_ROWS
from cifake_ray.storage.runs.manifest import choose_shard_rows
from cifake_ray.storage.runs.run import Run
from cifake_ray.storage.runs.run_plan import RunPlan
from cifake_ray.storage.sources.choose_rows import choose_rows
from cifake_ray.storage.sources.source import Listing, Source

KEPT_OPTIONS = (
    "max_error_rate",
    "allow_pickle",
    "fake_class",
)  # not in the fingerprint, but `repair` needs them


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


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """All that a verb defines of its run."""

    command: str
    config: BatchConfig
    out: AnyPath
    source: Source
    paths: dict[str, str | None]  # the other path options, resolved, for `repair` to use again
    inputs: dict[str, Any] = field(default_factory=dict)  # replaces them in the fingerprint
    device: Device = "cpu"
    needs_labels: bool = False  # say which images have none
    make_processor: Callable[[Placement], Processor]
    on_progress: Callable[[Progress], None]
    started_s: float  # time.monotonic() when the process began
    log: Callable[[str], None]
    facts: dict[str, Any] = field(default_factory=dict)  # for DryRun: bundle, threshold
    # Leaves rows out of the listing, before --limit and --sample.
    choose_listed: Callable[[Listing], None] | None = None
    before_success: Callable[[Run], None] = lambda run: None  # called when all shards are committed
    threshold: float | None = None  # from which p_fake is called FAKE; None if there is none
    policy: Policy | None = None  # decides instead
    extend: bool = False  # list the source again, for new keys
    thresholds: dict[str, float] = field(default_factory=dict)  # all that the bundle has, by name

    @property
    def run(self) -> RunPlan:
        """Return the plan of the run that is found in the output or frozen there."""
        settings = {**fingerprint_settings(self.config), **self.paths}
        kept = {name: value for name, value in asdict(self.config).items() if name in KEPT_OPTIONS}
        return RunPlan(
            out=self.out,
            command=self.command,
            settings={**settings, **self.inputs},
            config={**settings, **kept},
            list_source=self.list_images,
            shard_rows=self.config.shard_size,
            source=self.source,
            needs_labels=self.needs_labels,
            log=self.log,
        )

    def list_images(self, *, whole: bool = False) -> Listing:
        """List the source, or what the options choose of it; count and log.

        Not `whole`, it may leave parts of the source to workers, unless the choice is of all.
        """
        whole = whole or (self.config.limit, self.config.sample, self.choose_listed) != (None,) * 3
        listing = self.source.list_images(max_rows=None if whole else PART_ROWS)
        if self.choose_listed is not None:
            self.choose_listed(listing)
        choose_rows(listing, self.config)
        listing.count_rows(describe=self.needs_labels)

        def log(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            listed = 0
            for batch in batches:
                listed += batch.num_rows
                self.log(f"{self.command}: listing, {listed:,} keys ...")
                yield batch
            if not listing.left:
                self.log(f"{self.command}: listed {listed:,} keys; starting workers ...")

        listing.change_batches(log)
        return listing


def plan_batch(plan: BatchPlan) -> DryRun:
    """List the source and count; write nothing and do not start Ray."""
    plan.run.find()  # raises if the output belongs to another run
    listing = plan.list_images(whole=True)
    size = count_listing(listing)
    if not size.listed:
        raise NothingToDo(listing.explain_empty())
    for note in listing.notes:
        plan.log(f"{plan.command}: {note}")
    counts = listing.counts.to_dict()
    num_workers, device = guess_placement(plan.config, plan.device)
    rows = plan.config.shard_size or choose_shard_rows(size.listed, size.size_bytes)
    return DryRun(
        command=plan.command,
        out=str(plan.out),
        listed=size.listed,
        size_bytes=size.size_bytes,
        left_out=dict(+listing.left_out),
        labels=counts["labels"],
        splits=counts["splits"],
        sources=counts["sources"],
        shards_total=size.num_batches
        if listing.keeps_order
        else sum(-(-count // rows) for count in size.by_split.values()),
        num_workers=num_workers,
        device=device,
        **plan.facts,
    )
