"""evaluate: its predictions are score's, its report is one page."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cifake_ray.config import ConvertConfig, EvaluateConfig, ScoreConfig
from cifake_ray.core.models import gradient_maps
from cifake_ray.errors import UsageError
from cifake_ray.pipeline import run_verb
from cifake_ray.stages.evaluate.driver import evaluate_detector

pytestmark = pytest.mark.usefixtures("ray_cluster")


def run_evaluate(
    shards: Path,
    bundle: Path,
    out: Path,
    split: str | None = None,
    *,
    gradient_maps: bool = False,
) -> list[str]:
    """What was said, but for what only begins."""
    said: list[str] = []
    config = EvaluateConfig(
        shards=str(shards),
        bundle=str(bundle),
        out=str(out),
        split=split,
        num_bootstrap=50,
        gradient_maps=gradient_maps,
    )
    evaluate_detector(config, shards, out, bundle, lambda _: None, time.monotonic(), said.append)
    return [line for line in said if not line.endswith("...")]


@pytest.fixture(scope="module")
def report(shards: Path, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluate") / "out"
    run_evaluate(shards, bundle, out)
    return out


def test_it_takes_the_test_split_by_itself(report: Path) -> None:
    predictions = pq.read_table(report / "predictions").to_pylist()
    assert {row["split"] for row in predictions} == {"test"}
    assert len(predictions) == 6


def test_predictions_equal_scores_of_the_folder(
    report: Path, sample_folder: Path, bundle: Path, tmp_path: Path
) -> None:
    config = ScoreConfig(
        src=str(sample_folder / "test"), out=str(tmp_path / "out"), bundle=str(bundle)
    )
    run_verb(config, time.monotonic())
    scores = {f"test/{r['key']}": r for r in pq.read_table(tmp_path / "out" / "scores").to_pylist()}
    predictions = pq.read_table(report / "predictions").to_pylist()
    assert {row["key"] for row in predictions} == scores.keys()
    for row in predictions:
        assert row["p_fake"] == pytest.approx(scores[row["key"]]["p_fake"], abs=1e-5)


@pytest.mark.smoke
def test_metrics_follow_from_the_predictions(report: Path) -> None:
    predictions = pq.read_table(report / "predictions").to_pylist()
    right = sum((row["p_fake"] >= 0.5) == (row["label"] == 1) for row in predictions)
    metrics = json.loads((report / "metrics.json").read_text())
    assert metrics["num_images"] == len(predictions)
    assert metrics["accuracy"]["value"] == pytest.approx(right / len(predictions))


def test_the_report_is_one_page_with_figures_and_mistakes(report: Path) -> None:
    page = (report / "report.html").read_text()
    assert "default-src 'none'" in page
    assert "http://" not in page
    figures = {path.name for path in (report / "figures").iterdir()}
    assert {"roc.svg", "reliability.svg", "scores.svg", "loss.svg", "accuracy.svg"} <= figures
    assert (report / "_SUCCESS").stat().st_mtime >= (report / "report.html").stat().st_mtime
    assert "There is no split" not in page
    assert "UTC, in 0 min" in page
    metrics = json.loads((report / "metrics.json").read_text())
    assert metrics["facts"]["Listing (sha256)"][:12] in page
    assert "pairs" not in re.findall('class="sheet[^"]*"', page)[0]


def test_gradient_maps_stand_beside_the_worst_and_the_uncertain_images(
    shards: Path, bundle: Path, tmp_path: Path
) -> None:
    pytest.importorskip("captum")
    run_evaluate(shards, bundle, tmp_path / "out", gradient_maps=True)
    page = (tmp_path / "out" / "report.html").read_text()
    uncertain, random = page.split("<h3>Most uncertain</h3>")[1].split("<h3>Random images</h3>")
    assert uncertain.count("<img") == 2 * uncertain.count("<summary>") == 12
    assert random.count("<img") == random.count("<summary>") == 6


def test_gradient_maps_without_captum_are_refused_before_anything_is_scored(
    shards: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradient_maps, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"cifake-ray\[explain\]"):
        run_evaluate(shards, bundle, tmp_path / "out", gradient_maps=True)
    assert not (tmp_path / "out").exists()


def test_it_takes_the_split_that_is_asked_for(shards: Path, bundle: Path, tmp_path: Path) -> None:
    assert run_evaluate(shards, bundle, tmp_path / "out", split="val") == []
    assert pq.read_table(tmp_path / "out" / "predictions").num_rows == 6


def test_every_row_is_used_where_there_is_no_test_split_and_that_is_told(
    sample_folder: Path, bundle: Path, tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    config = ConvertConfig(src=str(sample_folder / "train"), out=str(shards))
    run_verb(config, time.monotonic())
    (told,) = run_evaluate(shards, bundle, tmp_path / "out")
    assert "no split `test`" in told
    assert "There is no split `test`" in (tmp_path / "out" / "report.html").read_text()
    assert pq.read_table(tmp_path / "out" / "predictions").num_rows == 48


def test_a_split_without_labels_is_refused(shards: Path, bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="it has test, train, val"):
        run_evaluate(shards, bundle, tmp_path / "out", split="nowhere")
