"""Read and write the folder of a search: `_run.json`, trials, tables, recipe, `_SUCCESS`.

A trial's folder holds `trial.json` and its runs of `train`: one, or with population based training
one for each set of options it has had. All of it is JSON and Parquet: Ray Tune's own state is
pickled, so it is never read.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cifake_ray.errors import StorageError
from cifake_ray.storage.io.files import (
    MAX_JSON_BYTES,
    exists,
    hash_json,
    list_folder,
    make_folder,
    parse_json,
    read_bytes,
    remove,
    write_bytes,
    write_json,
)
from cifake_ray.storage.io.paths import AnyPath
from cifake_ray.storage.io.records import parse_record
from cifake_ray.storage.io.text_rows import encode_csv
from cifake_ray.storage.runs.run import read_record
from cifake_ray.storage.runs.train_run import RunFolder, TrainRun

TRIAL_NAME = re.compile(r"[0-9]{5,9}")


@dataclass(frozen=True)
class Trial:
    """The options of a trial, and why it ended."""

    number: int
    chosen: dict[str, Any]  # by the names of the search space
    generation: int = 0  # how often population based training has given it others
    end: str | None = None  # None while it is not over
    num_parameters: int | None = None


@dataclass(frozen=True)
class _TuneSummary:
    trials: int
    bundle: str


@dataclass(frozen=True)
class TuneRun(RunFolder):
    """The folder RUN of `tune`."""

    command = "tune"
    summary = _TuneSummary

    def has_begun(self) -> bool:
        return bool(self.read_trials())

    def read_settings(self) -> dict[str, Any]:
        """Return the settings of `_run.json`; none when there is no search yet."""
        return dict(read_record(self.path).get("settings", {})) if self.has_begun() else {}

    def withdraw_success(self) -> None:
        """Take back that the search has finished, to extend it."""
        remove(self.path / "_SUCCESS")

    def folder_of(self, number: int) -> AnyPath:
        return self.path / "trials" / f"{number:05d}"

    def run_of(self, trial: Trial) -> TrainRun:
        """Return the training run of a trial's last options."""
        return TrainRun(self.folder_of(trial.number) / f"run-{trial.generation}")

    def read_trials(self) -> list[Trial]:
        """Return the trials by number."""
        if not exists(self.path / "trials"):
            return []
        names = [f.name for f in list_folder(self.path / "trials") if TRIAL_NAME.fullmatch(f.name)]
        numbers = sorted(map(int, names))
        return [self.read_trial(n) for n in numbers if exists(self.folder_of(n) / "trial.json")]

    def read_trial(self, number: int) -> Trial:
        """Return a trial. StorageError when it is not as it was written."""
        path = self.folder_of(number) / "trial.json"
        data = read_bytes(path, MAX_JSON_BYTES)
        try:
            record = parse_json(path, data)
            sha256 = record.pop("sha256", None)  # earlier versions wrote none
            trial = parse_record(Trial, record)
            if trial.number != number or sha256 not in (None, hash_json(asdict(trial))):
                raise ValueError("its sha256 is another")
        except (StorageError, ValueError) as error:
            raise StorageError(
                f"{path}: damaged ({error}); delete the folder {path.parent} and run the same"
                " command again, which tries this trial again"
            ) from error
        return trial

    def check_options_of(self, trials: Iterable[Trial], names: Collection[str]) -> None:
        """Raise StorageError when a trial has others than these: they would be those of `train`."""
        for trial in trials:
            if trial.chosen.keys() != set(names):
                raise StorageError(
                    f"{self.folder_of(trial.number)}: it has {sorted(trial.chosen)}, the search has"
                    f" {sorted(names)}; it was edited: delete this folder to try the trial again"
                )

    def write_trial(self, trial: Trial) -> None:
        record = asdict(trial)
        path = self.folder_of(trial.number) / "trial.json"
        make_folder(path.parent.parent, parents=False)
        make_folder(path.parent, parents=False)
        write_json(path, {**record, "sha256": hash_json(record)})

    def write_tables(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write `trials.csv` and `trials.parquet`."""
        names = list(dict.fromkeys(name for row in rows for name in row))
        write_bytes(self.path / "trials.csv", encode_csv(names, rows))
        columns = {name: _to_column([row.get(name) for row in rows]) for name in names}
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(columns), sink)
        write_bytes(self.path / "trials.parquet", sink.getvalue().to_pybytes())

    def write_best(self, trial: Trial, recipe: str) -> None:
        """Copy the bundle of a trial to the search, and write the recipe that makes it again."""
        source = self.run_of(trial).bundle_path
        files = sorted((file.name for file in list_folder(source)), key="config.json".__eq__)
        make_folder(self.path / "bundle", parents=False)
        for name in files:  # config.json last: a bundle that has it is complete
            write_bytes(self.path / "bundle" / name, read_bytes(source / name))
        write_bytes(self.path / "recipe.yaml", recipe.encode())

    def write_report(self, page: bytes) -> None:
        write_bytes(self.path / "report.html", page)


def _to_column(values: list[Any]) -> pa.Array:
    """Return an Arrow array: of text when Arrow has no common type for the values."""
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.array([None if value is None else str(value) for value in values])
