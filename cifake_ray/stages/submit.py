"""Runs a verb as a job of a Ray cluster, over its Jobs API.

Floor: stages. `ray job submit` ends with 0 or 1; here the command ends with the job's own code.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from cifake_ray.config import (
    JOBS_API,
    SubmitConfig,
    check_endpoint,
    check_remote_paths,
    list_options,
)
from cifake_ray.errors import ExitCode, ResourceError, UsageError
from cifake_ray.stages.cluster import TOKEN_REMEDY
from cifake_ray.storage.io.paths import refuse_credentials

ADDRESS = "RAY_API_SERVER_ADDRESS"  # goes before RAY_ADDRESS, and Ray lets both go before arguments
PATIENCE_S = 120.0  # a head that is silent for longer is given up, not the job
ANSWER_S = (10.0, 300.0)  # to connect, to answer; Ray itself would wait for ever
QUIET_S = 60.0  # a log that says nothing for so long may have lost its connection
POLL_S = 1.0

LOST = (
    RuntimeError,
    OSError,
    AuthenticationError,
    aiohttp.ClientError,
    requests.RequestException,
)


class _Client(JobSubmissionClient):
    """One that does not wait for ever."""

    def _do_request(self, *args: Any, **options: Any) -> requests.Response:
        return super()._do_request(*args, **{"timeout": ANSWER_S, **options})


def submit_job(
    config: Any,
    job: SubmitConfig,
    verb: str,
    flags: Sequence[str],
    log: Callable[[str], None],
    show_log: Callable[[str], None],
) -> tuple[dict[str, Any], int]:
    """Start `verb` with the options of `config` there, show its log, and give its exit code.

    `flags` are words without a config, such as --debug. With --json among them the job prints its
    result as JSON, which is `result` here.
    UsageError for what cannot run elsewhere, ResourceError for a cluster that does not take it.
    """
    check_remote_paths(config)
    _check_words(config, job)
    words = ["python", "-m", "cifake_ray", verb, *list_options(config), *flags]
    runtime_env: dict[str, Any] = {"env_vars": job.variables}
    if job.working_dir is not None:
        if not (Path(job.working_dir) / "cifake_ray" / "__main__.py").is_file():
            raise UsageError(
                f"--working-dir {job.working_dir}: no checkout of cifake_ray lies there"
            )
        runtime_env["working_dir"] = job.working_dir
    client = _connect(job.address)
    address = client.get_address()
    name = job.submission_id or f"{verb}-{secrets.token_hex(8)}"
    try:
        client.submit_job(entrypoint=shlex.join(words), runtime_env=runtime_env, submission_id=name)
    except LOST as error:
        _check_refused(client, name, error)
    result = {"command": "submit", "verb": verb, "submission_id": name, "address": address}
    try:
        log(f"submit: job {name}, on the dashboard {address}/#/jobs/{name}")
        log(f"submit: `ray job stop {name} --address {address}` ends it")
        if not job.wait:
            log(f"submit: `ray job logs {name} --follow --address {address}` shows it")
            return {**result, "status": str(JobStatus.PENDING)}, ExitCode.OK
        job_log = _Log(show_log)
        details = _follow(client, name, job_log)
    except KeyboardInterrupt as interrupt:
        raise type(interrupt)(
            f"not waiting any longer: job {name} goes on; `ray job stop {name} --address {address}`"
            " ends it"
        ) from None
    code = _read_code(details)
    said = {"result": job_log.read_result()} if "--json" in flags else {}
    return {**result, "status": str(details.status), **said}, code


def _check_refused(client: JobSubmissionClient, name: str, error: Exception) -> None:
    """ResourceError unless only the answer was lost, and the job is there."""
    if isinstance(error, RuntimeError | AuthenticationError):  # the cluster's own word
        raise ResourceError(f"the cluster does not take the job: {error}") from error
    try:
        client.get_job_info(name)
    except RuntimeError:  # it knows of no such job
        raise ResourceError(f"the cluster does not take the job: {error}") from error
    except LOST:
        raise ResourceError(
            f"the cluster does not answer ({error}); job {name} may run: `ray job status {name}"
            f" --address {client.get_address()}` tells"
        ) from error


def _check_words(config: Any, job: SubmitConfig) -> None:
    """UsageError for what would be shown to all who see the job, and for files of this machine."""
    for field in fields(config):
        value = getattr(config, field.name)
        for word in value if isinstance(value, tuple) else (value,):
            if not isinstance(word, str):
                continue
            refuse_credentials(word)
            if job.working_dir is None and len(word) < 256 and not Path(word).is_absolute():
                _refuse_file(word)
    for value in job.variables.values():
        refuse_credentials(value)


def _refuse_file(word: str) -> None:
    if "\0" not in word and Path(word).is_file():
        raise UsageError(
            f"{word} is a file here: a job runs elsewhere; give a URI or an absolute path that"
            " every node sees, or --working-dir"
        )


def _connect(address: str | None) -> _Client:
    found = {"--address": address} | {n: os.environ.get(n) for n in (ADDRESS, "RAY_ADDRESS")}
    name, address = next(((n, v) for n, v in found.items() if v), ("--address", ""))
    check_endpoint(address, name, JOBS_API)
    os.environ[ADDRESS] = address
    try:
        return _Client(address)
    except AuthenticationError as error:
        raise ResourceError(
            f"{address} refuses the token ({str(error).splitlines()[0]}); {TOKEN_REMEDY}"
        ) from error
    except (RuntimeError, OSError) as error:
        raise ResourceError(
            f"no Jobs API answers at {address} ({str(error).splitlines()[0]}); is the head up, with"
            " ray[default] installed, and its port 8265 forwarded?"
        ) from error


class _Log:
    """What a job has said, shown line by line, each line once."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self.show = show
        self.text, self.rest = "", ""

    def add(self, text: str) -> None:
        self.text += text
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            self.show(line)

    async def tail(self, client: JobSubmissionClient, name: str) -> None:
        """Ray tells a log from its beginning, also after a lost connection."""
        known = len(self.text)
        texts = client.tail_job_logs(name)
        with suppress(StopAsyncIteration):
            while True:
                text = await asyncio.wait_for(anext(texts), QUIET_S)
                self.add(text[known:])
                known = max(0, known - len(text))

    def finish(self, whole: str) -> None:
        """What was not shown yet, when the job is over."""
        self.add(whole[len(self.text) :])
        if self.rest:
            self.show(self.rest)

    def read_result(self) -> dict[str, Any] | None:
        """The last line that is the result of a command."""
        for line in reversed(self.text.splitlines()):
            with suppress(ValueError):
                found = json.loads(line)
                if isinstance(found, dict) and "exit_code" in found:
                    return found
        return None


