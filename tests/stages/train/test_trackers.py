"""--track: each epoch is logged to TensorBoard and MLflow, however often a run is resumed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from mlflow import MlflowClient
from mlflow_server import run_mlflow_server
from s3_server import S3Server
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from cifake_ray import cli
from cifake_ray.config import (
    StoreConfig,
    TrainConfig,
    TuneConfig,
    fingerprint_settings,
    list_options,
)
from cifake_ray.errors import CifakeError
from cifake_ray.stages.train.driver import train_detector
from cifake_ray.stages.tune.driver import tune_detector
from cifake_ray.storage.io.paths import resolve_path
from cifake_ray.storage.runs.trackers import Tracking
from cifake_ray.storage.runs.train_run import TrainRun

pytestmark = pytest.mark.usefixtures("ray_cluster")

MEASURED = ("train_loss", "val_loss", "val_accuracy", "val_auroc", "train_s", "images_per_s")
ROW = {"epoch": 1, "step": 2, "lr": 0.001, **dict.fromkeys(MEASURED, 0.25)}
NOT_LOGGED = {"epoch"}  # to TensorBoard: it is the step of all others


@pytest.fixture(scope="session")
def store_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An MLflow store in SQLite, with its tables."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"
    MlflowClient(uri).create_experiment("made")
    return uri


@pytest.fixture
def store(store_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """The same, as the MLflow of the environment, with an experiment for this test."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store_uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", tmp_path.name)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    return MlflowClient(store_uri)


def run_train(shards: Path, run: Path, **options: Any) -> dict[str, Any]:
    log: Callable[[str], None] = options.pop("log", lambda message: None)
    on_epoch = options.pop("on_epoch", lambda row, epochs: None)
    options = {
        "epochs": 3,
        "batch_size": 16,
        "num_workers": "0",
        "val_fraction": 0.3,
        "cpus_per_worker": 1,
        "precision": "float32",
        "cache_dir": str(run.parent / "cache"),
        **options,
    }
    config = TrainConfig(shards=str(shards), run=str(run), **options)
    return train_detector(config, on_epoch, time.monotonic(), log)


def stop_at(epoch: int) -> Callable[[dict[str, Any], int], None]:
    def on_epoch(row: dict[str, Any], epochs: int) -> None:
        if row["epoch"] == epoch:
            raise KeyboardInterrupt

    return on_epoch


