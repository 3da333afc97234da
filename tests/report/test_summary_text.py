"""What commands print at their end: sentences first, nothing that says nothing."""

from __future__ import annotations

import io
import os
import sys
from dataclasses import asdict, replace
from typing import Any

import pytest

from cifake_ray.console import format_result
from cifake_ray.report.summary_text import split_summary
from cifake_ray.stages.batch.summary import BatchSummary
from cifake_ray.stages.evaluate.driver import EvaluateSummary

SCORED = BatchSummary(
    command="score",
    out="/data/out",
    listed=10_042,
    done=8_838,
    failed=1_204,
    errors={"not_an_image": 900, "truncated": 304},
    unlike_training={"any": 0},
    left_out={"excluded": 40, "links": 0},
    shards_total=10,
    shards_resumed=0,
    shards_retried=0,
    elapsed_s=12.34,
    images_per_s=813.8,
    steady_images_per_s=1100.4,
    threshold=0.374,
    called_fake={"default": 2757, "fpr_0.01": 2121, "fpr_0.001": 0},
    thresholds={"default": 0.374, "fpr_0.01": 0.81, "fpr_0.001": 0.9987},
)


def describe(result: Any) -> list[str]:
    return format_result(asdict(result)).splitlines()


def test_scores_are_told_in_sentences() -> None:
    assert describe(SCORED) == [
        "Called FAKE: 31.2% (p_fake >= 0.374); 24.0% with --target-fpr 0.01 (p_fake >= 0.81); 0.0%"
        " with --target-fpr 0.001 (p_fake >= 0.999).",
        "8,838 of 10,042 images scored; 1,204 unreadable: 900 not_an_image, 304 truncated.",
        "Left out: 40 excluded.",
        "Rows in /data/out/scores, 10 shards.",
        "12.3 s, 814 images/s (1,100 once started).",
    ]


def test_the_share_is_that_of_the_threshold_that_was_chosen() -> None:
    first = describe(replace(SCORED, threshold=0.81))[0]
    assert first.startswith(
        "Called FAKE: 24.0% (p_fake >= 0.81); 31.2% with the default (p_fake >= 0.374); "
    )


def test_what_is_not_known_or_did_not_happen_is_not_told() -> None:
    """An earlier version did not count; nothing failed; everything had been committed."""
    older = replace(
        SCORED,
        called_fake={},
        thresholds={},
        threshold=None,
        done=1,
        listed=1,
        failed=0,
        errors={},
        left_out={},
        shards_total=1,
        shards_resumed=1,
        shards_retried=2,
        images_per_s=0.0,
    )
    assert describe(older) == [
        "1 of 1 images scored; none unreadable.",
        "Rows in /data/out/scores, 1 shard.",
        "12.3 s; 1 shard had been done before; 2 shards started again after a crash.",
    ]


def test_nothing_scored_has_no_share() -> None:
    none = replace(SCORED, done=0, failed=10_042, called_fake=dict.fromkeys(SCORED.called_fake, 0))
    assert describe(none)[0].startswith("0 of 10,042 images scored; 10,042 unreadable")


def test_shards_are_told_without_words_on_detectors() -> None:
    converted = replace(
        SCORED, command="convert", unlike_training={}, threshold=None, called_fake={}
    )
    text = "\n".join(describe(converted))
    assert "8,838 of 10,042 images converted" in text
    assert "unlike" not in text
    assert "threshold" not in text


def test_other_counts_follow_the_sentences() -> None:
    _, rest = split_summary({**asdict(SCORED), "labels": {"REAL": 5, "FAKE": 6}, "sources": {}})
    assert rest == {"labels": {"REAL": 5, "FAKE": 6}}


def make_interval(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.01, "high": value + 0.01}


@pytest.mark.parametrize(
    ("report", "auroc"),
    [
        ("file:///data/my%20out/report.html", {"value": None, "low": None, "high": None}),
        ("s3://b/report.html", make_interval(0.98)),
    ],
)
def test_an_evaluation_is_told_with_intervals_and_a_link(report: str, auroc: Any) -> None:
    evaluated = EvaluateSummary(
        **{**asdict(SCORED), "command": "evaluate", "out": "/data/my out"},
        metrics={
            "num_real": 5000,
            "num_fake": 5042,
            "accuracy": make_interval(0.982),
            "auroc": auroc,
            "tpr_at_fpr_1pct": make_interval(0.97),
        },
        report=report,
    )
    lines = describe(evaluated)
    shown = "-" if auroc["value"] is None else "0.980 (0.970-0.990)"
    assert lines[0] == (
        f"Accuracy 98.2% (97.2-99.2) at 0.5, AUROC {shown}, FAKE found at 1% false positives 97.0%"
        " (96.0-98.0), on 5,000 REAL and 5,042 FAKE images (95% intervals)."
    )
    assert "Left out: 40 images of other splits or without a label." in lines
    assert lines[-1] == f"Report: {report}"
    assert describe(replace(evaluated, metrics={}))[0].startswith("8,838 of 10,042 images scored")