def _follow(client: JobSubmissionClient, name: str, job_log: _Log) -> JobDetails:
    """The details of a job once it has ended. The head may be silent for PATIENCE_S."""
    lost_s = None
    while True:
        try:
            client.get_job_info(name)  # it answers
            lost_s = None
            with suppress(*LOST):  # not every way to a head lets a log through
                asyncio.run(job_log.tail(client, name))
            details = client.get_job_info(name)
            if details.status.is_terminal():
                with suppress(*LOST):
                    job_log.finish(client.get_job_logs(name))
                return details
        except LOST as error:
            lost_s = time.monotonic() if lost_s is None else lost_s
            if time.monotonic() - lost_s > PATIENCE_S:
                raise ResourceError(
                    f"the cluster has not answered for {PATIENCE_S:.0f} s ({error}); job {name} may"
                    " go on: run the same command again, it goes on from what is done"
                ) from error
        time.sleep(POLL_S)


def _read_code(details: JobDetails) -> int:
    if details.status == JobStatus.STOPPED:
        return ExitCode.TERMINATED
    code: int | None = details.driver_exit_code
    if code is None:
        reason = str(details.message).strip().splitlines() or ["no reason given"]
        raise ResourceError(f"the job could not run: {reason[-1]}")
    return code if code >= 0 else 128 - code
