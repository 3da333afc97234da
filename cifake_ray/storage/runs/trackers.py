"""Log the epochs of a training run to trackers: TensorBoard and MLflow.

The last epoch that a tracker has is read from the tracker, and newer ones are logged. So a run that
is resumed, anywhere and at any time, omits no epoch; one whose answer was lost may appear twice.
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
from typing import Any

from cifake_ray.config import TrackerName
from cifake_ray.errors import CifakeError, UsageError
from cifake_ray.storage.io.files import (
    hash_json,
    list_folder,
    make_folder,
    read_if_exists,
    read_json,
    write_bytes,
    write_json,
)
from cifake_ray.storage.runs.train_run import TrainRun

EVENTS = "events.out.tfevents.{}.cifake_ray"  # the epoch, in six digits
# If a server does not answer, an epoch waits seconds, not the minutes of MLflow's defaults.
MLFLOW_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # where the result of the command goes
}


def check_trackers(names: Sequence[TrackerName]) -> None:
    """Raise UsageError when a tracker lacks its package or its server's address."""
    for name in names:
        spec = find_spec(name)  # the package has the name of the tracker
        if spec is None or spec.origin is None:  # without an origin it is a folder of that name
            raise UsageError(
                f'--track {name} needs a package: pip install "cifake-ray[{name}]", or leave it out'
            )
    if "mlflow" in names and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise UsageError(
            "--track mlflow: set MLFLOW_TRACKING_URI to the server, such as http://HOST:5000"
        )


class Tracking:
    """Logs each epoch to the trackers of a run, and again with the next one where that failed.

    The constructor logs the epochs of the history. CifakeError when a tracker cannot be reached.
    After that nothing raises: the first failure of a tracker is logged and training continues.
    """

    def __init__(
        self,
        names: Sequence[TrackerName],
        run: TrainRun,
        settings: dict[str, Any],
        log: Callable[[str], None],
    ) -> None:
        self.log = log
        self.rows = run.read_history()
        self.resumed = len(self.rows)
        self.summary: dict[str, Any] | None = None
        self.failures: Counter[TrackerName] = Counter()
        self.trackers = {
            name: _MLflow(run, settings) if name == "mlflow" else _TensorBoard(run)
            for name in names
        }
        for tracker in self.trackers.values():
            self._catch_up(tracker)

    def __enter__(self) -> Tracking:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            return
        for tracker in self.trackers.values():
            with suppress(CifakeError):
                tracker.abort("FAILED" if issubclass(kind, Exception) else "KILLED")

    def log_epoch(self, row: dict[str, Any]) -> None:
        """Log a finished epoch."""
        self.rows.append(row)
        self._try_all()

    def finish(self, summary: dict[str, Any]) -> dict[str, int]:
        """Log the summary. Return how many rows, including it, each tracker lacks, if any."""
        self.summary = summary
        self._try_all()
        missing = {
            name: len(self._find_missing(tracker)) + (not tracker.has_summary)
            for name, tracker in self.trackers.items()
        }
        for name, count in self.failures.items():
            left = "all rows were logged in the end"
            if missing[name]:
                left = f"{missing[name]} rows are missing; run the same command again to log them"
            self.log(f"train: --track {name} failed {count} times; {left}")
        return {name: count for name, count in missing.items() if count}

    def _try_all(self) -> None:
        for name, tracker in self.trackers.items():
            try:
                self._catch_up(tracker)
            except CifakeError as error:
                self.failures[name] += 1
                if self.failures[name] == 1:
                    self.log(f"train: {error}; training continues, rows are kept until it answers")

    def _catch_up(self, tracker: _TensorBoard | _MLflow) -> None:
        for row in self._find_missing(tracker):
            tracker.log_epoch(row)
            tracker.last_epoch = row["epoch"]
        if self.summary is not None and not tracker.has_summary:
            tracker.log_summary(self.summary)
            tracker.has_summary = True

    def _find_missing(self, tracker: _TensorBoard | _MLflow) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["epoch"] > tracker.last_epoch]


def _find_metrics(row: dict[str, Any]) -> dict[str, float]:
    """Return the metrics of a row: every number except the epoch, which is their step."""
    return {
        name: float(value)
        for name, value in row.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "epoch"
    }