def test_a_check_says_what_it_checked() -> None:
    checked = {"command": "verify", "out": "o", "files": 10, "rows": 10_042, "damaged": {}}
    assert format_result(checked) == "10 files, 10,042 rows checked, all as they were committed."
    assert format_result({**checked, "command": "repair"}).startswith("nothing to repair: 10 files")


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("scores/part-00002.parquet", "run `cifake-ray repair o`."),
        ("_manifest/0-1.parquet", "the manifest cannot be repaired: start again in a new folder."),
        ("manifest/0-1.parquet", "the manifest cannot be repaired: start again in a new folder."),
    ],
)
def test_damage_is_named_with_its_remedy(name: str, remedy: str) -> None:
    damaged = {name: "missing"}
    record = {"command": "verify", "out": "o", "files": 3, "rows": 1, "damaged": damaged}
    assert format_result(record).splitlines() == [
        f"3 files, 1 row checked, 1 damaged: {remedy}",
        f"{name}: missing",
    ]


TRAINED = {
    "command": "train",
    "out": "/o/run",
    "bundle": "/o/run/bundle",
    "val_images": 364,
    "unusable": {"truncated": 2},
    "epochs": 3,
    "stopped": "all 3 epochs done",
    "averaged_epochs": [3],
    "val_accuracy": 0.8599,
    "train_s": 118.4,
    "images_per_s": 81.1,
    "elapsed_s": 224.7,
    "threshold": 0.5541,
    "threshold_fpr_1": 0.9637,
    "threshold_fpr_01": None,
    "untracked": {"mlflow": 1},
}


def test_a_training_is_told_in_sentences() -> None:
    assert format_result(TRAINED).splitlines() == [
        "Accuracy 86.0% on 364 validation images at 0.5, by epoch 3 (all 3 epochs done).",
        "FAKE is p_fake >= 0.554; >= 0.964 with --target-fpr 0.01.",
        "224.7 s; 3 epochs in 118.4 s, 81 images/s.",
        "Detector: /o/run/bundle",
        "Next: cifake-ray evaluate SHARDS --bundle /o/run --out REPORT",
        "unusable   truncated 2",
        "untracked  mlflow 1",
    ]


def test_a_training_of_an_earlier_version_has_no_thresholds() -> None:
    record = {n: v for n, v in TRAINED.items() if not n.startswith("threshold")}
    lines = format_result({**record, "averaged_epochs": [2, 3]}).splitlines()
    assert "by the mean of epochs 2, 3 (" in lines[0]
    assert not any("p_fake" in line for line in lines)


def test_a_search_is_told_in_sentences() -> None:
    record = {
        "command": "tune",
        "out": "/o",
        "bundle": "/o/bundle",
        "recipe": "/o/recipe.yaml",
        "report": "file:///o/report.html",
        "trials": 3,
        "ends": {"all 3 epochs done": 2, "fell behind": 1},
        "objective": "val_accuracy",
        "best_trial": 1,
        "best": 0.794,
        "best_interval": [0.749, 0.832],
        "baseline": 0.7555,
        "chosen": {"augment.flip": 0.5, "augment.shift": 0.0625},
        "epochs": 7,
        "epochs_planned": 9,
        "elapsed_s": 61.0,
    }
    assert format_result(record).splitlines() == [
        "Best of 3 trials: 1, with val_accuracy 0.794 (0.749-0.832); the recipe as it is: 0.755.",
        "It has augment.flip 0.5, augment.shift 0.0625.",
        "Trials ended: 2 all 3 epochs done, 1 fell behind.",
        "61.0 s; 7 of 9 epochs trained.",
        "Report: file:///o/report.html",
        "Recipe: /o/recipe.yaml",
        "Detector: /o/bundle",
        "Next: cifake-ray evaluate SHARDS --bundle /o --out REPORT",
    ]


def test_a_demo_says_what_to_do_next() -> None:
    record = {
        "command": "demo",
        "out": "/o",
        "test_images": 300,
        "accuracy": 0.98,
        "auroc": 0.999,
        "bundle": "/o/run/bundle",
        "report": "file:///o/report/report.html",
        "scores": "/o/scores/scores",
    }
    lines = format_result(record).splitlines()
    assert lines[0] == "Of 300 test images 98.0% are classified correctly at 0.5, AUROC 0.999."
    assert lines[1] == "Report: file:///o/report/report.html"
    assert lines[-2].startswith("cifake-ray score ")
    assert "Next" not in format_result({**record, "command": "pipeline"})


def test_what_is_empty_is_not_shown_in_any_result() -> None:
    record = {"command": "train", "weights": None, "untracked": {}, "zero": 0, "no": False}
    assert format_result(record).split() == ["command", "train", "zero", "0", "no", "no"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_lines_end_between_words_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("COLUMNS", f"{columns}")
    monkeypatch.setattr(os, "get_terminal_size", lambda fd=1: os.terminal_size((columns, 24)))
    lines = format_result(asdict(SCORED)).splitlines()
    assert max(map(len, lines)) <= columns
    words = " ".join(line.strip() for line in lines)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert words == " ".join(describe(SCORED)), "nothing is lost"


def test_a_path_is_cleaned_and_never_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    out = "/data/" + "long-name-" * 10 + "\x1b[31m"
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("COLUMNS", "40")
    text = format_result(asdict(replace(SCORED, out=out)))
    assert out.replace("\x1b", "\\x1b") + "/scores" in text
    assert "\x1b" not in text
