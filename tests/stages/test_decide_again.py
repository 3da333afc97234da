"""score with another --target-fpr on finished scores: other verdicts, nothing scored again."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from computer import disturb_every_change

from cifake_ray.config import ScoreConfig
from cifake_ray.core.evaluation.calibration import compute_p_fake
from cifake_ray.core.evaluation.policy import Cut, Policy, set_verdicts
from cifake_ray.core.schema import SCORE_FIELDS
from cifake_ray.errors import RunMismatch, StorageError, UsageError
from cifake_ray.report.summary_text import split_summary
from cifake_ray.stages import score
from cifake_ray.stages.batch import driver
from cifake_ray.stages.batch.shard_worker import ShardReport, WorkerTask
from cifake_ray.stages.batch.summary import BatchSummary
from cifake_ray.stages.resources import Placement
from cifake_ray.storage.bundles.built_ins import locate_bundle
from cifake_ray.storage.bundles.bundle import BundleInfo, read_bundle_info
from cifake_ray.storage.runs.manifest import read_manifest_shard
from cifake_ray.storage.runs.policy_file import encode_policy, read_policy
from cifake_ray.storage.runs.run import Run, read_run
from cifake_ray.storage.runs.shards import FOOTER_KEY, commit_shard, describe_threshold
from cifake_ray.storage.runs.verify import verify_files

NUM_IMAGES = 10
CALLED_FAKE = {"default": 5, "fpr_0.01": 3, "fpr_0.001": 2}
BUNDLE = read_bundle_info(locate_bundle(None))
CALIBRATION = replace(
    BUNDLE.calibration, temperature=1.0, threshold=0.5, threshold_fpr_1=0.75, threshold_fpr_01=0.9
)


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Score without Ray: one worker here, which gives `N.jpg` the logit N - 5."""

    def read_bundle(path: Path, **options: Any) -> BundleInfo:
        return replace(BUNDLE, calibration=CALIBRATION)

    @contextmanager
    def start_pool(placement: Placement, module: str) -> Iterator[Any]:
        yield SimpleNamespace(report_shards=report_shards, follow_listing=iter, num_workers=1)

    def report_shards(task: WorkerTask) -> Iterator[ShardReport]:
        run: Run = task.run
        made: Any = task.make_processor
        for shard in range(run.manifest.num_shards):
            rows = read_manifest_shard(run.manifest_folder, run.find_file(shard), shard)
            keys = rows.column("key").to_pylist()
            logit = np.array([int(key[0]) - 5 for key in keys], np.float32)
            p_fake = compute_p_fake(logit, 1.0)
            error = np.array([key == "3.jpg" for key in keys])
            known = {
                "key": pa.array(keys),
                "logit": pa.array(logit, mask=error),
                "p_fake": pa.array(p_fake, mask=error),
                "error": pa.array(["empty"] * len(keys), mask=~error),
            }
            columns = [known.get(f.name, pa.nulls(len(keys), f.type)) for f in SCORE_FIELDS]
            table = pa.table(columns, schema=pa.schema(SCORE_FIELDS))
            table = set_verdicts(table, made.threshold, made.policy)
            extra = {
                "bundle": BUNDLE.fingerprint,
                "preprocessing": "{}",
                "precision": made.precision,
                **describe_threshold(made.threshold, made.policy),
                "thresholds": json.dumps(made.bundle.list_thresholds()),
            }
            stats = commit_shard(run, shard, table, extra, {"any": 0})
            yield ShardReport(stats=stats, worked=len(keys), retried=False)

    monkeypatch.setattr(score, "read_bundle_info", read_bundle)
    monkeypatch.setattr(driver, "runs_here", lambda *args: True)
    monkeypatch.setattr(driver, "LocalPool", start_pool)
    monkeypatch.setattr(driver, "watch_progress", lambda reports, *args: reports)


@pytest.fixture
def src(tmp_path: Path) -> Path:
    folder = tmp_path / "src"
    folder.mkdir()
    for number in range(NUM_IMAGES):
        (folder / f"{number}.jpg").write_bytes(b"x")
    return folder


def run_score(src: Path, out: Path, **options: Any) -> BatchSummary:
    config = ScoreConfig(src=str(src), out=str(out), shard_size=4, precision="float32", **options)
    bundle = locate_bundle(None)
    result = score.score_images(config, src, out, bundle, lambda _: None, time.monotonic())
    assert isinstance(result, BatchSummary)
    return result


