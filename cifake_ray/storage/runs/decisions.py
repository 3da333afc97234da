"""Write the output of `decide`: a verdict for each key, from stored scores and from persons.

Each file of decisions belongs to one of scores, and its footer says of what it was made: a rerun
writes those that would be others, such as after `score --extend`.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cifake_ray.config import DecideConfig, fingerprint_settings
from cifake_ray.core.evaluation.policy import Policy, find_verdicts
from cifake_ray.core.schema import (
    FOOTER_KEY,
    LABEL_NAMES,
    SCHEMA_VERSION,
    SCORE_FIELDS,
    shard_name,
)
from cifake_ray.errors import RunMismatch, StorageError, UsageError
from cifake_ray.storage.io.files import (
    discard,
    exists,
    hash_json,
    list_folder,
    make_folder,
    read_if_exists,
    remove,
    remove_leftovers,
    sync_folder,
    write_bytes,
    write_json,
)
from cifake_ray.storage.io.paths import AnyPath, is_inside, resolve_path
from cifake_ray.storage.io.records import PARQUET_ERRORS, parse_record
from cifake_ray.storage.runs.keyed_rows import find_keys, read_answers
from cifake_ray.storage.runs.policy_file import (
    POLICY_NAME,
    check_bundle,
    describe_bundle,
    encode_policy,
    fit_policy,
    read_policy,
)
from cifake_ray.storage.runs.run import Run, read_record
from cifake_ray.storage.runs.shards import encode_shard, open_shard, read_shard
from cifake_ray.storage.runs.train_run import RunFolder
from cifake_ray.storage.runs.verify import SHARD_NAME, open_finished, read_files
from cifake_ray.storage.sources.open_source import check_outside

RESULTS = "decisions"
SETTLED_NAME = "_settled.parquet"
THREADS = 8  # so many shards in memory; mostly the store is waited for
VERDICTS = ("REAL", "FAKE", "unsure")
VERDICT_WORDS = {
    **{verdict.lower(): verdict for verdict in VERDICTS},
    **{"0": "REAL", "1": "FAKE", "": ""},  # an empty one takes the verdict back
}
DECISION_FIELDS = [
    pa.field("key", pa.string(), nullable=False),
    pa.field("verdict", pa.string(), nullable=False),
    pa.field("p_fake", pa.float32()),
    pa.field("threshold", pa.float32()),  # FAKE from here on
    pa.field("unsure_from", pa.float32()),  # REAL below
    pa.field("bundle", pa.string()),
    pa.field("decided_by", pa.string(), nullable=False),  # the id of the policy, or a person
    pa.field("note", pa.string()),
]
SETTLED_FIELDS = [pa.field(name, pa.string()) for name in ("key", "verdict", "by", "note")]


@dataclass(frozen=True)
class _Summary:
    policy: str


@dataclass(frozen=True)
class DecideFolder(RunFolder):
    """The folder OUT of `decide`."""

    command = "decide"
    summary = _Summary

    def has_begun(self) -> bool:
        return False  # other settings take the place of those before: nothing is scored for them

    def check_new(self) -> None:
        """Raise RunMismatch when decisions would be written among files of others."""
        there = [path for path in list_folder(self.path / RESULTS) if path.name[0] != "."]
        if there and not exists(self.path / "_run.json"):
            raise RunMismatch(
                f"{there[0]} is where decide would write, but {self.path} is no output of decide;"
                " choose a new output folder"
            )


@dataclass(frozen=True)
class _Footer:
    """What the footer of a file of decisions says."""

    made_of: str
    rows: int
    counts: dict[str, int]


def decide_scores(
    config: DecideConfig, out: AnyPath, scores: AnyPath, log: Callable[[str], None]
) -> dict[str, Any]:
    """Decide each key of finished scores; return the summary.

    UsageError, RunMismatch or StorageError when that is impossible; OUT is then as it was.
    """
    started_s = time.monotonic()
    run = open_finished(scores, "score or evaluate")
    if run.command not in ("score", "evaluate"):
        raise UsageError(f"{scores} is the output of {run.command}; give that of score or evaluate")
    if is_inside(out, scores) or is_inside(scores, out):
        raise UsageError(f"{out}: choose a folder for decisions that is beside {scores}")
    if isinstance(source := run.config.get("src"), str):
        check_outside(out, resolve_path(source, config.store))
    policy = (
        fit_policy(run, config, log)
        if config.policy is None
        else read_policy(config.policy, config.store)
    )
    check_bundle(policy, *describe_bundle(run), scores)
    new = {}
    if config.settled is not None:
        path = resolve_path(config.settled, config.store)
        new = read_answers(path, "verdict", VERDICT_WORDS, ("by", "note"))
    files, folder = read_files(run), DecideFolder(out)
    with folder.lock():
        folder.check_new()
        settled = {key: row for key, row in (read_settled(out) | new).items() if row["verdict"]}
        settled = dict(sorted(settled.items()))
        made_of = {
            "policy": policy.id,
            "settled": hash_json(list(settled.values())),
            "scores": [row["sha256"] for row in files],
        }
        identity = hash_json(made_of)
        settings = fingerprint_settings(config) | made_of | {"scores": str(scores)}
        folder.open(settings, settings)
        success = read_if_exists(out / "_SUCCESS")
        if success is None or identity.encode() not in success:
            remove(out / "_SUCCESS")
        write_bytes(out / SETTLED_NAME, encode_shard(_make_settled_table(settled), {}))
        write_bytes(out / POLICY_NAME, encode_policy(policy))
        decider = _Decider(out, run, policy, settled)
        make_folder(out / RESULTS, parents=False)
        with ThreadPoolExecutor(THREADS) as pool:
            found = list(pool.map(decider.decide_shard, range(len(files)), files))
        names = {shard_name(number) for number in range(len(files))}
        for path in list_folder(out / RESULTS):  # of scores that had more shards
            if SHARD_NAME.fullmatch(path.name) and path.name not in names:
                discard(path)
        sync_folder(out / RESULTS)
        remove_leftovers(out)
        counts = sum((footer for footer, _ in found), Counter[str]())
        summary = {
            "command": "decide",
            "out": str(out),
            "listed": sum(row["rows"] for row in files),
            **_describe_counts(counts, len(settled)),
            **_describe_policy(policy, out),
            "shards_total": len(files),
            "shards_resumed": sum(was_there for _, was_there in found),
            "elapsed_s": round(time.monotonic() - started_s, 3),
        }
        if read_record(out)["settings"].get("policy") != policy.id:
            raise StorageError(f"{out}: another process has replaced it; run one at a time")
        write_json(out / "_SUCCESS", {"schema_version": SCHEMA_VERSION, "run": identity, **summary})
    return summary


def _describe_counts(counts: Counter[str], num_settled: int) -> dict[str, Any]:
    return {
        **{verdict: counts[verdict] for verdict in VERDICTS},
        "errors": counts["error"],
        "settled": counts["settled"],
        "settled_elsewhere": num_settled - counts["settled"],
        "labelled": {name: n for name, n in sorted(counts.items()) if " called " in name},
    }


def _describe_policy(policy: Policy, out: AnyPath) -> dict[str, Any]:
    facts = policy.to_dict()
    return {
        "policy": policy.id,
        "policy_file": str(out / POLICY_NAME),
        **{name: value for name, value in facts.items() if name not in ("bundle", "precision")},
        "others": dict(zip(("threshold", "unsure_from"), policy.others, strict=True)),
    }


def read_settled(out: AnyPath) -> dict[str, dict[str, str]]:
    """Return what persons have decided, by key: verdict, by, note."""
    path = out / SETTLED_NAME
    if not exists(path):
        return {}
    try:
        rows = read_shard(path, SETTLED_FIELDS).to_pylist()
    except StorageError as error:
        raise StorageError(
            f"{path}: damaged; put back a copy, or remove it and give them again with --settled"
        ) from error
    return {row["key"]: row for row in rows}


def _make_settled_table(settled: Mapping[str, dict[str, str]]) -> pa.Table:
    return pa.Table.from_pylist(list(settled.values()), pa.schema(SETTLED_FIELDS))


class _Decider:
    """Decides the shards of a run by a policy, but what persons have settled."""

    def __init__(
        self, out: AnyPath, run: Run, policy: Policy, settled: Mapping[str, dict[str, str]]
    ) -> None:
        self.out, self.run, self.policy = out, run, policy
        self.settled = _make_settled_table(settled)
        self.made_of = hash_json([policy.id, list(settled.values())])

    def decide_shard(self, number: int, file: dict[str, Any]) -> tuple[Counter[str], bool]:
        """Write a file of decisions; return its counts, and whether it was there already."""
        path, made_of = self.out / RESULTS / shard_name(number), f"{self.made_of}-{file['sha256']}"
        if (found := _inspect(path, made_of)) is not None:
            return found, True
        scores = read_shard(self.run.out / file["name"], SCORE_FIELDS)
        table, counts = self._decide(scores)
        footer = {
            "schema_version": SCHEMA_VERSION,
            "made_of": made_of,
            "rows": table.num_rows,
            "counts": counts,
        }
        write_bytes(path, encode_shard(table, footer), force_name=False)
        return counts, False

    def _decide(self, scores: pa.Table) -> tuple[pa.Table, Counter[str]]:
        is_fake = find_verdicts(scores, 0.0, self.policy)
        threshold, unsure_from = self.policy.find_bounds(scores)
        verdict = pc.fill_null(pc.if_else(is_fake, "FAKE", "REAL"), "unsure")
        place = find_keys(scores.column("key"), self.settled.column("key").combine_chunks())
        by_person = {
            name: self.settled.column(name).take(place.combine_chunks())
            for name in ("verdict", "by", "note")
        }
        is_settled = pc.is_valid(place)
        person = pc.if_else(pc.equal(by_person["by"], ""), "a person", by_person["by"])
        columns = {
            "verdict": pc.if_else(is_settled, by_person["verdict"], verdict),
            "threshold": pa.array(threshold),
            "unsure_from": pa.array(unsure_from),
            "bundle": pa.repeat(self.policy.bundle, len(scores)),
            "decided_by": pc.if_else(is_settled, person, self.policy.id),
            "note": pc.if_else(pc.equal(by_person["note"], ""), None, by_person["note"]),
        }
        columns |= {name: scores.column(name) for name in ("key", "p_fake")}
        arrays = [columns[field.name] for field in DECISION_FIELDS]
        table = pa.table(arrays, schema=pa.schema(DECISION_FIELDS))
        verdicts = table.column("verdict").to_pylist()
        counts = Counter(verdicts)
        counts["settled"] = pc.sum(is_settled).as_py() or 0
        counts["error"] = len(scores.column("error").drop_null())
        said = zip(scores.column("label").to_pylist(), verdicts, strict=True)
        counts.update(f"{LABEL_NAMES[n]} called {verdict}" for n, verdict in said if n is not None)
        return table, counts


def _inspect(path: AnyPath, made_of: str) -> Counter[str] | None:
    """Return the counts of a file of decisions; None if it must be written."""
    if (data := read_if_exists(path)) is None:
        return None
    try:
        part = open_shard(data)
        footer = parse_record(
            _Footer, json.loads((part.schema_arrow.metadata or {}).get(FOOTER_KEY, b"{}"))
        )
        is_whole = footer.made_of == made_of and part.read().num_rows == footer.rows
    except PARQUET_ERRORS:
        return None
    return Counter(footer.counts) if is_whole else None
