"""tune: every trial is there and says why it ended; the best is a bundle and a recipe."""

from __future__ import annotations

import csv
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from cifake_ray.config import ScoreConfig, TrainConfig, TuneConfig
from cifake_ray.errors import CifakeError, ResourceError, RunMismatch, StorageError
from cifake_ray.pipeline import run_verb
from cifake_ray.stages.batch.summary import BatchSummary
from cifake_ray.stages.train.driver import train_detector
from cifake_ray.stages.tune import driver as stages_tune
from cifake_ray.stages.tune.driver import tune_detector
from cifake_ray.storage.presets.yaml_presets import read_recipe
from cifake_ray.storage.runs.tune_run import TuneRun

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(600)]

TINY = "small_cnn_w8_d1"  # 1,382 parameters: what is tested is the search
SPACE = {"lr": {"loguniform": [0.0005, 0.02]}, "augment.flip": [0.0, 0.5]}
RECIPE = {
    "model": TINY,
    "epochs": 2,
    "batch_size": 16,
    "val_fraction": 0.3,
    "precision": "float32",
}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """The space and the recipe, as files."""
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(SPACE))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return {"recipe": str(tmp_path / "recipe.yaml"), "search": str(tmp_path / "space.yaml")}


def make_config(shards: Path, run: Path, files: dict[str, str], **options: Any) -> TuneConfig:
    values = {
        "trials": 3,
        "recipe": files["recipe"],
        "search": (files["search"],),
        "cache_dir": str(run.parent / "cache"),
        **options,
    }
    return TuneConfig(shards=str(shards), run=str(run), **values)


def run_tune(shards: Path, run: Path, files: dict[str, str], **options: Any) -> dict[str, Any]:
    log = options.pop("log", lambda message: None)
    return tune_detector(make_config(shards, run, files, **options), time.monotonic(), log)