def forbid_scoring(monkeypatch: pytest.MonkeyPatch) -> None:
    def start_pool(*args: Any) -> Any:
        raise AssertionError("scored again")

    monkeypatch.setattr(driver, "LocalPool", start_pool)


def read_verdicts(out: Path) -> dict[str, bool | None]:
    rows = pq.read_table(out / "scores").to_pylist()
    assert len(rows) == NUM_IMAGES
    return {row["key"]: row["is_fake"] for row in rows}


@pytest.mark.parametrize("targets", [(None, 0.01), (0.01, None), (None, 0.01, 0.001, None)])
def test_it_leaves_what_scoring_with_that_target_leaves(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, targets: tuple[float | None, ...]
) -> None:
    expected = run_score(src, tmp_path / "a", target_fpr=targets[-1])
    first = run_score(src, tmp_path / "b", target_fpr=targets[0])
    forbid_scoring(monkeypatch)
    for target in targets[1:]:
        summary = run_score(src, tmp_path / "b", target_fpr=target)
        assert verify_files(tmp_path / "b") == []
    assert read_verdicts(tmp_path / "b") == read_verdicts(tmp_path / "a")
    assert (summary.errors, summary.done) == (first.errors, first.done)
    assert summary.called_fake == expected.called_fake == CALLED_FAKE
    assert summary.threshold == expected.threshold
    assert run_score(src, tmp_path / "b", target_fpr=targets[-1]) == summary


def test_only_verdicts_and_footers_change(src: Path, tmp_path: Path) -> None:
    def read_rest() -> tuple[pa.Table, dict[str, Any]]:
        table = pq.read_table(tmp_path / "out" / "scores" / "part-00001.parquet")
        footer = json.loads(table.schema.metadata[FOOTER_KEY])
        return table.drop_columns("is_fake").replace_schema_metadata(None), footer

    run_score(src, tmp_path / "out")
    rows, footer = read_rest()
    run_score(src, tmp_path / "out", target_fpr=0.01)
    new_rows, new_footer = read_rest()
    run = read_run(tmp_path / "out")
    assert run is not None
    assert new_rows == rows
    changed = {"threshold": "0.75", "run": run.identity, "fingerprint": run.fingerprint}
    assert new_footer == footer | changed
    assert footer["fingerprint"] != run.fingerprint
    assert (run.settings["target_fpr"], run.config["target_fpr"]) == (0.01, 0.01)


