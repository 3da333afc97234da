"""`cifake-ray submit` on a cluster with a locked door: it ends as its job ends."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import aiohttp
import pyarrow.parquet as pq
import pytest
import requests
import typer
from faults.command import wait_until
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobType
from ray_head import JobsCluster
from typer.testing import CliRunner

import cifake_ray
from cifake_ray.config import (
    ConvertConfig,
    EvaluateConfig,
    ScoreConfig,
    SubmitConfig,
    TrainConfig,
    TuneConfig,
    check_remote_paths,
    list_options,
)
from cifake_ray.errors import ExitCode, ResourceError
from cifake_ray.options import make_command
from cifake_ray.stages import submit as stages_submit

CHECKOUT = Path(cifake_ray.__file__).parents[1]


@pytest.fixture
def cluster(head: JobsCluster) -> JobsCluster:
    """The cluster that the tests share, of two CPUs."""
    return head


def start(cluster: JobsCluster, *words: object, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(  # where tests run in the background, SIGINT is ignored
        [sys.executable, "-m", "cifake_ray", "submit", *map(str, words)],
        env={**cluster.env, "RAY_API_SERVER_ADDRESS": cluster.address, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def submit(
    cluster: JobsCluster, *words: object, **variables: str
) -> tuple[int, dict[str, Any], str]:
    """Exit code, the JSON object and the rest."""
    process = start(cluster, *words, "--json", **variables)
    output, errors = process.communicate(timeout=240)
    return process.returncode, json.loads(output), errors


def test_a_job_that_succeeds_gives_0_and_its_result(
    cluster: JobsCluster, sample_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out put"
    code, result, errors = submit(cluster, "score", sample_folder, out)
    assert code == 0, errors
    assert result["status"] == "SUCCEEDED"
    account = json.loads((out / "_SUCCESS").read_text())
    assert {**account, **result["result"]} == {**account, "exit_code": 0}
    assert "60 of 60 images" in errors  # the log of the job
    assert f"Ray's dashboard: {cluster.address}" in errors


def test_the_log_of_a_job_is_shown_line_by_line(
    cluster: JobsCluster, sample_folder: Path, tmp_path: Path
) -> None:
    process = start(cluster, "convert", sample_folder, tmp_path / "out")
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert "convert: 60 of 60 images (100%), 0 failed" in output
    assert "ray job stop" in errors


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--bundle", "/no/such/bundle"], ExitCode.STORAGE, "/no/such/bundle"),
        (["--max-error-rate", "0"], ExitCode.TOO_MANY_ERRORS, "not_an_image"),
        (["--num-workers", "3"], ExitCode.RESOURCES, "the cluster has 2 CPUs"),
        (["--source-kind", "list"], ExitCode.STORAGE, "list"),
    ],
)
def test_the_code_of_the_job_is_the_code_of_the_command(
    cluster: JobsCluster, tmp_path: Path, words: list[str], code: int, said: str
) -> None:
    source = tmp_path / "images"
    source.mkdir()
    (source / "broken.jpg").write_bytes(b"no image")
    found, result, errors = submit(cluster, "score", source, tmp_path / "out", *words)
    assert found == code, errors
    assert result["status"] == ("SUCCEEDED" if code == 0 else "FAILED")
    assert said in errors


def test_what_the_command_can_refuse_itself_never_becomes_a_job(
    cluster: JobsCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("flip: 0.5")
    for words, said in (
        (["score", "images", "/out"], "SRC is 'images': a job runs elsewhere"),
        (["score", "/images", "/out", "--bundle", "run"], "--bundle is 'run'"),
        (["score", "/images", "/out", "--max-error-rate", "2"], "--max-error-rate is 2"),
        (["train", "/shards", "/run", "--working-dir", str(tmp_path)], "no checkout of cifake_ray"),
        (["score", "/images", "/out", "--address", "ray://head:10001"], "--address: give http"),
        (["score", "/a", "/b", "--env", "AWS_SECRET_ACCESS_KEY=canary"], "instead of a secret"),
        (["score", "/a", "/b", "--env", "PROXY=http://me:canary@proxy"], "instead of a secret"),
        (["score", "/a", "/b", "--env", "URL=https://b/k?X-Amz-Signature=canary"], "credentials"),
        (["score", "s3://KEY:canary@b/images", "/b"], "holds credentials"),
        (["train", "/shards", "/run", "--augment", "mine.yaml"], "mine.yaml is a file here"),
        (["score", "/a", "/b", "--submission-id", "a/b"], "--submission-id a/b"),
    ):
        code, result, errors = submit(cluster, *words)
        assert (code, said in str(result["error"])) == (ExitCode.USAGE, True), (result, errors)
        assert "canary" not in errors + json.dumps(result)


def test_a_job_that_is_stopped_gives_143(
    cluster: JobsCluster, sample_folder: Path, tmp_path: Path
) -> None:
    process = start(cluster, "score", sample_folder, tmp_path / "o", "--submission-id", "long")
    assert any("submit: job long" in line for line in process.stderr or [])  # slow ones wait first
    ray_job(cluster, "stop", "long")
    output, errors = process.communicate(timeout=240)
    assert process.returncode == ExitCode.TERMINATED, (output, errors)


def test_who_stops_waiting_does_not_stop_the_job(
    cluster: JobsCluster, sample_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start(cluster, "score", sample_folder, out, "--submission-id", "left-alone")
    assert any(
        "submit: job left-alone" in line for line in process.stderr or []
    )  # slow ones wait first
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == ExitCode.INTERRUPTED
    assert "job left-alone continues" in errors
    until_s = time.monotonic() + 120
    while not (out / "_SUCCESS").exists():
        assert time.monotonic() < until_s
        time.sleep(0.2)


def test_without_waiting_the_name_of_the_job_is_given(
    cluster: JobsCluster, sample_folder: Path, tmp_path: Path
) -> None:
    code, result, errors = submit(
        cluster, "score", sample_folder, tmp_path / "o", "--no-wait", "--submission-id", "quick"
    )
    assert (code, result["submission_id"]) == (0, "quick"), errors
    code, result, errors = submit(
        cluster, "score", sample_folder, tmp_path / "o", "--submission-id", "quick"
    )
    assert code == ExitCode.RESOURCES
    assert "quick" in str(result["error"])


def test_a_wrong_token_and_no_head_are_told_apart(cluster: JobsCluster, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("another-token-0123456789")
    code, result, _ = submit(
        cluster, "score", "/a", "/b", RAY_AUTH_TOKEN_PATH=str(tmp_path / "token")
    )
    assert (code, "refuses the token" in str(result["error"])) == (ExitCode.RESOURCES, True), result
    code, result, _ = submit(cluster, "score", "/a", "/b", "--address", "http://127.0.0.1:9")
    assert (code, "no Jobs API answers" in str(result["error"])) == (ExitCode.RESOURCES, True)


def test_an_uploaded_checkout_runs_and_holds_neither_data_nor_git(
    cluster: JobsCluster, sample_folder: Path, tmp_path: Path
) -> None:
    checkout = tmp_path / "checkout"
    for name in ("cifake_ray", "jobs"):
        shutil.copytree(CHECKOUT / name, checkout / name)
    for name in (".gitignore", ".rayignore"):
        shutil.copy(CHECKOUT / name, checkout / name)
    # Also what the README's own commands write there.
    for name in (".git", "data", ".venv", "shards", "run", "scores", "report", "search"):
        (checkout / name).mkdir()
        (checkout / name / "left-out").write_text("x")
    (checkout / "cifake_ray" / "mark-of-this-checkout").write_text("x")
    version = '__version__ = "0.0.1+checkout"\n'
    with open(checkout / "cifake_ray" / "version.py", "a") as file:
        file.write(version)
    code, _, errors = submit(
        cluster, "score", sample_folder, tmp_path / "out", "--working-dir", checkout
    )
    assert code == 0, errors
    # The uploaded code ran, in the driver and in the workers.
    record = json.loads((tmp_path / "out" / "_run.json").read_text())
    assert record["tool_version"] == "0.0.1+checkout"
    parts = list((tmp_path / "out" / "scores").glob("part-*"))
    footers = [json.loads(pq.read_schema(part).metadata[b"cifake_ray"]) for part in parts]
    assert {footer["tool_version"] for footer in footers} == {"0.0.1+checkout"}
    assert cluster.temp_dir
    uploaded = {
        path.name
        for mark in cluster.temp_dir.rglob("mark-of-this-checkout")
        for path in mark.parents[1].iterdir()
    }
    assert uploaded == {"cifake_ray", "jobs"}


def test_the_metrics_of_the_workers_can_be_read(
    cluster: JobsCluster, sample_folder: Path, tmp_path: Path
) -> None:
    """As Prometheus does: from the targets that Ray names."""
    (sample := tmp_path / "images").mkdir()
    for number, path in enumerate(sorted(sample_folder.rglob("*.jp*g"))):
        shutil.copy(path, sample / f"{number}.jpg")
    (sample / "broken.jpg").write_bytes(b"no image")
    code, account, errors = submit(
        cluster, "convert", sample, tmp_path / "out", "--max-error-rate", 1
    )
    assert code == 0, errors
    assert cluster.temp_dir
    targets = json.loads((cluster.temp_dir / "prom_metrics_service_discovery.json").read_text())

    def read_images() -> dict[str, float]:
        texts = [
            requests.get(f"http://{target}/metrics", timeout=10).text
            for group in targets
            for target in group["targets"]
        ]
        lines = re.findall(r"^ray_cifake_images_total\{(.*)\} (\S+)$", "\n".join(texts), re.M)
        found = {}
        for labels, value in lines:
            pairs = dict(re.findall(r'(\w+)="([^"]*)"', labels))
            if pairs["verb"] == "convert":
                found[pairs["outcome"]] = found.get(pairs["outcome"], 0) + float(value)
        return found

    wait_until(lambda: read_images().get("not_an_image") == 1, timeout_s=60)
    assert read_images()["done"] >= account["result"]["done"]


def test_ray_job_submit_runs_a_job_file_and_keeps_its_code(
    cluster: JobsCluster, sample_folder: Path, tmp_path: Path
) -> None:
    words = ["--working-dir", str(CHECKOUT), "--", "python", "jobs/score.py"]
    ray_job(cluster, "submit", *words, str(sample_folder), str(tmp_path / "out"))
    assert (tmp_path / "out" / "_SUCCESS").exists()
    failed = ["--submission-id", "no-bundle", *words, str(sample_folder), str(tmp_path / "o")]
    ray_job(cluster, "submit", *failed, "--bundle", "/none", code=1)
    shown = subprocess.run(
        [sys.executable, "-c", SHOW_CODE, cluster.address],
        env=cluster.env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.split()[-1] == "4"


SHOW_CODE = """
import sys
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient
print(JobSubmissionClient(sys.argv[1]).get_job_info("no-bundle").driver_exit_code)
"""


def ray_job(cluster: JobsCluster, *words: str, code: int = 0) -> None:
    verb, *rest = words
    command = [sys.executable, "-m", "ray.scripts.scripts", "job", verb]
    done = subprocess.run(
        [*command, "--address", cluster.address, *rest],
        env=cluster.env,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == code, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("verb", "config"),
    [
        ("convert", ConvertConfig(src="/a b", out="/o\n'p", include=("*.jpg", "-*", "$x"))),
        ("score", ScoreConfig(src="s3://b/x", out="/o", retry_errors=True, num_workers=3)),
        ("train", TrainConfig(shards="/s", run="/r", channels_last=True, augment='{"flip": 0.5}')),
        ("train", TrainConfig(shards="/s", run="/r", num_workers="1:2", track=("mlflow",))),
        ("tune", TuneConfig(shards="/s", run="/r", search=("optimiser", "a b.yaml"))),
        ("evaluate", EvaluateConfig(shards="/s", out="/o", bundle="/b -c")),
    ],
)
def test_the_words_of_a_config_make_it_again(verb: str, config: Any) -> None:
    words = shlex.split(shlex.join(list_options(config)))
    app, made = typer.Typer(), []
    app.command()(make_command(type(config), lambda make, **flags: made.append(make())))
    result = CliRunner().invoke(app, words)
    assert made == [config], (words, result.output)


class Head:
    """What a cluster answers, in turn; an exception is raised, a last answer repeated.

    None is no answer.
    """

    def __init__(self, statuses: list[Any], tails: list[list[Any]], log: Any) -> None:
        self.statuses, self.tails, self.log = statuses, tails, log

    def get_job_info(self, name: str) -> JobDetails:
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        if isinstance(status, Exception):
            raise status
        if status is None:
            time.sleep(5)
        code = 3 if status == JobStatus.FAILED else None
        return JobDetails(
            type=JobType.SUBMISSION, entrypoint="true", status=status, driver_exit_code=code
        )

    async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
        for text in self.tails.pop(0) if self.tails else []:
            if isinstance(text, Exception):
                raise text
            if text is None:
                await asyncio.sleep(60)
            yield text

    def get_job_logs(self, name: str) -> Any:
        if isinstance(self.log, Exception):
            raise self.log
        return self.log


RUNNING, FAILED = JobStatus.RUNNING, JobStatus.FAILED
LOST = aiohttp.ClientError("lost")


@pytest.mark.parametrize(
    ("statuses", "tails"),
    [
        ([RUNNING, FAILED], [["a\n", LOST], ["a\nb\n", "c"]]),
        ([RUNNING, FAILED], [["a\n"], ["a"]]),  # less than before
        ([LOST, RUNNING, FAILED], [["a\nb"], ["a", "\nb"]]),
        ([RUNNING, FAILED], [[LOST], [LOST]]),  # no way for a log
        ([RUNNING, FAILED], [["a\n", None], ["a\nb\n"]]),  # a dead connection
        ([None, FAILED], [["a\n"], [None]]),
        ([FAILED], [[]]),
    ],
)
def test_a_job_is_followed_over_what_is_lost(
    monkeypatch: pytest.MonkeyPatch, statuses: list[Any], tails: list[list[Any]]
) -> None:
    monkeypatch.setattr(stages_submit, "TAIL_S", 0.1)
    monkeypatch.setattr(stages_submit, "ANSWER_S", 0.1)
    monkeypatch.setattr(stages_submit, "POLL_S", 0.0)
    shown: list[str] = []
    log = stages_submit._JobLog(shown.append)
    details = stages_submit._follow(cast(Any, Head(statuses, tails, "a\nb\nc")), "name", log)
    assert (details.driver_exit_code, shown) == (3, ["a", "b", "c"])


def test_lines_are_shown_when_they_are_whole_and_an_unfinished_one_at_the_end() -> None:
    shown: list[str] = []
    log = stages_submit._JobLog(shown.append)
    for text, lines in (("a", []), ("a\nb", ["a"]), ("a", ["a"]), ("a\nb\n\nc", ["a", "b", ""])):
        log.update(text)
        assert shown == lines
    log.update("a\nb\n\nc", is_whole=True)
    assert shown == ["a", "b", "", "c"]


@pytest.mark.parametrize("status", [requests.ConnectionError("gone"), None])
def test_a_head_that_is_gone_is_given_up(monkeypatch: pytest.MonkeyPatch, status: Any) -> None:
    monkeypatch.setattr(stages_submit, "PATIENCE_S", 0.1)
    monkeypatch.setattr(stages_submit, "ANSWER_S", 0.05)
    monkeypatch.setattr(stages_submit, "POLL_S", 0.02)
    head = Head([RUNNING, status], [["a\n"]], "")
    log = stages_submit._JobLog(lambda line: None)
    with pytest.raises(ResourceError, match=r"\((gone|no answer in 0 s)\); job name may still run"):
        stages_submit._follow(cast(Any, head), "name", log)


def test_a_job_whose_log_cannot_be_read_ends_all_the_same() -> None:
    head = Head([FAILED], [["a\n"]], LOST)
    shown: list[str] = []
    details = stages_submit._follow(cast(Any, head), "name", stages_submit._JobLog(shown.append))
    assert (details.driver_exit_code, shown) == (3, ["a"])


def test_the_result_is_found_among_the_lines_of_a_log() -> None:
    log = stages_submit._JobLog(lambda line: None)
    log.update('{"exit_code": 3, "done": 1}\n{"time": "x", "message": "y"}\n{broken\n[1]\n')
    assert log.find_result() == {"exit_code": 3, "done": 1}


def test_places_are_checked_whatever_the_verb_calls_them() -> None:
    with pytest.raises(ValueError, match=r"RUN is '\.\./run'"):
        check_remote_paths(TrainConfig(shards="s3://b/s", run="../run"))
    check_remote_paths(TrainConfig(shards="s3://b/s", run="/shared/run"))


def test_variables_are_split_at_the_first_equals_sign() -> None:
    assert SubmitConfig(env=("AWS_REGION=eu", "X=a=b")).variables == {
        "AWS_REGION": "eu",
        "X": "a=b",
    }
    SubmitConfig(env=("TOKENIZERS_PARALLELISM=false", "RAY_AUTH_TOKEN_PATH=/t"))
    for secret in ("HF_TOKEN", "WANDB_API_KEY", "AWS_ACCESS_KEY_ID", "DB_PASSWD", "MY_SECRET"):
        with pytest.raises(ValueError, match="instead of a secret"):
            SubmitConfig(env=(f"{secret}=x",))
    for wrong in ("AWS_REGION", "=x", "A B=c"):
        with pytest.raises(ValueError, match="give NAME=VALUE"):
            SubmitConfig(env=(wrong,))


class Deaf:
    """A cluster that refuses a job, or whose answer to it is lost."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def get_address(self) -> str:
        return "http://head"

    def submit_job(self, *, entrypoint: str, **request: Any) -> None:
        assert entrypoint.startswith("python -P -m cifake_ray score"), "imports what lies around"
        raise self.error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("taken"), "does not take the job: taken"),
        (AuthenticationError("token"), "does not take the job: token"),
        (
            OSError("reset"),
            r"not answer \(reset\); job score-1 may run: check with `ray job status score-1",
        ),
    ],
)
def test_a_job_is_called_refused_only_where_it_is(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages_submit, "_connect", lambda address: Deaf(error))
    config, job = ScoreConfig(src="/a", out="/b"), SubmitConfig(submission_id="score-1")
    with pytest.raises(ResourceError, match=message):
        stages_submit.submit_job(config, job, "score", [], print, print)


def test_an_address_that_is_no_jobs_api_is_named_by_where_it_stands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(ValueError, match=r"^RAY_ADDRESS: give http://HOST:PORT .* Jobs API"):
        stages_submit._connect(None)
    monkeypatch.delenv("RAY_ADDRESS")
    with pytest.raises(ValueError, match=r"^--address: give http://HOST:PORT"):
        stages_submit._connect(None)