def read_rows(run: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(run / "trials.parquet").to_pylist()
    return rows


def read_stamps(run: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}


@pytest.mark.smoke
def test_every_trial_is_in_the_tables_and_the_best_scores(
    shards: Path,
    files: dict[str, str],
    sample_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, said = tmp_path / "run", []
    summary = run_tune(shards, run, files, scheduler="none", log=said.append)
    rows = read_rows(run)
    assert [row["trial"] for row in rows] == [0, 1, 2]
    assert {row["end"] for row in rows} == {"all 2 epochs done"}
    assert summary["ends"] == {"all 2 epochs done": 3}
    assert summary["epochs"] == summary["epochs_planned"] == 6
    assert summary["best"] == max(row["val_accuracy"] for row in rows)
    assert (rows[0]["lr"], rows[0]["augment.flip"]) == (0.003, 0.5), "not the recipe as it is"
    assert summary["baseline"] == rows[0]["val_accuracy"]
    low, high = summary["best_interval"]
    assert low <= summary["best"] <= high
    with open(run / "trials.csv", newline="") as file:
        assert [row["lr"] for row in csv.DictReader(file)] == [str(row["lr"]) for row in rows]
    command = (
        f"cifake-ray tune {shards} {run} --search {files['search']} --recipe {files['recipe']}"
    )
    assert f"{command} --trials 3 --scheduler none" in (run / "report.html").read_text()
    table = [line for line in said if line.startswith("| ")]
    size = 5  # head, rule, three trials
    assert len(table) % size == 0, "a slow search shows it more than once"
    assert table[-size].startswith("| trial | ")
    before = read_stamps(run)
    with monkeypatch.context() as patched:  # it needs neither
        for name in ("connect_cluster", "read_training_rows"):
            patched.setattr(stages_tune, name, lambda *arguments: pytest.fail("was called"))
        again = run_tune(shards, run, files, scheduler="none")
    assert again == json.loads((run / "_SUCCESS").read_text())
    assert read_stamps(run) == before, "a finished search was touched"
    config = ScoreConfig(src=str(sample_folder), out=str(tmp_path / "scores"), bundle=str(run))
    scored, _ = run_verb(config, time.monotonic())
    assert isinstance(scored, BatchSummary)
    assert scored.done == 60


def test_the_recipe_makes_the_best_trial_again(
    shards: Path, files: dict[str, str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    summary = run_tune(shards, run, files, trials=2)
    config = TrainConfig(
        shards=str(shards),
        run=str(tmp_path / "again"),
        num_workers="0",
        cpus_per_worker=1,
        cache_dir=str(tmp_path / "cache"),
        **read_recipe(run / "recipe.yaml"),
    )
    again = train_detector(config, lambda row, epochs: None, time.monotonic())
    assert again["val_accuracy"] == summary["best"]
    bundles = [run / "bundle", tmp_path / "again" / "bundle"]
    weights, same = ((path / "model.safetensors").read_bytes() for path in bundles)
    assert weights == same


def test_asha_stops_those_behind_at_the_rung_and_says_so(
    shards: Path, files: dict[str, str], tmp_path: Path
) -> None:
    """One after the other, so that each is compared with all that came before it."""
    Path(files["search"]).write_text("lr: [0.001, 0.002, 0.00000001, 0.5]\n")
    summary = run_tune(
        shards,
        tmp_path / "run",
        files,
        searcher="grid",
        trials=4,
        epochs=3,
        objective="val_loss",
        reduction_factor=2,
        grace_epochs=2,
        max_concurrent=1,
    )
    search, reached, stopped = TuneRun(tmp_path / "run"), [], []
    for trial in search.read_trials():
        losses = [row["val_loss"] for row in search.run_of(trial).read_history()]
        if reached and min(losses[:2]) > np.median(reached):
            stopped.append(trial.number)
            assert (trial.end, len(losses)) == ("stopped by asha", 2)
        else:
            assert (trial.end, len(losses)) == ("all 3 epochs done", 3)
        reached.append(min(losses[:2]))
    assert stopped
    assert read_recipe(tmp_path / "run" / "recipe.yaml")["monitor"] == "val_loss"
    assert summary["ends"]["stopped by asha"] == len(stopped)
    assert summary["epochs"] == summary["epochs_planned"] - len(stopped) == 12 - len(stopped)


def test_a_search_that_lost_its_end_goes_on_and_repeats_nothing(
    shards: Path, files: dict[str, str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    first = run_tune(shards, run, files)
    rows = read_rows(run)
    search = TuneRun(run)
    trial = search.read_trial(2)
    (run / "_SUCCESS").unlink()  # as if it was killed in the last trial's first epoch
    shutil.rmtree(search.folder_of(2) / "run-0")
    search.write_trial(replace(trial, end=None))
    stamps = {p: t for p, t in read_stamps(run / "trials").items() if "00002" not in p}
    said: list[str] = []
    second = run_tune(shards, run, files, log=said.append)
    said = [line for line in said if not line.endswith("...")]
    assert said[0] == "tune: resuming with 3 trials, 2 of them over"
    assert {p: t for p, t in read_stamps(run / "trials").items() if "00002" not in p} == stamps
    untimed = [{k: v for k, v in row.items() if k != "train_s"} for row in rows]
    assert [{k: v for k, v in r.items() if k != "train_s"} for r in read_rows(run)] == untimed
    assert (second["best_trial"], second["best"]) == (first["best_trial"], first["best"])


def test_other_settings_on_the_same_folder_are_refused(
    shards: Path, files: dict[str, str], tmp_path: Path
) -> None:
    run_tune(shards, tmp_path / "run", files, trials=1)
    with pytest.raises(RunMismatch, match="seed: 0 there, 1 here"):
        run_tune(shards, tmp_path / "run", files, trials=1, seed=1)


def test_a_second_search_on_a_folder_at_work_is_refused_and_changes_nothing(
    shards: Path, files: dict[str, str], tmp_path: Path
) -> None:
    with (
        TuneRun(tmp_path / "run").lock(),
        pytest.raises(StorageError, match="another `tune` is at work in it"),
    ):
        run_tune(shards, tmp_path / "run", files)
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize("searcher", ["random", "grid", "tpe"])
def test_a_finished_search_is_extended_by_more_trials(
    shards: Path, files: dict[str, str], tmp_path: Path, searcher: Literal["random", "grid", "tpe"]
) -> None:
    if searcher == "grid":
        Path(files["search"]).write_text("lr: [0.001, 0.002, 0.003]\n")
    run = tmp_path / "run"
    options: dict[str, Any] = {"searcher": searcher, "epochs": 1, "scheduler": "asha"}
    first = run_tune(shards, run, files, trials=1, **options)
    stamps = read_stamps(TuneRun(run).folder_of(0))
    assert run_tune(shards, run, files, trials=3, **options)["trials"] == 3
    assert first["trials"] == 1
    after = read_stamps(TuneRun(run).folder_of(0))
    assert {name: after[name] for name in stamps if "trial.json" not in name}.items() <= (
        stamps.items()
    ), "a trial was trained twice"
    assert len({row["lr"] for row in read_rows(run)}) == 3
    before = read_stamps(run)
    trials = 9 if searcher == "grid" else 2  # there are no more combinations
    assert run_tune(shards, run, files, trials=trials, **options)["trials"] == 3
    assert read_stamps(run) == before, "a finished search was touched"


def test_population_based_training_is_not_extended(
    shards: Path, files: dict[str, str], tmp_path: Path
) -> None:
    run_tune(shards, tmp_path / "run", files, trials=2, scheduler="pbt")
    with pytest.raises(RunMismatch, match="trials: 2 there, 3 here"):
        run_tune(shards, tmp_path / "run", files, trials=3, scheduler="pbt")


def test_a_trial_that_fails_is_a_row_and_is_tried_again(
    shards: Path, files: dict[str, str], tmp_path: Path
) -> None:
    Path(files["search"]).write_text("lr: [0.002, 1.0e+30]\n")
    run = tmp_path / "run"
    options: dict[str, Any] = {"searcher": "grid", "trials": 2, "max_failures": 0}
    summary = run_tune(shards, run, files, **options)
    assert summary["best_trial"] == 0
    (good, bad) = read_rows(run)
    assert good["end"] == "all 2 epochs done"
    assert bad["end"].startswith("failed: ")
    assert "lower --lr" in bad["end"]
    (run / "_SUCCESS").unlink()
    assert run_tune(shards, run, files, **options)["ends"] == summary["ends"]


def test_a_search_without_any_result_says_why(
    shards: Path, files: dict[str, str], tmp_path: Path
) -> None:
    Path(files["search"]).write_text("lr: [1.0e+30]\n")
    with pytest.raises(CifakeError, match=r"no trial trained an epoch \(failed: .*lower --lr"):
        run_tune(shards, tmp_path / "run", files, searcher="grid", max_failures=0)


def test_the_budget_leaves_out_networks_and_says_how_many(
    shards: Path, files: dict[str, str], tmp_path: Path
) -> None:
    Path(files["search"]).write_text("model: [cnn, small_cnn, small_cnn_w8_d1]\n")
    said: list[str] = []
    options: dict[str, Any] = {"searcher": "grid", "epochs": 1, "log": said.append}
    run_tune(shards, tmp_path / "run", files, max_parameters=40_000, **options)
    rows = read_rows(tmp_path / "run")
    assert [row["model"] for row in rows] == ["cnn", "small_cnn_w8_d1"]
    assert all(row["num_parameters"] <= 40_000 for row in rows)
    said = [line for line in said if not line.endswith("...")]
    assert said[0] == "tune: 1 choices left out (1: more than --max-parameters)"
    with pytest.raises(ValueError, match=r"none of 3 choices .* more than --max-par"):
        run_tune(shards, tmp_path / "none", files, max_parameters=10, **options)


def test_options_that_do_not_go_together_are_left_out_with_the_reason(
    shards: Path, files: dict[str, str], tmp_path: Path
) -> None:
    Path(files["search"]).write_text("patience: [null, 2]\nmin_delta: [0.0, 0.001]\n")
    said: list[str] = []
    options: dict[str, Any] = {"searcher": "grid", "epochs": 1, "trials": 4}
    run_tune(shards, tmp_path / "run", files, log=said.append, **options)
    said = [line for line in said if not line.endswith("...")]
    assert said[0].startswith("tune: 1 choices left out (1: --min-delta needs --patience")
    assert len(read_rows(tmp_path / "run")) == 3


def test_a_grid_that_is_cut_says_so(shards: Path, files: dict[str, str], tmp_path: Path) -> None:
    Path(files["search"]).write_text("lr: [0.001, 0.002, 0.003]\n")
    said: list[str] = []
    run_tune(shards, tmp_path / "run", files, searcher="grid", epochs=1, trials=2, log=said.append)
    said = [line for line in said if not line.endswith("...")]
    assert said[0] == "tune: 2 of 3 combinations are tried; see --trials"


def test_files_that_are_named_from_here_are_found_by_the_trials(
    shards: Path, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "steps.yaml").write_text("flip: 0.25\n")
    Path(files["search"]).write_text("augment: [none, steps.yaml]\n")
    run_tune(shards, tmp_path / "run", files, searcher="grid", epochs=1)
    assert [row["augment"] for row in read_rows(tmp_path / "run")] == ["none", '{"flip": 0.25}']
    assert {row["end"] for row in read_rows(tmp_path / "run")} == {"all 1 epochs done"}


def test_a_folder_of_another_verb_is_refused_and_stays_as_it_is(
    shards: Path, files: dict[str, str], tmp_path: Path
) -> None:
    converted, searched = tmp_path / "converted", tmp_path / "searched"
    shutil.copytree(shards, converted)
    run_tune(shards, searched, files, trials=1, epochs=1)
    before = read_stamps(tmp_path)
    with pytest.raises(RunMismatch, match="command: 'convert' there, 'tune' here"):
        run_tune(shards, converted, files)
    config = TrainConfig(shards=str(shards), run=str(searched), num_workers="0")
    with pytest.raises(RunMismatch, match="command: 'tune' there, 'train' here"):
        train_detector(config, lambda row, epochs: None, time.monotonic())
    assert read_stamps(tmp_path) == before


def test_median_stopping_comes_to_an_end(
    shards: Path, files: dict[str, str], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"scheduler": "median", "trials": 4, "epochs": 3}
    summary = run_tune(shards, tmp_path / "run", files, **options)
    assert sum(summary["ends"].values()) == 4
    assert summary["ends"].keys() <= {"all 3 epochs done", "stopped by median"}
    assert (tmp_path / "run" / "bundle" / "config.json").exists()


def test_in_population_based_training_all_take_turns_and_stay_themselves(
    shards: Path, files: dict[str, str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    Path(files["search"]).write_text("lr: {loguniform: [1.0e-9, 0.02]}\naugment.flip: [0.0, 0.5]\n")
    summary = run_tune(shards, run, files, scheduler="pbt", trials=4, epochs=3, seed=2)
    assert summary["ends"] == {"all 3 epochs done": 4}
    search = TuneRun(run)
    trials = search.read_trials()
    assert [trial.number for trial in trials] == list(range(4))
    assert any(trial.generation for trial in trials), "none was given another's weights"
    for trial in trials:
        assert 1e-9 <= trial.chosen["lr"] < 0.02
        assert [row["epoch"] for row in search.run_of(trial).read_history()] == [1, 2, 3]
    is_alone = search.read_trial(summary["best_trial"]).generation == 0
    assert ("on their own" in (run / "recipe.yaml").read_text()) is not is_alone


def test_population_based_training_with_room_for_one_is_refused(
    shards: Path, files: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(ResourceError, match="with --num-workers 2 there is room for one"):
        run_tune(shards, tmp_path / "run", files, scheduler="pbt", num_workers=2)
    with pytest.raises(ValueError, match="leave --max-concurrent out"):
        make_config(shards, tmp_path / "run", files, scheduler="pbt", max_concurrent=1)


def test_tpe_tries_as_many_as_it_is_told(
    shards: Path, files: dict[str, str], tmp_path: Path
) -> None:
    pytest.importorskip("optuna")
    run = tmp_path / "run"
    first = run_tune(shards, run, files, searcher="tpe", trials=3, epochs=1)
    rows = read_rows(run)
    assert first["trials"] == len(rows) == 3
    assert all(0.0005 <= row["lr"] <= 0.02 for row in rows)
    (run / "_SUCCESS").unlink()
    run_tune(shards, run, files, searcher="tpe", trials=3, epochs=1)
    assert read_rows(run) == rows


def test_tpe_chooses_anew_after_a_kill(shards: Path, files: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_tune(shards, run, files, searcher="tpe", epochs=1)
    (run / "_SUCCESS").unlink()
    for number in (1, 2):  # as if it had been killed before these
        shutil.rmtree(TuneRun(run).folder_of(number))
    run_tune(shards, run, files, searcher="tpe", epochs=1)
    assert len({row["lr"] for row in read_rows(run)}) == 3, "a trial was tried twice"


def test_tpe_goes_on_after_a_network_beyond_the_budget(
    shards: Path, files: dict[str, str], tmp_path: Path
) -> None:
    Path(files["search"]).write_text(f"model: [{TINY}, small_cnn]\n")
    options: dict[str, Any] = {"searcher": "tpe", "trials": 5, "epochs": 1}
    run_tune(shards, tmp_path / "run", files, max_parameters=40_000, **options)
    rows = read_rows(tmp_path / "run")
    assert [row["model"] for row in rows] == [TINY] * 5
    assert {row["end"] for row in rows} == {"all 1 epochs done"}
    with pytest.raises(CifakeError, match="nothing was within the budget"):
        run_tune(shards, tmp_path / "none", files, max_parameters=10, **options)


def test_the_time_budget_ends_the_search_and_is_the_reason(
    shards: Path, files: dict[str, str], tmp_path: Path
) -> None:
    summary = run_tune(
        shards, tmp_path / "run", files, trials=3, epochs=4000, time_budget=20, scheduler="none"
    )
    assert summary["ends"] == {"the time budget was over": 3}
    assert summary["epochs"] == summary["epochs_planned"], "nothing was saved by stopping early"
    assert (tmp_path / "run" / "bundle" / "config.json").exists()


def test_trials_of_two_workers_run_one_after_the_other(
    shards: Path, files: dict[str, str], tmp_path: Path
) -> None:
    summary = run_tune(shards, tmp_path / "run", files, num_workers=2, trials=2, epochs=1)
    assert summary["ends"] == {"all 1 epochs done": 2}
    history = TuneRun(tmp_path / "run").folder_of(0) / "run-0" / "history.jsonl"
    assert json.loads(history.read_text())["workers"] == 2


def test_more_workers_than_there_is_room_for_are_refused_with_the_numbers(
    shards: Path, files: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(ResourceError, match="3 workers need 3 CPUs, the cluster has 2 CPUs"):
        run_tune(shards, tmp_path / "run", files, num_workers=3)


@pytest.mark.parametrize("has_cluster", [True, False])
def test_a_dry_run_says_what_would_be_done_and_does_nothing(
    shards: Path,
    files: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    has_cluster: bool,
) -> None:
    if not has_cluster:  # then none is started: the machine's own CPUs are counted
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        monkeypatch.setattr("ray.is_initialized", lambda: False)
        monkeypatch.setattr("ray.init", lambda **options: pytest.fail("was called"))
        monkeypatch.setattr(stages_tune, "count_local_cpus", lambda: 2)
    plan = run_tune(shards, tmp_path / "run", files, dry_run=True)
    assert (plan["trials"], plan["at_once"], plan["epochs"]) == (3, 2, 2)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("space", "options", "message"),
    [
        (
            "lr: [0.1]",
            {"recipe": "fastest"},
            "not among the built-in recipes: accurate, best, fast",
        ),
        ("lr: [0.1]", {"search": ("wild",)}, "not among the built-in searches: architecture"),
        ("model: [cnn]", {"scheduler": "pbt"}, "model cannot change"),
        ("lr: 0.1", {}, "lr: give a list of values"),
    ],
)
def test_a_wrong_request_is_refused(
    shards: Path, files: dict[str, str], tmp_path: Path, space: str, options: Any, message: str
) -> None:
    Path(files["search"]).write_text(space)
    with pytest.raises(ValueError, match=message):
        run_tune(shards, tmp_path / "run", files, **options)
    assert not (tmp_path / "run").exists()
