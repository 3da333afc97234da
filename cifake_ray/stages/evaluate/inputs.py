"""What evaluate measures: shards, labelled images of any source, or scores that exist already."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from scipy.special import expit, logit

from cifake_ray.config import EvaluateConfig, TrainConfig
from cifake_ray.core.labels import parse_split
from cifake_ray.errors import NothingToDo, RunMismatch, StorageError, UsageError
from cifake_ray.storage.bundles.bundle import BundleInfo
from cifake_ray.storage.datasets.training_rows import read_training_rows
from cifake_ray.storage.io.files import exists, is_file, read_json
from cifake_ray.storage.io.paths import AnyPath
from cifake_ray.storage.io.records import parse_record
from cifake_ray.storage.runs.run import OtherVerb, read_record, read_run
from cifake_ray.storage.runs.settings import describe_detector
from cifake_ray.storage.runs.train_run import TrainRun
from cifake_ray.storage.runs.verify import open_finished, read_files
from cifake_ray.storage.sources.columns import ColumnChoice
from cifake_ray.storage.sources.labelled import LabelledSource
from cifake_ray.storage.sources.open_source import open_source
from cifake_ray.storage.sources.parquet import ParquetSource, find_splits, find_tables, name_table
from cifake_ray.storage.sources.score_tables import ScoreTables, find_score_tables
from cifake_ray.storage.sources.source import KeyFilter, Source

ELSEWHERE = "unknown: the scores were made elsewhere"
# Options of train that choose its rows.
CHOOSING = (
    *("val_fraction", "val_split", "test_fraction", "exclude_source", "val_sources"),
    *("balance_sources", "twins", "twin_share"),
)
MAX_RATIOS = 1000  # from which a temperature is computed
MAX_P_FAKE_GAP = 0.02  # of a p_fake, rounded perhaps, from the sigmoid of its logit


@dataclass(frozen=True)
class _Summary:
    """What is read of the `_SUCCESS` of a run that has scored."""

    threshold: float | None = None


def find_scores(config: EvaluateConfig, place: AnyPath) -> tuple[ScoreTables, float, str] | None:
    """Return the scores that a path holds, from which p_fake they mean FAKE, and who made them."""
    if not is_file(place) and exists(place / "_run.json"):
        try:
            run = read_run(place)
        except OtherVerb:  # `open_source` says what there is not
            return None
        if run is None or run.command == "convert":
            return None
        files = tuple(place / row["name"] for row in read_files(open_finished(place)))
        threshold = parse_record(_Summary, read_json(place / "_SUCCESS")).threshold
        detector = ELSEWHERE
        if run.settings.get("bundle") is not None:
            detector = f"{describe_detector(run.settings, run.config)}; the scores are of {place}"
        tables = ScoreTables(place, files, is_ours=True)
        return tables, 0.5 if threshold is None else threshold, detector
    choice = ColumnChoice.from_config(config.source)
    if config.source_kind != "auto":
        return None
    files = tuple(find_score_tables(place, config.shards, choice))
    kept = KeyFilter(config.include, config.exclude)
    return (ScoreTables(place, files, choice, kept), 0.5, ELSEWHERE) if files else None


def open_labelled(
    config: EvaluateConfig, place: AnyPath, out: AnyPath
) -> ParquetSource | LabelledSource:
    """Open the images of a path that have labels. UsageError or StorageError when it has none."""
    source = open_source(config.source, place, out)
    if config.unseen and not isinstance(source, ParquetSource):
        raise UsageError(f"--unseen: {place} is not what the detector was trained on: give shards")
    if not isinstance(source, ParquetSource):
        return LabelledSource(source)
    return replace(source, labelled=True)


def choose_split(
    config: EvaluateConfig, source: ParquetSource | LabelledSource, place: AnyPath, out: AnyPath
) -> str | None:
    """Return the split to measure: that of a run which has begun, else `test` if there is one.

    UsageError for one that is not there.
    """
    wanted = parse_split(config.split)
    if wanted is None and (run := read_run(out)) is not None and "split" in run.settings:
        begun: str | None = run.settings["split"]
        return begun
    if wanted is None and config.unseen:
        return None
    if isinstance(source, ParquetSource):
        splits = find_splits(place, source.choice)
    else:
        splits = source.find_splits()
    split = wanted or ("test" if "test" in splits else None)
    if split is not None and split not in splits:
        names = ", ".join(sorted(splits)) or "none"
        raise UsageError(f"--split {config.split}: {place} has no such split, it has {names}")
    return split


def read_first_schema(source: Source, place: AnyPath, split: str | None) -> pa.Schema:
    """Return the columns of the rows that are measured. NothingToDo when there is no row."""
    first = next(iter(source.list_images().batches), None)
    if first is None:
        raise NothingToDo(
            f"{place}: no labelled image{f' in the split {split}' if split else ''}; give the"
            " output of convert for folders named REAL and FAKE, or for a list with labels"
        )
    return first.schema


def find_temperature(source: Source) -> float:
    """Return the temperature of scores: T in p_fake = sigmoid(logit / T), 1 if only one is known.

    UsageError when logit and p_fake are not of one detector.
    """
    batches = source.list_images().batches
    columns = [
        [batch.column(name).to_numpy(False) for name in ("logit", "p_fake")] for batch in batches
    ]
    logits, p_fake = (
        np.concatenate(parts).astype(np.float64) for parts in zip(*columns, strict=True)
    )
    has_score = ~np.isnan(p_fake)
    logits, p_fake = logits[has_score], p_fake[has_score]
    sharpness = p_fake * (1 - p_fake) * np.abs(logits)  # how little rounding of p_fake matters
    clear = np.argsort(-sharpness)[:MAX_RATIOS]
    clear = clear[sharpness[clear] > 0]
    temperature = float(np.median(logits[clear] / logit(p_fake[clear]))) if len(clear) else 1.0
    gap = np.abs(expit(logits / temperature) - p_fake) if temperature > 0 else np.ones(1)
    if np.max(gap, initial=0.0) > MAX_P_FAKE_GAP:
        raise UsageError(
            "p_fake is not the sigmoid of logit / T for any T, so the two columns are not of one"
            " detector; leave one out with --drop-columns logit or --drop-columns p_fake"
        )
    return temperature


def find_seen(config: EvaluateConfig, place: AnyPath, bundle: BundleInfo) -> dict[str, np.ndarray]:
    """Return the rows that a detector was trained or validated on, by file.

    UsageError when it is not known, or when these are other shards.
    """
    try:
        record = read_record(bundle.path.parent)
        settings, found = record["settings"], record["config"]
        options = {name: found[name] for name in CHOOSING if name in found}
        for name in ("exclude_source", "val_sources"):
            options[name] = tuple(options.get(name, ()))
    except (RunMismatch, StorageError, KeyError) as error:
        raise UsageError(
            f"--unseen: {bundle.path} is not in the RUN of `train` ({error})"
        ) from error
    train = TrainConfig(shards=str(place), run="", **options)
    other = UsageError(
        f"--unseen: {place} are not the shards that {bundle.path.parent} was trained on, so"
        " what it has not seen is unknown; leave --unseen out"
    )
    try:
        rows = read_training_rows(train, TrainRun(bundle.path.parent).read_digests())
    except UsageError as error:  # such as for a source that these shards do not have
        raise other from error
    if settings.get("rows") != rows.hash_rows():
        raise other
    starts, counts = [], defaultdict[AnyPath, int](int)
    for (path, _), num_rows in zip(rows.groups, rows.group_rows.tolist(), strict=True):
        starts.append(counts[path])
        counts[path] += num_rows
    numbers = np.array(starts)[rows.group] + rows.row
    files = np.array([list(counts).index(path) for path, _ in rows.groups])[rows.group]
    own = set(find_tables(place))  # twins are in files elsewhere
    return {
        name_table(path, place): numbers[files == number].astype(np.int64)
        for number, path in enumerate(counts)
        if path in own
    }
