"""Tells trackers, TensorBoard and MLflow, what a training run has come to.

Floor: storage. What a tracker was told is read from where it was told, never remembered beside it:
so a run that goes on, by whoever and whenever, tells each epoch once.
"""

from __future__ import annotations

import io
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from textwrap import shorten
from typing import Any, Protocol

from cifake_ray.config import TrackerName
from cifake_ray.errors import CifakeError, UsageError
from cifake_ray.storage.io.files import (
    hash_json,
    list_folder,
    read_if_exists,
    read_json,
    write_bytes,
    write_json,
)
from cifake_ray.storage.io.paths import AnyPath
from cifake_ray.storage.runs.train_run import TrainRun

END = 0  # stands among the numbers of epochs for the summary of the run
EVENTS = "events.out.tfevents.{}.cifake_ray"  # the epoch, in six digits
# For a server that does not answer, an epoch waits seconds, not the minutes of MLflow's defaults.
MLFLOW_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # where the result of the command goes
}


class _Tracker(Protocol):
    """Where the rows of a history go. Every method raises CifakeError when it cannot."""

    def find_told(self) -> set[int]:
        """The epochs it knows, and END when it knows the summary."""

    def tell(self, epoch: int, row: dict[str, Any]) -> None:
        """A row of the history, or the summary as END."""

    def give_up(self, is_failure: bool) -> None:
        """The run ends before its end, for an error or because it was told to."""


def check_trackers(names: Sequence[TrackerName]) -> None:
    """UsageError, naming the remedy, when a tracker lacks its package or its server's address."""
    for name in names:
        spec = find_spec(name)  # the package is called as the tracker
        if spec is None or spec.origin is None:  # without an origin it is a folder of that name
            raise UsageError(
                f'--track {name} needs a package: pip install "cifake-ray[{name}]", or leave it out'
            )
    if "mlflow" in names and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise UsageError(
            "--track mlflow: set MLFLOW_TRACKING_URI to the server, such as http://HOST:5000"
        )


class Tracking:
    """Tells the trackers of a run each row once, and what they missed with the next one.

    Making it tells what the history holds already. CifakeError when a tracker cannot be reached.
    After that nothing raises: a tracker that fails is warned of once, and tried again.
    """

    def __init__(
        self,
        names: Sequence[TrackerName],
        run: TrainRun,
        settings: dict[str, Any],
        log: Callable[[str], None],
    ) -> None:
        self.log = log
        self.rows = {row["epoch"]: row for row in run.read_history()}
        self.resumed = len(self.rows)
        self.told: dict[TrackerName, set[int]] = {}
        self.unsure = set(names)  # those that must be asked what they were told
        self.failures: Counter[TrackerName] = Counter()
        make: dict[TrackerName, Callable[[], _Tracker]] = {
            "tensorboard": lambda: _TensorBoard(run.path / "tensorboard"),
            "mlflow": lambda: _MLflow(run, settings),
        }
        self.trackers = {name: make[name]() for name in names}
        for name in self.trackers:
            self._catch_up(name)

    def __enter__(self) -> Tracking:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            return
        for tracker in self.trackers.values():
            with suppress(CifakeError):
                tracker.give_up(is_failure=issubclass(kind, Exception))

    def tell(self, row: dict[str, Any]) -> None:
        """A finished epoch."""
        self.rows[row["epoch"]] = row
        self._try_all()

    def finish(self, summary: dict[str, Any]) -> dict[str, int]:
        """The summary. Gives how many epochs (the summary is one too) each tracker misses."""
        self.rows[END] = summary
        self._try_all()
        missing = {name: len(self.rows.keys() - self.told[name]) for name in self.failures}
        for name, count in self.failures.items():
            left = "all was told in the end"
            if missing[name]:
                left = f"{missing[name]} rows are missing; run the same command again to tell them"
            self.log(f"train: --track {name} failed {count} times; {left}")
        return {name: count for name, count in missing.items() if count}

    def _try_all(self) -> None:
        for name in self.trackers:
            try:
                self._catch_up(name)
            except CifakeError as error:
                self.unsure.add(name)  # the last row may have arrived without an answer
                self.failures[name] += 1
                if self.failures[name] == 1:
                    self.log(f"train: {error}; training goes on, rows are kept until it answers")

    def _catch_up(self, name: TrackerName) -> None:
        tracker = self.trackers[name]
        if name in self.unsure:
            self.told[name] = tracker.find_told()
            self.unsure.remove(name)
        for epoch, row in self.rows.items():
            if epoch not in self.told[name]:
                tracker.tell(epoch, row)
                self.told[name].add(epoch)


