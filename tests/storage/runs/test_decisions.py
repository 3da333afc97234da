"""decide: every key once, by thresholds from REAL images; what a person settled stays settled."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from computer import disturb_every_change

from cifake_ray.config import DecideConfig, ExportConfig
from cifake_ray.core.evaluation.fit_policy import fit_cut
from cifake_ray.core.schema import FAKE, MANIFEST_FIELDS, REAL, SCORE_FIELDS
from cifake_ray.errors import CifakeError, RunMismatch, StorageError, UsageError
from cifake_ray.report.decide_text import describe_decisions
from cifake_ray.storage.io.paths import resolve_path
from cifake_ray.storage.runs.decisions import decide_scores
from cifake_ray.storage.runs.export import export_scores
from cifake_ray.storage.runs.finish import finish_run
from cifake_ray.storage.runs.policy_file import encode_policy, read_policy
from cifake_ray.storage.runs.run_plan import RunPlan
from cifake_ray.storage.runs.shards import commit_shard
from cifake_ray.storage.runs.verify import verify_files
from cifake_ray.storage.sources.source import Listing

Row = dict[str, Any]


def make_rows(count: int = 400) -> list[Row]:
    """REAL and FAKE of two sources and of none; one image is unreadable."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "key": f"{number}.jpg",
            "p_fake": float(np.float32(rng.random() ** (3 - 2 * (number % 2)))),
            "label": number % 2,
            "source": ("camera", "phone", None)[number % 3],
            "error": None,
        }
        for number in range(count)
    ]
    return [*rows, {"key": "bad.jpg", "error": "empty", "label": REAL, "source": "camera"}]


def make_scores(
    out: Path, rows: Sequence[Row], *, bundle: str = "b1", command: str = "score"
) -> Path:
    """A finished run of score with these rows, in shards of 150."""
    fields = [*MANIFEST_FIELDS]
    keys = [{"key": row["key"], "size_bytes": 1} for row in rows]
    batch = pa.RecordBatch.from_pylist(keys, pa.schema(fields))
    listing = Listing(batch.slice(start, 150) for start in range(0, len(rows), 150))
    listing.keeps_order = True
    settings = {"bundle": bundle, "precision": "float32"}
    plan = RunPlan(
        out=out,
        command=command,
        settings=settings,
        config={"src": str(out.parent / "photos")},
        list_source=lambda: listing,
        shard_rows=None,
    )
    run = plan.open()
    parts = []
    for shard, start in enumerate(range(0, len(rows), 150)):
        table = pa.Table.from_pylist(list(rows[start : start + 150]), pa.schema(SCORE_FIELDS))
        parts.append(commit_shard(run, shard, table, {"bundle": bundle}, {}))
    finish_run(run, parts, {})
    return out


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_scores(tmp_path_factory.mktemp("scores") / "scores", make_rows())


def decide(scores: Path, out: Path, **options: Any) -> dict[str, Any]:
    if "policy" not in options:
        options = {"target_fpr": 0.1, **options}
    config = DecideConfig(src=str(scores), out=str(out), **options)
    return decide_scores(config, out, scores, lambda message: None)


def read_decisions(out: Path) -> dict[str, Row]:
    rows = pq.read_table(out / "decisions").to_pylist()
    found = {row["key"]: row for row in rows}
    assert len(found) == len(rows) == len(make_rows())
    return found


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_each_key_is_decided_as_its_threshold_says(scores: Path, tmp_path: Path) -> None:
    summary = decide(scores, tmp_path / "out", by="source")
    cuts = {}
    for source in ("camera", "phone"):
        real = [r for r in make_rows() if (r["source"], r["label"]) == (source, REAL)]
        scored = np.array([r["p_fake"] for r in real if r["error"] is None], np.float32)
        cuts[source] = fit_cut(scored, 0.1, 0.95)
    policy = read_policy(str(tmp_path / "out"))
    assert policy.groups == cuts
    found = read_decisions(tmp_path / "out")
    for row in make_rows():
        cut, decision = cuts.get(row["source"]), found[row["key"]]
        high, low = (cut.threshold, cut.unsure_from) if cut else policy.others
        assert (decision["threshold"], decision["unsure_from"]) == (
            np.float32(high),
            np.float32(low),
        )
        assert decision["bundle"] == "b1"
        assert decision["decided_by"] == policy.id == summary["policy"]
        p_fake = row.get("p_fake")
        wanted = "unsure" if p_fake is None or low <= p_fake < high else "REAL"
        wanted = "FAKE" if p_fake is not None and p_fake >= high else wanted
        assert (decision["verdict"], decision["p_fake"]) == (wanted, p_fake)
    for verdict in ("FAKE", "REAL", "unsure"):
        assert summary[verdict] == [d["verdict"] for d in found.values()].count(verdict)
    text = "\n".join(describe_decisions(summary))
    assert "camera: FAKE from" in text
    assert "fewer than 5" in text
    assert "1 of them unreadable" in text


