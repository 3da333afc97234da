"""Read and write `policy.json`, and choose its thresholds from stored scores."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cifake_ray.config import DecideConfig, StoreConfig
from cifake_ray.core.evaluation.fit_policy import count_needed, find_least_fpr, fit_cut, fit_groups
from cifake_ray.core.evaluation.policy import Policy, Scores, read_groups
from cifake_ray.core.schema import FAKE, REAL, SCHEMA_VERSION, SCORE_FIELDS
from cifake_ray.errors import UsageError
from cifake_ray.storage.io.files import encode_json, exists, read_json
from cifake_ray.storage.io.paths import resolve_path
from cifake_ray.storage.io.records import parse_record
from cifake_ray.storage.runs.keyed_rows import find_keys, read_answers, read_keyed_rows
from cifake_ray.storage.runs.run import Run
from cifake_ray.storage.runs.shards import read_shard
from cifake_ray.storage.runs.verify import open_finished, read_files

POLICY_NAME = "policy.json"
MAX_GROUPS = 10_000  # values of a column
LABEL_WORDS = {"real": REAL, "fake": FAKE, "0": REAL, "1": FAKE}


def read_policy(uri: str, store: StoreConfig | None = None) -> Policy:
    """Return the policy of a file, or of the output of decide. UsageError when it is none."""
    path = resolve_path(uri, store)
    path = path / POLICY_NAME if exists(path / POLICY_NAME) else path
    record = read_json(path)
    known_id = record.pop("id", None)
    try:
        if record.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(f"schema_version {record.get('schema_version')}")
        policy = parse_record(Policy, record)
    except ValueError as error:
        raise UsageError(f"{path}: not a policy of decide ({error})") from error
    if known_id not in (None, policy.id):
        raise UsageError(
            f"{path}: its id is {known_id}, its content is that of {policy.id}; it was edited: take"
            " out the id if that was meant"
        )
    return policy


def encode_policy(policy: Policy) -> bytes:
    return encode_json({"schema_version": SCHEMA_VERSION, "id": policy.id, **policy.to_dict()})


def check_bundle(policy: Policy, bundle: str, precision: str, place: object) -> None:
    """Raise UsageError when a policy is about other scores than those of a bundle."""
    if policy.bundle != bundle:
        remedy = "choose thresholds for these scores with `cifake-ray decide`"
        if policy.precision != precision:
            remedy = f"give --precision {policy.precision} to score, or {remedy}"
        raise UsageError(
            f"--policy: {policy.id} is for the scores of {policy.bundle[:12]} in"
            f" {policy.precision}, {place} has {bundle[:12]} in {precision}; {remedy}"
        )


def read_score_tables(run: Run) -> Iterator[pa.Table]:
    """Yield the shards of finished scores."""
    for row in read_files(run):
        yield read_shard(run.out / row["name"], SCORE_FIELDS)


def describe_bundle(run: Run) -> tuple[str, str]:
    """Return fingerprint and precision of what scored a run."""
    return str(run.settings.get("bundle")), str(run.settings.get("precision", "float32"))


def fit_policy(run: Run, config: DecideConfig, log: Callable[[str], None]) -> Policy:
    """Choose thresholds from the scores of REAL images; memory is four bytes for each of them.

    UsageError when there are too few for the promise, or when they are not of the same bundle.
    """
    groups = _collect_real(run, config, log)
    real = np.concatenate([*groups.values(), np.empty(0, np.float32)])
    target, confidence = config.target_fpr, config.confidence
    overall = fit_cut(real, target, confidence, config.unsure_fpr)
    needed = count_needed(target, confidence)
    if overall is None and len(real) >= needed:
        raise UsageError(
            f"--target-fpr {target:g}: too many of {len(real):,} REAL images have p_fake = 1.0,"
            " which no threshold separates; choose a higher one, or another detector"
        )
    if overall is None:
        least = find_least_fpr(len(real), confidence)
        step = 10.0 ** (np.floor(np.log10(least)) - 1)
        raise UsageError(
            f"{len(real):,} REAL images cannot promise a false-positive rate of {target:g} with"
            f" {100 * confidence:.4g}% confidence: that takes {needed:,}; give more, or"
            f" --target-fpr {np.ceil(least / step) * step:.2g} or above, or a lower --confidence"
        )
    own = {name: scores for name, scores in groups.items() if name is not None and config.by}
    fitted, too_few = fit_groups(own, target, confidence, config.unsure_fpr)
    bundle, precision = describe_bundle(run)
    return Policy(
        bundle=bundle,
        precision=precision,
        target_fpr=target,
        confidence=confidence,
        overall=overall,
        unsure_fpr=config.unsure_fpr,
        by=config.by,
        groups=fitted,
        too_few=too_few,
    )


def _collect_real(
    run: Run, config: DecideConfig, log: Callable[[str], None]
) -> dict[str | None, Scores]:
    """Return p_fake of the REAL images, by the value of the column."""
    known, given = None, config.real or config.labels
    path = run.out if given is None else resolve_path(given, config.store)
    if config.labels is not None:
        rows = read_answers(path, "label", LABEL_WORDS)
        known = pa.array([key for key, row in rows.items() if row["label"] == REAL], pa.string())
    elif config.real is not None and exists(path / "_run.json"):
        run, scored = open_finished(path, "score or evaluate"), describe_bundle(run)
        if describe_bundle(run) != scored:
            raise UsageError(
                f"--real {config.real}: scores of another detector or precision than those of"
                f" {config.src}; score the REAL images with the same --bundle and --precision"
            )
    elif config.real is not None:
        known = pa.array([row["key"] for _, row in read_keyed_rows(path, ())], pa.string()).unique()
    found: dict[str | None, list[Scores]] = defaultdict(list)
    num_known = 0
    for table in read_score_tables(run):
        if known is not None:
            chosen = pc.is_valid(find_keys(table.column("key"), known))
            num_known += pc.sum(chosen).as_py() or 0
        elif config.real is not None:
            chosen = pc.not_equal(pc.fill_null(table.column("label"), REAL), FAKE)
        else:
            chosen = pc.equal(table.column("label"), REAL)
        table = table.filter(pc.and_(chosen, pc.is_valid(table.column("p_fake"))))
        names = read_groups(table, config.by) if config.by else pa.nulls(len(table), pa.string())
        for name in pc.unique(names).to_pylist():
            rows = pc.is_null(names) if name is None else pc.fill_null(pc.equal(names, name), False)
            found[name].append(table.column("p_fake").filter(rows).to_numpy())
        if len(found) > MAX_GROUPS:
            raise UsageError(f"--by {config.by}: more than {MAX_GROUPS:,} values; name another")
    if known is not None and num_known < len(known):
        message = f"{len(known) - num_known:,} of {len(known):,} REAL keys are not in {run.out}"
        if not num_known:
            raise UsageError(f"{path}: {message}; keys are those of the column `key` there")
        log(f"decide: {message}")
    return {name: np.concatenate(scores) for name, scores in found.items()}