class _TensorBoard:
    """Event files below RUN, one for each epoch, so that each appears whole, in a bucket too.

    TensorBoard reads the files of a folder in the order of their names. They hold neither a summary
    nor how the run ended.
    """

    has_summary = True  # there is none to log

    def __init__(self, run: TrainRun) -> None:
        self.folder = run.path / "tensorboard"
        paths = list_folder(self.folder)
        names = [re.fullmatch(EVENTS.format("([0-9]+)"), path.name) for path in paths]
        self.last_epoch = max((int(name[1]) for name in names if name), default=0)

    def log_epoch(self, row: dict[str, Any]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        metrics = _find_metrics(row).items()
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics]
        file, now_s = io.BytesIO(), time.time()
        writer = RecordWriter(file)
        writer.write(Event(wall_time=now_s, file_version="brain.Event:2").SerializeToString())
        event = Event(wall_time=now_s, step=row["epoch"], summary=Summary(value=values))
        writer.write(event.SerializeToString())
        make_folder(self.folder, parents=False)
        write_bytes(self.folder / EVENTS.format(f"{row['epoch']:06d}"), file.getvalue())

    def log_summary(self, summary: dict[str, Any]) -> None: ...

    def abort(self, status: str) -> None: ...


@contextmanager
def _explain_mlflow() -> Iterator[None]:
    """Turn what MLflow raises into a one-line CifakeError without credentials of an address."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        reason = shorten(re.sub(r"//[^/@\s]*@", "//", str(error)), 240, placeholder=" ...")
        raise CifakeError(
            f"--track mlflow: {reason}; check MLFLOW_TRACKING_URI and the server behind it"
        ) from error


class _MLflow:
    """A run on an MLflow server; its id is stored in RUN/mlflow.json.

    CifakeError when the server cannot be reached or has no run of that id.
    """

    def __init__(self, run: TrainRun, settings: dict[str, Any]) -> None:
        for name, value in MLFLOW_DEFAULTS.items():
            os.environ.setdefault(name, value)
        with _explain_mlflow():
            from mlflow import MlflowClient
            from mlflow.entities import Param, RunTag

            self.client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
            self.run_id = self._claim_run(run, settings)
            self.has_summary = self.client.get_run(self.run_id).info.status == "FINISHED"
            points = self.client.get_metric_history(self.run_id, "epoch")
            self.last_epoch = max((point.step for point in points), default=0)
            params = [
                Param(name, value if isinstance(value, str) else json.dumps(value))
                for name, value in settings.items()
            ]
            self.client.log_batch(self.run_id, params=params, tags=[RunTag("run", str(run.path))])
            if not self.has_summary:
                self.client.update_run(self.run_id, status="RUNNING")

    def _claim_run(self, run: TrainRun, settings: dict[str, Any]) -> str:
        """Return the id of the run in RUN/mlflow.json, or of a new run."""
        from mlflow.exceptions import MlflowException

        path, digest = run.path / "mlflow.json", hash_json(settings)
        # Until something is trained there, a folder may get other options; MLflow's runs may not.
        if read_if_exists(path) is None or read_json(path).get("settings", digest) != digest:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "cifake_ray"
            made = self.client.create_run(self._find_experiment(name), run_name=run.path.name)
            write_json(path, {"run_id": made.info.run_id, "settings": digest})
        run_id = str(read_json(path).get("run_id"))
        try:
            is_there = self.client.get_run(run_id).info.lifecycle_stage == "active"
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            is_there = False
        if not is_there:
            raise CifakeError(
                f"{path}: the server of MLFLOW_TRACKING_URI has no run {run_id}; name the server"
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

    def _log_metrics(self, metrics: dict[str, float], epoch: int) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        points = [Metric(name, value, now_ms, epoch) for name, value in metrics.items()]
        self.client.log_batch(self.run_id, metrics=points)

    @_explain_mlflow()
    def log_epoch(self, row: dict[str, Any]) -> None:
        # The epoch is logged last: if it is there, the others are.
        self._log_metrics({**_find_metrics(row), "epoch": row["epoch"]}, row["epoch"])

    @_explain_mlflow()
    def log_summary(self, summary: dict[str, Any]) -> None:
        metrics = {f"summary/{name}": value for name, value in _find_metrics(summary).items()}
        self._log_metrics(metrics, summary["epochs"])
        self.client.set_tag(self.run_id, "bundle", summary["bundle"])
        self.client.set_terminated(self.run_id, "FINISHED")

    @_explain_mlflow()
    def abort(self, status: str) -> None:
        self.client.set_terminated(self.run_id, status)