def _find_numbers(row: dict[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in row.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "epoch"
    }


class _TensorBoard:
    """Event files below RUN, one for each epoch, so that each appears whole, in a bucket too.

    TensorBoard reads the files of a folder one after another, in the order of their names.
    """

    def __init__(self, folder: AnyPath) -> None:
        self.folder = folder

    def find_told(self) -> set[int]:
        names = {place.name for place in list_folder(self.folder)}
        epochs = (re.fullmatch(EVENTS.format("([0-9]+)"), name) for name in names)
        return {END, *(int(match[1]) for match in epochs if match)}

    def tell(self, epoch: int, row: dict[str, Any]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        values = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in _find_numbers(row).items()
        ]
        file = io.BytesIO()
        writer, now_s = RecordWriter(file), time.time()
        for event in (
            Event(wall_time=now_s, file_version="brain.Event:2"),
            Event(wall_time=now_s, step=epoch, summary=Summary(value=values)),
        ):
            writer.write(event.SerializeToString())
        write_bytes(self.folder / EVENTS.format(f"{epoch:06d}"), file.getvalue())

    def give_up(self, is_failure: bool) -> None:
        """Event files say nothing of how a run ended."""


class _MLflow:
    """A run on an MLflow server; its id is kept in RUN/mlflow.json.

    CifakeError when the server cannot be reached or does not know that id.
    """

    def __init__(self, run: TrainRun, settings: dict[str, Any]) -> None:
        for name, value in MLFLOW_DEFAULTS.items():
            os.environ.setdefault(name, value)
        with _explain_mlflow():
            from mlflow import MlflowClient

            self.client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
            self.run_id = self._find_run(run, settings)
            self._log(
                params={
                    name: value if isinstance(value, str) else json.dumps(value)
                    for name, value in settings.items()
                },
                tags={"run": str(run.path)},
            )
            if not self._is_finished():
                self.client.update_run(self.run_id, status="RUNNING")

    def _find_run(self, run: TrainRun, settings: dict[str, Any]) -> str:
        paper, digest = run.path / "mlflow.json", hash_json(settings)
        # Until something is trained there, a folder may get other options; MLflow's runs may not.
        if read_if_exists(paper) is None or read_json(paper).get("settings", digest) != digest:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "cifake_ray"
            made = self.client.create_run(self._find_experiment(name), run_name=run.path.name)
            write_json(paper, {"run_id": made.info.run_id, "settings": digest})
        run_id = str(read_json(paper).get("run_id"))
        from mlflow.exceptions import MlflowException

        try:
            is_there = self.client.get_run(run_id).info.lifecycle_stage == "active"
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            is_there = False
        if not is_there:
            raise CifakeError(
                f"{paper}: the server of MLFLOW_TRACKING_URI has no run {run_id}; name the server"
                " that has it, or delete this file to begin another run there"
            )
        return run_id

    def _find_experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        if (found := self.client.get_experiment_by_name(name)) is None:
            try:
                return str(self.client.create_experiment(name))
            except MlflowException:  # another run was faster
                if (found := self.client.get_experiment_by_name(name)) is None:
                    raise
        return str(found.experiment_id)

    def _is_finished(self) -> bool:
        return bool(self.client.get_run(self.run_id).info.status == "FINISHED")

    def _log(
        self,
        metrics: dict[str, float] | None = None,
        epoch: int = 0,
        params: dict[str, str] | None = None,
        tags: dict[str, str] | None = None,
    ) -> None:
        from mlflow.entities import Metric, Param, RunTag

        now_ms = int(time.time() * 1000)
        self.client.log_batch(
            self.run_id,
            metrics=[Metric(name, value, now_ms, epoch) for name, value in (metrics or {}).items()],
            params=[Param(name, value) for name, value in (params or {}).items()],
            tags=[RunTag(name, value) for name, value in (tags or {}).items()],
        )

    def find_told(self) -> set[int]:
        with _explain_mlflow():
            epochs = {point.step for point in self.client.get_metric_history(self.run_id, "epoch")}
            return epochs | ({END} if self._is_finished() else set())

    def tell(self, epoch: int, row: dict[str, Any]) -> None:
        with _explain_mlflow():
            if epoch != END:
                # The epoch comes last: it says that the others have arrived.
                self._log({**_find_numbers(row), "epoch": epoch}, epoch)
                return
            numbers = {f"summary/{name}": value for name, value in _find_numbers(row).items()}
            self._log(numbers, row["epochs"], tags={"bundle": row["bundle"]})
            self.client.set_terminated(self.run_id, "FINISHED")

    def give_up(self, is_failure: bool) -> None:
        with _explain_mlflow():
            self.client.set_terminated(self.run_id, "FAILED" if is_failure else "KILLED")


@contextmanager
def _explain_mlflow() -> Iterator[None]:
    """What MLflow raises becomes a CifakeError of one line, without credentials of an address."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        reason = shorten(re.sub(r"//[^/@\s]*@", "//", str(error)), 240, placeholder=" ...")
        raise CifakeError(
            f"--track mlflow: {reason}; check MLFLOW_TRACKING_URI and the server behind it"
        ) from error
