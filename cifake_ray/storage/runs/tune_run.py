"""The folder of a search: `_run.json`, a folder for each trial, tables, recipe, `_SUCCESS`.

A trial's folder holds what it was given and why it ended, and the runs of `train`
it is made of: one, or with population based training one for each set of options it has had. All
of it is JSON and Parquet: Ray Tune's own state is pickled, so it is written and never read.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cifake_ray.storage.io.files import (
    exists,
    list_folder,
    read_bytes,
    read_json,
    write_bytes,
    write_json,
)
from cifake_ray.storage.io.paths import AnyPath
from cifake_ray.storage.runs.train_run import RunFolder, TrainRun


@dataclass(frozen=True)
class Trial:
    """What a trial was given, and why it ended."""

    number: int
    chosen: dict[str, Any]  # by the names of the search space
    generation: int = 0  # how often population based training has given it others
    end: str | None = None  # None while it is not over
    num_parameters: int | None = None


@dataclass(frozen=True)
class TuneRun(RunFolder):
    """The folder RUN of `tune`."""

    command = "tune"

    def has_begun(self) -> bool:
        return bool(self.read_trials())

    def folder_of(self, number: int) -> AnyPath:
        return self.path / "trials" / f"{number:05d}"

    def run_of(self, trial: Trial) -> TrainRun:
        """The training that a trial is at, or ended with."""
        return TrainRun(self.folder_of(trial.number) / f"run-{trial.generation}")

    def read_trials(self) -> list[Trial]:
        """By number."""
        if not exists(self.path / "trials"):
            return []
        numbers = sorted(int(f.name) for f in list_folder(self.path / "trials") if f.name.isdigit())
        return [self.read_trial(n) for n in numbers if exists(self.folder_of(n) / "trial.json")]

    def read_trial(self, number: int) -> Trial:
        return Trial(**read_json(self.folder_of(number) / "trial.json"))

    def write_trial(self, trial: Trial) -> None:
        write_json(self.folder_of(trial.number) / "trial.json", asdict(trial))

    def write_tables(self, rows: Sequence[dict[str, Any]]) -> None:
        """`trials.csv` and `trials.parquet`."""
        names = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_bytes(self.path / "trials.csv", text.getvalue().encode())
        columns = {name: _to_column([row.get(name) for row in rows]) for name in names}
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(columns), sink)
        write_bytes(self.path / "trials.parquet", sink.getvalue().to_pybytes())

    def write_best(self, trial: Trial, recipe: str) -> None:
        """The bundle of a trial as that of the search, and the recipe that makes it again."""
        source = self.run_of(trial).bundle_path
        files = sorted((file.name for file in list_folder(source)), key="config.json".__eq__)
        for name in files:  # config.json last: a bundle that has it is complete
            write_bytes(self.path / "bundle" / name, read_bytes(source / name))
        write_bytes(self.path / "recipe.yaml", recipe.encode())

    def write_report(self, page: bytes) -> None:
        write_bytes(self.path / "report.html", page)


def _to_column(values: list[Any]) -> pa.Array:
    """Numbers as such; text where a column holds both."""
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.array([None if value is None else str(value) for value in values])