def test_real_images_may_be_named_in_four_ways(scores: Path, tmp_path: Path) -> None:
    real = [row for row in make_rows() if row["label"] == REAL]
    keys = write(tmp_path / "keys.txt", "".join(f"{row['key']}\n" for row in real))
    lines = [f"{row['key']},{('Real', 'fake')[row['label']]}\n" for row in make_rows()]
    labels = write(tmp_path / "labels.csv", "Key,label\n" + "".join(lines))
    pq.write_table(pa.table({"key": [row["key"] for row in real]}), tmp_path / "keys.parquet")
    apart = make_scores(tmp_path / "apart", [{**row, "label": None} for row in real])
    ways: list[dict[str, Any]] = [
        {},
        {"real": keys},
        {"labels": labels},
        {"real": str(tmp_path / "keys.parquet")},
        {"real": str(apart)},
    ]
    ids = {decide(scores, tmp_path / str(n), **way)["policy"] for n, way in enumerate(ways)}
    assert len(ids) == 1
    again = decide(scores, tmp_path / "again", policy=str(tmp_path / "0"))
    assert {again["policy"]} == ids
    assert again["target_fpr"] == 0.1


def test_what_a_person_settled_stays_settled(scores: Path, tmp_path: Path) -> None:
    out, first = tmp_path / "out", tmp_path / "first.csv"
    write(first, "key,verdict,by,note\n0.jpg,fake,ann,odd hands\n2.jpg,REAL,,\nnew.jpg,fake,bo,\n")
    summary = decide(scores, out, settled=str(first))
    assert (summary["settled"], summary["settled_elsewhere"]) == (2, 1)
    assert decide(scores, out)["shards_resumed"] == 3  # a rerun needs not name them again
    decide(scores, out, target_fpr=0.2)  # nor one with other thresholds
    found = read_decisions(out)
    row = found["0.jpg"]
    assert (row["verdict"], row["decided_by"], row["note"]) == ("FAKE", "ann", "odd hands")
    assert (found["2.jpg"]["verdict"], found["2.jpg"]["decided_by"]) == ("REAL", "a person")
    pq.write_table(
        pa.table({"key": ["0.jpg", "2.jpg"], "verdict": ["", "unsure"]}), tmp_path / "x.parquet"
    )
    decide(scores, out, target_fpr=0.2, settled=str(tmp_path / "x.parquet"))
    found = read_decisions(out)
    assert found["0.jpg"]["decided_by"].startswith("policy-")
    assert found["2.jpg"]["verdict"] == "unsure"
    more = [*make_rows(), {"key": "new.jpg", "p_fake": 0.0, "label": REAL}]
    make_scores(tmp_path / "more", more)
    assert decide(tmp_path / "more", out)["settled_elsewhere"] == 0
    rows = {row["key"]: row for row in pq.read_table(out / "decisions").to_pylist()}
    assert (rows["new.jpg"]["verdict"], rows["new.jpg"]["decided_by"]) == ("FAKE", "bo")