def read_history(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of each tag, as TensorBoard reads them."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def check_tensorboard(run: Path) -> None:
    history = read_history(run)
    scalars = read_scalars(run / "tensorboard")
    assert scalars.keys() == history[0].keys() - NOT_LOGGED
    for tag, points in scalars.items():
        assert [step for step, _ in points] == [row["epoch"] for row in history], tag
        assert [value for _, value in points] == pytest.approx([row[tag] for row in history])


def check_mlflow(run: Path, store: MlflowClient, repeated: int | None = None) -> Any:
    """The one MLflow run of the experiment; it has each epoch once, and `repeated` twice."""
    history = read_history(run)
    experiment = store.get_experiment_by_name(run.parent.name)
    (tracked,) = store.search_runs([experiment.experiment_id])
    for name in history[0]:
        points = store.get_metric_history(tracked.info.run_id, name)
        expected = [
            (r["epoch"], r[name]) for r in history for _ in range(1 + (r["epoch"] == repeated))
        ]
        assert sorted((p.step, p.value) for p in points) == expected
    return tracked


def test_every_number_of_every_epoch_is_in_the_event_files(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    summary = run_train(shards, run, track=("tensorboard",))
    check_tensorboard(run)
    assert len(read_history(run)) == 3
    assert summary["untracked"] == {}


def test_epochs_of_a_ray_worker_are_logged_too(shards: Path, tmp_path: Path) -> None:
    run_train(shards, tmp_path / "run", epochs=2, num_workers="1", track=("tensorboard",))
    check_tensorboard(tmp_path / "run")


def test_mlflow_gets_settings_epochs_and_summary(
    shards: Path, tmp_path: Path, store: MlflowClient
) -> None:
    run = tmp_path / "run"
    summary = run_train(shards, run, epochs=2, track=("mlflow",), lr=0.002)
    tracked = check_mlflow(run, store)
    assert tracked.info.status == "FINISHED"
    assert tracked.info.run_name == "run"
    assert tracked.data.params["lr"] == "0.002"
    assert tracked.data.params["model"] == "cnn"
    assert json.loads(tracked.data.params["augment"])["flip"] == 0.5
    assert "num_workers" not in tracked.data.params  # may be another when the run goes on
    assert tracked.data.metrics["summary/val_accuracy"] == summary["val_accuracy"]
    assert tracked.data.metrics["summary/best_epoch"] == summary["best_epoch"]
    assert tracked.data.tags["bundle"] == str(run / "bundle")
    assert tracked.data.tags["run"] == str(run)


def test_a_resumed_run_logs_no_epoch_twice_and_leaves_none_out(
    shards: Path, tmp_path: Path, store: MlflowClient
) -> None:
    """Epochs 1 and 2 have no tracker, the run is stopped once 3 is logged, 4 ends it."""
    run, both = tmp_path / "run", ("tensorboard", "mlflow")
    options: dict[str, Any] = {"epochs": 4}
    with pytest.raises(KeyboardInterrupt):
        run_train(shards, run, on_epoch=stop_at(1), **options)
    with pytest.raises(KeyboardInterrupt):
        run_train(shards, run, on_epoch=stop_at(2), **options)
    with pytest.raises(KeyboardInterrupt):
        run_train(shards, run, on_epoch=stop_at(3), track=both, **options)
    check_tensorboard(run)
    assert check_mlflow(run, store).info.status == "KILLED"
    for name, num_lines in (("history.jsonl", 2), ("summary.csv", 3)):  # killed before the third
        lines = (run / name).read_text().splitlines(keepends=True)
        (run / name).write_text("".join(lines[:num_lines]))
    summary = run_train(shards, run, track=both, **options)
    assert (summary["epochs"], summary["epochs_resumed"]) == (4, 2)
    check_tensorboard(run)
    tracked = check_mlflow(run, store)
    assert (tracked.info.status, tracked.data.metrics["epoch"]) == ("FINISHED", 4)


def test_a_finished_run_is_logged_to_a_tracker_that_is_added_later(
    shards: Path, tmp_path: Path, store: MlflowClient
) -> None:
    run = tmp_path / "run"
    first = run_train(shards, run, epochs=2)
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for _ in range(2):
        again = run_train(shards, run, epochs=2, track=("tensorboard", "mlflow"))
        assert {k: again[k] for k in first} == first
        check_tensorboard(run)
        assert check_mlflow(run, store).data.metrics["summary/epochs"] == 2
    assert {path: path.read_bytes() for path in files} == files


def test_event_files_go_into_a_bucket(s3_env: S3Server, tmp_path: Path) -> None:
    bucket = s3_env.make_bucket()
    run = TrainRun(resolve_path(f"s3://{bucket}/run", StoreConfig()))
    for number in (1, 2, 3):  # each a process of its own
        run.write_history([{**ROW, "epoch": n} for n in range(1, number)] or [ROW])
        with Tracking(("tensorboard",), run, {}, print) as tracking:
            tracking.log_epoch({**ROW, "epoch": number, "lr": number / 1000})
    keys = s3_env.list_keys(bucket, "run/tensorboard/")
    for key in keys:
        (tmp_path / Path(key).name).write_bytes(s3_env.get(bucket, key))
    scalars = read_scalars(tmp_path)
    assert [step for step, _ in scalars["lr"]] == [1, 2, 3]
    assert [value for _, value in scalars["lr"]] == pytest.approx([0.001, 0.002, 0.003])


@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_a_missing_package_is_refused_with_the_remedy(
    name: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: MlflowClient
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    run = tmp_path / "run"
    arguments = ["train", str(shards), str(run), "--num-workers", "0", "--track", name]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 2
    assert f'pip install "cifake-ray[{name}]"' in result.output
    assert not run.exists()


def test_stdout_is_the_result_alone(
    shards: Path, tmp_path: Path, store: MlflowClient, store_uri: str
) -> None:
    with run_mlflow_server(store_uri) as server:
        options = (
            "--track mlflow --num-workers 0 --epochs 1 --batch-size 16 --val-fraction 0.3 --json"
        )
        places = [str(shards), str(tmp_path / "run"), "--cache-dir", str(tmp_path / "cache")]
        process = subprocess.run(
            [sys.executable, "-m", "cifake_ray", "train", *places, *options.split()],
            env={**os.environ, "MLFLOW_TRACKING_URI": server.url},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout)["epochs"] == 1
    check_mlflow(tmp_path / "run", store)


def test_mlflow_without_an_address_is_refused(
    shards: Path, tmp_path: Path, store: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(ValueError, match="set MLFLOW_TRACKING_URI to the server"):
        run_train(shards, tmp_path / "run", track=("mlflow",))
    assert not (tmp_path / "run").exists()


def test_other_options_before_anything_was_trained_are_another_run(
    shards: Path, tmp_path: Path, store: MlflowClient
) -> None:
    run = tmp_path / "run"
    with pytest.raises(ValueError, match="needs a GPU"):  # its settings are logged by then
        run_train(shards, run, track=("mlflow",), device="cpu", precision="fp16")
    run_train(shards, run, track=("mlflow",))
    experiment = store.get_experiment_by_name(tmp_path.name)
    tracked = store.search_runs([experiment.experiment_id])
    ends = {r.data.params["precision"]: r.info.status for r in tracked}
    assert ends == {"fp16": "FAILED", "float32": "FINISHED"}


def test_a_server_that_is_not_there_is_refused_before_training(
    shards: Path, tmp_path: Path, store: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    with pytest.raises(CifakeError, match="--track mlflow: API request to") as refusal:
        run_train(shards, tmp_path / "run", track=("mlflow",))
    assert "secret" not in str(refusal.value)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_server_that_does_not_know_the_run_is_refused(
    shards: Path, tmp_path: Path, store: MlflowClient
) -> None:
    run = tmp_path / "run"
    run_train(shards, run, epochs=1, track=("mlflow",))
    (run / "mlflow.json").write_text('{"run_id": "0123456789abcdef0123456789abcdef"}')
    with pytest.raises(CifakeError, match=r"mlflow\.json: .*has no run 0123.*delete this file"):
        run_train(shards, run, epochs=1, track=("mlflow",))


def test_training_outlives_its_server_and_logs_later(
    shards: Path,
    tmp_path: Path,
    store: MlflowClient,
    store_uri: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, said = tmp_path / "run", []
    with run_mlflow_server(store_uri) as server:
        port = server.server_port
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)

        def on_epoch(row: dict[str, Any], epochs: int) -> None:
            if row["epoch"] == 1:
                server.shutdown()
                server.server_close()

        options: dict[str, Any] = {"track": ("mlflow",), "log": said.append}
        summary = run_train(shards, run, on_epoch=on_epoch, **options)
    assert summary["untracked"] == {"mlflow": 3}  # two epochs and the summary
    assert json.loads((run / "_SUCCESS").read_text())["untracked"] == {"mlflow": 3}
    warnings = [line for line in said if "training continues" in line]
    assert len(warnings) == 1
    assert said[-1].startswith("train: --track mlflow failed 3 times; 3 rows are missing")
    with run_mlflow_server(store_uri, port):
        assert run_train(shards, run, **options)["untracked"] == {}
    assert check_mlflow(run, store).info.status == "FINISHED"


def test_an_epoch_whose_answer_is_lost_is_logged_again(
    shards: Path,
    tmp_path: Path,
    store: MlflowClient,
    store_uri: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, said = tmp_path / "run", []
    with run_mlflow_server(store_uri) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)

        def on_epoch(row: dict[str, Any], epochs: int) -> None:
            server.loses_answers = row["epoch"] == 1

        summary = run_train(shards, run, on_epoch=on_epoch, track=("mlflow",), log=said.append)
    assert summary["untracked"] == {}
    assert said[-1] == "train: --track mlflow failed 1 times; all rows were logged in the end"
    assert check_mlflow(run, store, repeated=2).info.status == "FINISHED"


def test_trials_of_a_search_are_logged(shards: Path, tmp_path: Path, store: MlflowClient) -> None:
    space, recipe = tmp_path / "space.yaml", tmp_path / "recipe.yaml"
    space.write_text(yaml.safe_dump({"lr": [0.001, 0.01]}))
    recipe.write_text(yaml.safe_dump({"model": "cnn", "epochs": 2, "batch_size": 16}))
    run = tmp_path / "run"
    config = TuneConfig(
        shards=str(shards),
        run=str(run),
        search=(str(space),),
        recipe=str(recipe),
        searcher="grid",
        scheduler="none",
        trials=2,
        track=("tensorboard",),
        cache_dir=str(tmp_path / "cache"),
    )
    tune_detector(config, time.monotonic())
    for number in (0, 1):
        check_tensorboard(run / "trials" / f"{number:05d}" / "run-0")


def test_the_option_is_repeatable_and_no_part_of_the_fingerprint() -> None:
    seen: list[Any] = []
    app = typer.Typer()
    app.command()(cli.make_command(TrainConfig, lambda make, **rest: seen.append(make())))
    arguments = ["s", "r", "--track", "mlflow", "--track", "tensorboard"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert seen[0].track == ("mlflow", "tensorboard")
    assert list_options(seen[0]) == arguments
    assert fingerprint_settings(seen[0]) == fingerprint_settings(TrainConfig(shards="s", run="r"))
    refused = CliRunner().invoke(cli.app, ["train", "s", "r", "--track", "wandb"])
    assert refused.exit_code == 2
    assert "--track is 'wandb'; give tensorboard or mlflow" in refused.output