def test_anything_may_happen_at_any_change_and_it_is_repeated(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_score(src, tmp_path / "first")
    wanted = run_score(src, tmp_path / "wanted", target_fpr=0.01)
    forbid_scoring(monkeypatch)
    monkeypatch.setattr(driver, "DECIDING_THREADS", 1)  # the same order each time
    out, before = tmp_path / "out", read_verdicts(tmp_path / "first")

    def prepare() -> None:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(tmp_path / "first", out)

    def check_half() -> None:
        try:
            is_verified = verify_files(out) == []
        except StorageError:
            is_verified = False
        is_told_old = json.loads((out / "_run.json").read_text())["settings"]["target_fpr"] is None
        if is_verified:  # then it is one or the other, and `_run.json` says which
            assert read_verdicts(out) == (
                before if is_told_old else read_verdicts(tmp_path / "wanted")
            )

    def check_whole(may_leave_files: bool) -> None:
        assert run_score(src, out, target_fpr=0.01).called_fake == wanted.called_fake
        assert read_verdicts(out) == read_verdicts(tmp_path / "wanted")
        assert verify_files(out) == []

    num_changes = disturb_every_change(
        lambda: run_score(src, out, target_fpr=0.01),
        prepare=prepare,
        check_half=check_half,
        check_whole=check_whole,
    )
    assert num_changes > 20


@pytest.fixture
def policy(tmp_path: Path) -> str:
    """FAKE from 0.9 on, and unsure from 0.6 on; `N.jpg` has the logit N - 5."""
    cut = Cut(0.9, 0.6, 100, 1, (0.0, 0.1))
    chosen = Policy(
        bundle=BUNDLE.identify("float32"),
        precision="float32",
        target_fpr=0.01,
        confidence=0.95,
        overall=cut,
        by="source",
        groups={"nowhere": cut},
    )
    (tmp_path / "policy.json").write_bytes(encode_policy(chosen))
    return str(tmp_path / "policy.json")


def test_a_policy_decides_when_scoring_and_afterwards(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    expected = run_score(src, tmp_path / "a", policy=policy)
    run_score(src, tmp_path / "b")
    plain = read_verdicts(tmp_path / "b")
    forbid_scoring(monkeypatch)
    summary = run_score(src, tmp_path / "b", policy=policy)
    verdicts = read_verdicts(tmp_path / "b")
    assert verdicts == read_verdicts(tmp_path / "a")
    assert [verdicts[f"{n}.jpg"] for n in (3, 5, 6, 7, 8)] == [None, False, None, None, True]
    assert summary.called_fake == expected.called_fake == CALLED_FAKE | {"policy": 2}
    assert (summary.policy, summary.threshold) == (read_policy(policy).id, None)
    assert f"Called FAKE: 22.2% by {summary.policy};" in split_summary(asdict(summary))[0][0]
    assert verify_files(tmp_path / "b") == []
    assert run_score(src, tmp_path / "b", policy=policy) == summary
    run_score(src, tmp_path / "b")
    assert read_verdicts(tmp_path / "b") == plain


def test_a_policy_for_other_scores_is_refused(src: Path, tmp_path: Path, policy: str) -> None:
    run_score(src, tmp_path / "out")
    other = replace(read_policy(policy), bundle="other", precision="bf16")
    Path(policy).write_bytes(encode_policy(other))
    with pytest.raises(UsageError, match=r"is for the scores of other in bf16, .* --precision"):
        run_score(src, tmp_path / "out", policy=policy)
    with pytest.raises(UsageError, match="give one of them"):
        run_score(src, tmp_path / "out", policy=policy, target_fpr=0.01)
    assert verify_files(tmp_path / "out") == []


def test_what_may_be_decided_again_is_no_reason_to_refuse(src: Path, tmp_path: Path) -> None:
    run_score(src, tmp_path / "out")
    with pytest.raises(RunMismatch, match="exclude: ") as refused:
        run_score(src, tmp_path / "out", target_fpr=0.01, exclude=("1*",))
    assert "target_fpr" not in str(refused.value)


def test_a_run_that_has_not_finished_keeps_its_settings(src: Path, tmp_path: Path) -> None:
    run_score(src, tmp_path / "out")
    (tmp_path / "out" / "_SUCCESS").unlink()
    with pytest.raises(
        RunMismatch, match=r"target_fpr: not given there, 0\.01 here.*finish it with its own"
    ):
        run_score(src, tmp_path / "out", target_fpr=0.01)
    with pytest.raises(RunMismatch, match="belongs to another run"):
        run_score(src, tmp_path / "out", target_fpr=0.01, exclude=("1*",))


def test_a_shard_that_is_damaged_is_scored_again(src: Path, tmp_path: Path) -> None:
    run_score(src, tmp_path / "wanted", target_fpr=0.01)
    run_score(src, tmp_path / "out")
    (tmp_path / "out" / "scores" / "part-00001.parquet").write_bytes(b"PAR1")
    run_score(src, tmp_path / "out", target_fpr=0.01)
    assert read_verdicts(tmp_path / "out") == read_verdicts(tmp_path / "wanted")
    assert verify_files(tmp_path / "out") == []


def test_scores_of_an_earlier_version_too(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BundleInfo, "list_thresholds", lambda bundle: {})
    run_score(src, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "_SUCCESS").read_text())
    for name in ("run", "finished_at", "threshold", "thresholds", "called_fake"):
        del record[name]
    (tmp_path / "out" / "_SUCCESS").write_text(json.dumps(record))
    forbid_scoring(monkeypatch)
    assert run_score(src, tmp_path / "out").called_fake == {}
    assert run_score(src, tmp_path / "out", target_fpr=0.01).called_fake == {}
    assert [key for key, is_fake in sorted(read_verdicts(tmp_path / "out").items()) if is_fake] == [
        "7.jpg",
        "8.jpg",
        "9.jpg",
    ]
    assert verify_files(tmp_path / "out") == []