@pytest.mark.parametrize("option", ["settled", "labels", "real"])
def test_keys_may_be_as_csv_exports_write_them(tmp_path: Path, option: str) -> None:
    keys = ["=a.jpg", "-b.jpg", "'=c.jpg", " @d.jpg"]
    odd = [{"key": key, "p_fake": 0.1, "label": FAKE} for key in keys]
    scores = make_scores(tmp_path / "scores", [*make_rows(), *odd])
    exported, given = tmp_path / "scores.csv", tmp_path / "given.csv"
    config = ExportConfig(src=str(scores), file=str(exported), columns=("key",))
    export_scores(scores, exported, config)
    lines = exported.read_text().splitlines()[-len(keys) :]
    rows = [f"{line},REAL,REAL\n" for line in lines]
    given.write_text("".join(["key,verdict,label\n", *rows]))
    if option == "settled":
        assert decide(scores, tmp_path / "out", settled=str(given))["settled"] == len(keys)
    else:
        summary = decide(scores, tmp_path / "out", **{option: str(given)}, target_fpr=0.6)
        assert summary["overall"]["num_real"] == len(keys)


def test_only_what_changed_is_written_again(scores: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    decide(scores, out)
    before = read_decisions(out)
    part = out / "decisions" / "part-00001.parquet"
    data = part.read_bytes()
    for damage in (b"", data[:-9], data[:200] + bytes([data[200] ^ 1]) + data[201:]):
        part.write_bytes(damage)
        assert decide(scores, out)["shards_resumed"] == 2
        assert read_decisions(out) == before
    fewer = make_scores(tmp_path / "fewer", make_rows()[:300])
    assert decide(fewer, out)["shards_total"] == 2
    assert len(pq.read_table(out / "decisions")) == 300


def test_anything_may_happen_at_any_change_of_decisions(scores: Path, tmp_path: Path) -> None:
    out, settled = tmp_path / "out", write(tmp_path / "s.csv", "key,verdict\n0.jpg,fake\n")
    wanted, before = tmp_path / "wanted", tmp_path / "before"
    decide(scores, before)
    decide(scores, wanted, by="source", settled=settled)

    def prepare() -> None:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(before, out)

    def check_half() -> None:
        if (out / "_SUCCESS").exists():  # then it is one or the other
            policy = json.loads((out / "_SUCCESS").read_text())["policy"]
            known = {read_policy(str(path)).id: path for path in (before, wanted)}[policy]
            assert read_decisions(out) == read_decisions(known)

    def check_whole(may_leave_files: bool) -> None:
        assert read_decisions(out) == read_decisions(wanted)
        assert read_policy(str(out)) == read_policy(str(wanted))

    num_changes = disturb_every_change(
        lambda: decide(scores, out, by="source", settled=settled),
        prepare=prepare,
        check_half=check_half,
        check_whole=check_whole,
    )
    assert num_changes > 10


@pytest.mark.parametrize(
    ("options", "text", "error"),
    [
        ({"target_fpr": 0.001}, "", "that takes 2,995; give more, or --target-fpr 0.015 or above"),
        ({"by": "camera"}, "", "thresholds by 'camera': there is no such column, only key"),
        ({"real": "FILE"}, "key\n", "0 REAL images cannot promise"),
        ({"real": "FILE", "confidence": 0.999}, "key\n", "with 99.9% confidence"),
        ({"real": "FILE"}, "key\nx.jpg\n", "1 of 1 REAL keys are not in"),
        ({"real": "FILE"}, "name,size\nx.jpg,3\n", "call the column of keys `key`"),
        ({"real": "FILE.gone"}, "", "No such file"),
        ({"labels": "FILE"}, "key\n1.jpg\n", "give the columns key and label"),
        ({"labels": "FILE"}, "key,label\n1.jpg,maybe\n", "line 2: label is 'maybe'; give real"),
        ({"labels": "FILE"}, "key,label\n1.jpg,0\n1.jpg,1\n", "line 3: '1.jpg' has another label"),
        ({"labels": "FILE"}, "key,label\n,1\n", "line 2: no key"),
        ({"settled": "FILE"}, "key,verdict\n1.jpg,sure\n", "line 2: verdict is 'sure'"),
        ({"settled": "FILE"}, "\0\1\2", "no column"),
        ({"policy": "FILE"}, "{}", "not a policy of decide"),
        ({"policy": "FILE"}, "[1", "not valid JSON"),
    ],
)
def test_a_wrong_request_is_told_and_changes_nothing(
    scores: Path, tmp_path: Path, options: dict[str, str], text: str, error: str
) -> None:
    file = write(tmp_path / "x.csv", text)
    out = tmp_path / "out"
    decide(scores, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    given = {n: v.replace("FILE", file) if isinstance(v, str) else v for n, v in options.items()}
    with pytest.raises((UsageError, StorageError), match=error.replace("(", r"\(")):
        decide(scores, out, **given)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_other_folders_and_other_detectors_are_refused(scores: Path, tmp_path: Path) -> None:
    other = make_scores(tmp_path / "other", make_rows(), bundle="b2")
    out = tmp_path / "out"
    wrong: list[tuple[type[CifakeError], Path, Path, dict[str, Any], str]] = [
        (UsageError, scores, out, {"real": str(other)}, "scores of another detector"),
        (UsageError, scores, scores, {}, "beside"),
        (UsageError, scores, scores / "decisions", {}, "beside"),
        (RunMismatch, scores, other, {}, "'score' there, 'decide' here"),
        (StorageError, out, tmp_path / "new", {}, "no _run.json; give the output of score or"),
        (UsageError, scores, scores.parent / "photos" / "out", {}, "lies inside the source"),
    ]
    for kind, src, to, options, message in wrong:
        with pytest.raises(kind, match=message):
            decide(src, to, **options)
    assert verify_files(other) == verify_files(scores) == []
    (tmp_path / "mine" / "decisions").mkdir(parents=True)
    write(tmp_path / "mine" / "decisions" / "part-00000.parquet", "mine")
    with pytest.raises(RunMismatch, match="no output of decide"):
        decide(scores, tmp_path / "mine")
    decide(other, out)
    with pytest.raises(UsageError, match=r"is for the scores of b2 in float32, .* has b1"):
        decide(scores, tmp_path / "new", policy=str(out))
    with pytest.raises(StorageError, match="or decide again, which mends its files"):
        verify_files(out)
    (scores / "_SUCCESS").rename(scores / "kept")
    with pytest.raises(StorageError, match="has not finished"):
        decide(scores, tmp_path / "new")
    (scores / "kept").rename(scores / "_SUCCESS")


def test_damaged_verdicts_of_persons_are_told_and_not_lost(scores: Path, tmp_path: Path) -> None:
    settled = write(tmp_path / "settled.csv", "key,verdict\n0.jpg,fake\n")
    decide(scores, tmp_path / "out", settled=settled)
    (tmp_path / "out" / "_settled.parquet").write_bytes(b"PAR1")
    with pytest.raises(StorageError, match="give them again with --settled"):
        decide(scores, tmp_path / "out")
    assert read_decisions(tmp_path / "out")["0.jpg"]["decided_by"] == "a person"


def test_an_edited_policy_is_told(scores: Path, tmp_path: Path) -> None:
    decide(scores, tmp_path / "out")
    policy = read_policy(str(tmp_path / "out"))
    record = json.loads(encode_policy(policy))
    record["overall"]["unsure_from"] = 0.0
    file = write(tmp_path / "policy.json", json.dumps(record))
    with pytest.raises(UsageError, match="it was edited: take out the id"):
        read_policy(file)
    del record["id"]
    assert read_policy(write(tmp_path / "policy.json", json.dumps(record))).id != policy.id
    record["overall"]["threshold"] = 2.0
    with pytest.raises(UsageError, match="from 0 to 1"):
        read_policy(write(tmp_path / "policy.json", json.dumps(record)))


@pytest.mark.parametrize(
    "options",
    [
        {"target_fpr": 0.0},
        {"target_fpr": 1.0},
        {"confidence": 1.0},
        {"confidence": 0.4},
        {"unsure_fpr": 0.001},
        {"real": "a", "labels": "b"},
        {"policy": "p", "by": "source"},
        {"policy": "p", "confidence": 0.9},
        {"target_fpr": float("nan")},
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--"):
        DecideConfig(src="a", out="b", **options)


def test_a_bucket_takes_decisions(scores: Path) -> None:
    out = resolve_path("memory://decisions/out")
    config = DecideConfig(src=str(scores), out=str(out), target_fpr=0.1)
    assert decide_scores(config, out, scores, print)["shards_resumed"] == 0
    assert decide_scores(config, out, scores, print)["shards_resumed"] == 3
    assert FAKE in {row["label"] for row in make_rows()}
