"""compare: the same images, what is missing, seeds, and the files it writes."""

from __future__ import annotations

import csv
import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import accuracy_score, roc_auc_score

from cifake_ray.config import CompareConfig, ScoreConfig, list_options
from cifake_ray.errors import StorageError, UsageError
from cifake_ray.pipeline import run_verb
from cifake_ray.report.summary_text import split_summary
from cifake_ray.stages.compare.driver import compare_reports
from cifake_ray.stages.score import score_images
from cifake_ray.storage.bundles.built_ins import locate_bundle

BUILTIN = str(locate_bundle(None))
Change = Callable[[pa.Table], pa.Table]


@pytest.fixture(scope="session")
def scored(sample_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scores of 48 labelled images, in one shard."""
    out = tmp_path_factory.mktemp("compare") / "a"
    source = sample_folder / "train"
    config = ScoreConfig(src=str(source), out=str(out), num_workers=0)
    bundle = locate_bundle(None)
    score_images(config, source, out, bundle, lambda _: None, time.monotonic())
    return out


def copy(scored: Path, out: Path, change: Change, metrics: dict[str, Any] | None = None) -> str:
    """The same run with other rows."""
    shutil.copytree(scored, out)
    (path,) = (out / "scores").glob("*.parquet")
    table = pq.read_table(path)
    pq.write_table(change(table).replace_schema_metadata(table.schema.metadata), path)
    if metrics is not None:
        (out / "metrics.json").write_text(json.dumps(metrics))
    return str(out)


def replace(table: pa.Table, **columns: Any) -> pa.Table:
    for name, values in columns.items():
        index = table.schema.get_field_index(name)
        field = table.schema.field(index)
        table = table.set_column(index, field, pa.array(values, field.type))
    return table


def score_anew(seed: int, skill: float) -> Change:
    """Scores that know the label by `skill`."""

    def change(table: pa.Table) -> pa.Table:
        rng = np.random.default_rng(seed)
        logit = skill * (table["label"].to_numpy() - 0.5) + rng.normal(size=table.num_rows)
        return replace(table, logit=logit, p_fake=1 / (1 + np.exp(-logit)))

    return change


def shuffle(table: pa.Table) -> pa.Table:
    return table.take(np.random.default_rng(0).permutation(table.num_rows))


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def compare(*reports: str, **options: Any) -> dict[str, Any]:
    return compare_reports(CompareConfig(reports=reports, num_bootstrap=50, **options))


def test_rows_are_measured_on_the_shared_images(scored: Path, tmp_path: Path) -> None:
    other = copy(scored, tmp_path / "b", lambda table: shuffle(score_anew(0, 3)(table)).slice(7))
    result = compare(str(scored), other, price_per_hour=0.5)
    assert (result["num_images"], result["left_out"]) == (41, {str(scored): 7})
    theirs = pq.read_table(Path(other) / "scores").to_pydict()
    own = {row["key"]: row for row in pq.read_table(scored / "scores").to_pylist()}
    label, p_fake = np.array(theirs["label"]), np.array(theirs["p_fake"])
    mine = [own[key]["logit"] for key in theirs["key"]]
    aurocs = [roc_auc_score(label, logit) for logit in (mine, theirs["logit"])]
    assert [row["auroc"]["value"] for row in result["rows"]] == pytest.approx(aurocs)
    assert result["rows"][1]["accuracy"]["value"] == accuracy_score(label, p_fake >= 0.5)
    for row in result["rows"]:
        assert row["num_images"] == 41
        assert row["price_of_million"] == pytest.approx(0.5e6 / (row["images_per_s"] * 3600))
    difference = result["rows"][1]["difference"]
    expected = aurocs[1] - aurocs[0]
    assert difference["auroc"]["value"] == pytest.approx(expected)
    assert result["rows"][0]["difference"] is None
    back = compare(str(scored), other, baseline="b")["rows"][0]["difference"]
    assert back["auroc"]["value"] == pytest.approx(-expected)
    assert back["only_ours_right"] == difference["only_baseline_right"]


def test_a_report_adds_what_it_knows(scored: Path, tmp_path: Path) -> None:
    worst = {"worst_cell": "blur_2", "worst_accuracy": {"value": 0.7, "low": 0.6, "high": 0.8}}
    metrics = {"facts": {"Architecture": "small_cnn"}, "grid": worst}
    report = copy(scored, tmp_path / "r", score_anew(1, 2), metrics)
    first, bundle, plain = compare(report, BUILTIN, str(scored))["rows"]
    assert first["worst_cell"] == {"name": "blur_2", "accuracy": 0.7}
    assert first["num_parameters"] == bundle["num_parameters"] == 450_594
    assert first["macs"] == bundle["macs"] > 10**7
    assert first["images_per_s"] is None, "a run with a grid scored each image many times"
    assert (bundle["num_images"], bundle["auroc"]["value"], bundle["difference"]) == (0, None, None)
    assert (plain["num_parameters"], plain["worst_cell"]) == (None, None)
    assert plain["images_per_s"] > 0


def test_reports_of_one_name_are_seeds(scored: Path, tmp_path: Path) -> None:
    words = []
    for name, skill in (("weak", 0), ("strong", 2)):
        for seed in range(3):
            out = copy(scored, tmp_path / f"{name}{seed}", score_anew(seed, skill))
            words.append(f"{name}={out}")
    result = compare(*words, baseline="weak")
    weak, strong = result["rows"]
    assert [row["name"] for row in result["rows"]] == ["weak", "strong"]
    values = [seed["auroc"]["value"] for seed in strong["seeds"]]
    assert strong["auroc"]["value"] == pytest.approx(np.mean(values))
    assert strong["auroc"]["low"] < strong["auroc"]["value"] < strong["auroc"]["high"]
    found = strong["difference"]
    expected = strong["auroc"]["value"] - weak["auroc"]["value"]
    assert found["auroc"]["value"] == pytest.approx(expected)
    assert found["auroc"]["p_value"] < 0.05
    assert "p_value" not in found, "McNemar is for two detectors, not for two groups"
    sentences = "\n".join(split_summary({**result, "out": None})[0])
    assert "strong (3 seeds)" in sentences


def test_files_by_extension(scored: Path, tmp_path: Path) -> None:
    name = "=A_1&<b>"
    other = copy(scored, tmp_path / "b", score_anew(0, 3))
    for extension in ("csv", "html", "json", "tex", "svg"):
        file = tmp_path / f"out.{extension}"
        config = CompareConfig(
            reports=(str(scored), f"{name[1:]}={other}"), num_bootstrap=20, out=str(file)
        )
        result, code = run_verb(config, time.monotonic())
        assert code == 0
        with pytest.raises(UsageError, match="exists"):
            run_verb(config, time.monotonic())
    rows = read_csv(tmp_path / "out.csv")
    assert float(rows[1]["auroc"]) == result["rows"][1]["auroc"]["value"]
    assert float(rows[1]["p_value"]) == result["rows"][1]["difference"]["p_value"]
    read = json.loads((tmp_path / "out.json").read_text())
    assert read["rows"] == result["rows"]
    tex = (tmp_path / "out.tex").read_text()
    assert r"A\_1\&<b>" in tex
    table = tex.partition(r"\toprule")[2].partition(r"\bottomrule")[0]
    columns = {line.count(" & ") for line in table.splitlines() if line.endswith(r"\\")}
    assert columns == {re.search(r"\{l(r+)\}", tex)[1].count("r")}  # type: ignore[index]
    page = (tmp_path / "out.html").read_text()
    assert "A_1&amp;&lt;b&gt;" in page
    assert "<b>" not in page
    assert page.count("<svg") == 1
    assert "reports share" not in page
    assert (tmp_path / "out.svg").read_bytes().startswith(b"<?xml")


def test_names_that_spreadsheets_would_compute_are_quoted(scored: Path, tmp_path: Path) -> None:
    source = "=HYPERLINK(1)"
    change = lambda table: replace(table, source=[source] * 40 + ["x"] * 8)  # noqa: E731
    other = copy(scored, tmp_path / "b", change)
    file = tmp_path / "out.csv"
    run_verb(CompareConfig(reports=(other,), num_bootstrap=20, out=str(file)), time.monotonic())
    (row,) = read_csv(file)
    assert row["worst_source"] == f"'{source}"


def test_wrong_requests(scored: Path, tmp_path: Path) -> None:
    first = str(scored)
    keys = copy(scored, tmp_path / "k", lambda t: replace(t, key=[f"k{n}" for n in range(48)]))
    labels = copy(scored, tmp_path / "l", lambda t: replace(t, label=1 - t["label"].to_numpy()))
    none = copy(scored, tmp_path / "n", lambda t: replace(t, label=[None] * 48))
    nan = copy(scored, tmp_path / "x", lambda t: replace(t, logit=[float("nan")] * 48))
    with pytest.raises(StorageError, match="a score is no number"):
        compare(nan)
    broken = copy(scored, tmp_path / "m", lambda t: t, {"grid": {"worst_cell": 7}})
    for reports, options, message in (
        ((first, keys), {}, "share no image"),
        ((first, labels), {}, "label 48 of the same images otherwise"),
        ((none,), {}, "both a label and a score"),
        ((first, first), {}, "given twice"),
        ((first,), {"baseline": "b"}, "--baseline b: no report has this name.*there are a"),
    ):
        with pytest.raises(UsageError, match=message):
            compare(*reports, **options)
    with pytest.raises(StorageError, match="not the metrics of an evaluation"):
        compare(broken)
    with pytest.raises(StorageError, match=r"no _run\.json"):
        compare(str(tmp_path / "nothing"))
    with pytest.raises(UsageError, match="extension"):
        CompareConfig(reports=(first,), out="x.txt")
    (Path(labels) / "_SUCCESS").unlink()
    with pytest.raises(StorageError, match="has not finished"):
        compare(labels)


def test_names_and_words() -> None:
    config = CompareConfig(reports=("a=x/1", "s3://b/day=1", "./c=d", "x/report"))
    assert config.named_reports == [
        ("a", "x/1"), (None, "s3://b/day=1"), (None, "./c=d"), (None, "x/report"),
    ]  # fmt: skip
    assert list_options(config) == ["a=x/1", "s3://b/day=1", "./c=d", "x/report"]


def test_reports_without_a_name_take_the_end_of_their_path(scored: Path, tmp_path: Path) -> None:
    for name in ("x", "y"):
        copy(scored, tmp_path / name / "report", score_anew(0, 1))
    reports = [str(tmp_path / name / "report") for name in ("x", "y")]
    assert [row["name"] for row in compare(*reports)["rows"]] == ["x/report", "y/report"]
