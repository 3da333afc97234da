"""Records of trainings and searches that somebody else wrote: read, or refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from wrong_values import WRONG_KINDS, WRONG_VALUES, list_places, put

from cifake_ray.core.schema import SCHEMA_VERSION
from cifake_ray.errors import CifakeError, StorageError
from cifake_ray.storage.runs.train_run import RunFolder, TrainRun
from cifake_ray.storage.runs.tune_run import Trial, TuneRun

EPOCH = {
    **{"epoch": 1, "step": 3, "train_loss": 0.5, "val_loss": 0.5, "val_accuracy": 0.9},
    **{"val_auroc": 0.9, "train_s": 1.5, "images_per_s": 10.0},
}
SUCCESS = {"epochs": 1, "trials": 1, "stopped": "all 1 epochs done", "bundle": "b"}
RUN = {"schema_version": SCHEMA_VERSION, "command": "tune", "settings": {"a": 1}, "config": {}}


def write_run(path: Path) -> None:
    (path / "trials" / "00000" / "run-0").mkdir(parents=True)
    (path / "checkpoints").mkdir()
    (path / "_run.json").write_text(json.dumps(RUN))
    (path / "_SUCCESS").write_text(json.dumps(SUCCESS))
    (path / "history.jsonl").write_text(json.dumps(EPOCH) + "\n")
    trial = {"number": 0, "chosen": {"lr": 0.1}, "generation": 0, "end": None}
    (path / "trials" / "00000" / "trial.json").write_text(json.dumps(trial))


def open_run(run: RunFolder) -> None:
    with run.lock():
        run.open({"a": 1}, {})


READS: dict[str, Callable[[Path], Any]] = {
    "_run.json": lambda path: open_run(TuneRun(path)),
    "_SUCCESS": lambda path: (TrainRun(path).read_success(), TuneRun(path).read_success()),
    "history.jsonl": lambda path: TrainRun(path).read_history(),
    "trials/00000/trial.json": lambda path: TuneRun(path).read_trials(),
}
COUNTS = ("epoch", "step", "number", "generation", "epochs", "trials")


@pytest.mark.parametrize("wrong", WRONG_VALUES)
@pytest.mark.parametrize("name", READS)
def test_any_value_may_be_any_other(tmp_path: Path, name: str, wrong: str) -> None:
    write_run(tmp_path)
    record = json.loads((tmp_path / name).read_bytes())
    for place in list_places(record):
        (tmp_path / name).write_text(json.dumps(put(record, place, WRONG_VALUES[wrong])) + "\n")
        try:
            READS[name](tmp_path)
        except CifakeError:
            continue
        else:  # then what others compute with is a count
            assert place[-1:] == () or place[-1] not in COUNTS or wrong in ("large", "deleted")


@pytest.mark.parametrize("kind", WRONG_KINDS.values(), ids=WRONG_KINDS)
@pytest.mark.parametrize("name", [*READS, "checkpoints/last.pt"])
def test_files_may_be_no_files(tmp_path: Path, name: str, kind: Callable[[Path], Any]) -> None:
    path = tmp_path / "a" / "run"
    write_run(path)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "victim").write_bytes(b"{}")
    (path / name).unlink(missing_ok=True)
    kind(path / name)
    read = READS.get(name, lambda path: TrainRun(path).read_checkpoint())
    found = None
    with suppress(CifakeError), TrainRun(path).lock():
        found = read(path)
    assert found in (None, [], (None, None))  # as without it
    assert [p.name for p in (tmp_path / "outside").iterdir()] == ["victim"]


@pytest.mark.parametrize("name", ["checkpoints", "trials", "bundle", "tensorboard", "ray"])
def test_folders_may_be_links(tmp_path: Path, name: str) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to("../outside")
    for open_it in (open_run, TrainRun.read_success, lambda run: run.check_options({}, [])):
        with pytest.raises(StorageError, match="is a link that leads out of"):
            open_it(TrainRun(tmp_path / "run"))


@pytest.mark.parametrize("name", ["\u00b2", "9" * 40, "-1", "1"])
def test_a_folder_of_another_name_is_no_trial(tmp_path: Path, name: str) -> None:
    write_run(tmp_path)
    (tmp_path / "trials" / name).mkdir()
    assert TuneRun(tmp_path).read_trials() == [Trial(0, {"lr": 0.1})]


@pytest.mark.parametrize("other", [{}, {"lr": 1, "shards": "/etc"}, {"run": "../outside"}])
def test_a_trial_brings_no_options_of_its_own(tmp_path: Path, other: dict[str, Any]) -> None:
    search = TuneRun(tmp_path)
    search.check_options_of([Trial(0, {"lr": 0.1})], ["lr"])
    with pytest.raises(StorageError, match="trials/00000: it has"):
        search.check_options_of([Trial(0, other)], ["lr"])
