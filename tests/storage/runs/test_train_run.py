"""What a training and a trial keep to resume from is found to be damaged, or does as it would."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cifake_ray.errors import StorageError
from cifake_ray.storage.runs.train_run import TrainRun
from cifake_ray.storage.runs.tune_run import Trial, TuneRun

MEASURED = ("train_loss", "val_loss", "val_accuracy", "val_auroc", "train_s", "images_per_s")
HISTORY = [{"epoch": n, "step": 7 * n, **dict.fromkeys(MEASURED, 0.1 / n)} for n in (1, 2)]
TRIAL = Trial(3, {"lr": 0.003, "augment.flip": 0.5}, 0, "all 2 epochs done", 1382)


def flatten(value: Any) -> Any:
    """Return what compares as equal if all of its numbers are."""
    if isinstance(value, dict):
        return {name: flatten(item) for name, item in value.items()}
    return value.tolist() if isinstance(value, torch.Tensor) else value


def write_checkpoint(root: Path) -> Callable[[], Any]:
    run, buffer = TrainRun(root), io.BytesIO()
    state = {"epoch": 2, "step": 14, "batch": 0, "history": HISTORY, "patience": {}, "kept": [{}]}
    parts: dict[str, Any] = {name: {} for name in ("ema", "optimizer", "schedule", "scaler")}
    torch.save({"network": {"weight": torch.arange(300.0)}, "state": state, **parts}, buffer)
    run.write_checkpoint(buffer.getvalue())
    return lambda: flatten(run.read_checkpoint())


def write_history(root: Path) -> Callable[[], Any]:
    run = TrainRun(root)
    run.write_history(HISTORY)
    return run.read_history


def write_trial(root: Path) -> Callable[[], Any]:
    search = TuneRun(root)
    search.write_trial(TRIAL)
    return lambda: search.read_trial(TRIAL.number)


KEPT = {
    "checkpoints/last.pt": write_checkpoint,
    "history.jsonl": write_history,
    "summary.csv": write_history,
    "trials/00003/trial.json": write_trial,
}


def damage_bytes(data: bytes) -> Iterator[bytes]:
    """Yield what a disk may make of a file: cut off, or with a bit that is another."""
    step = max(1, len(data) // 97)
    yield from (data[:length] for length in range(0, len(data), step))
    yield data + data[-1:]
    for place in range(0, len(data), 1 + len(data) // 1000):
        yield data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :]


@pytest.mark.parametrize("name", KEPT)
def test_what_is_damaged_is_told_and_never_gives_other_numbers(tmp_path: Path, name: str) -> None:
    read = KEPT[name](tmp_path)
    path, told = tmp_path / name, list[str]()
    good, wanted = path.read_bytes(), read()
    for damaged in damage_bytes(good):
        path.write_bytes(damaged)
        try:
            assert read() == wanted
        except StorageError as error:
            told.append(str(error))
    assert all("delete" in words and "\n" not in words for words in told)
    assert len(told) > 0.7 * len(list(damage_bytes(good)))  # the rest is padding


def test_a_kill_between_history_and_table_is_no_damage(tmp_path: Path) -> None:
    run = TrainRun(tmp_path)
    run.write_history(HISTORY[:1])
    table = (tmp_path / "summary.csv").read_bytes()
    run.write_history(HISTORY)
    for earlier in (table, None):
        (tmp_path / "summary.csv").unlink()
        if earlier:
            (tmp_path / "summary.csv").write_bytes(earlier)
        assert run.read_history() == HISTORY


def test_what_an_earlier_version_wrote_is_read(tmp_path: Path) -> None:
    read = write_trial(tmp_path)
    path = tmp_path / "trials" / "00003" / "trial.json"
    lines = [line for line in path.read_text().splitlines() if "sha256" not in line]
    path.write_text("\n".join(lines).replace("1382,", "1382"))
    assert read() == TRIAL
