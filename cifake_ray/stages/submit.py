"""Run a verb as a job of a Ray cluster, through its Jobs API.

`ray job submit` exits with 0 or 1; `cifake-ray submit` exits with the exit code of the job.
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
from multiprocessing import TimeoutError as PoolTimeout
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import aiohttp
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
from cifake_ray.storage.bundles.built_ins import list_built_ins
from cifake_ray.storage.io.paths import refuse_credentials

ADDRESS = "RAY_API_SERVER_ADDRESS"  # Ray prefers it to RAY_ADDRESS, and both to an argument
ANSWER_S = 30.0  # wait for an answer of the head; Ray's client itself would wait for ever
PATIENCE_S = 120.0  # stop waiting for a head that has not answered for that long; the job continues
TAIL_S = 60.0  # follow a log for that long before reading the status: the connection may be dead
POLL_S = 1.0

REFUSED = (RuntimeError, AuthenticationError)  # the head has answered
LOST = (*REFUSED, OSError, aiohttp.ClientError)


def submit_job(
    config: Any,
    job: SubmitConfig,
    verb: str,
    flags: Sequence[str],
    log: Callable[[str], None],
    show_log: Callable[[str], None],
) -> tuple[dict[str, Any], int]:
    """Run `verb` with `config` on the cluster, show the job's log and return its exit code.

    `flags` are options without a field in `config`, such as --debug. With --json among them the
    job prints its result as JSON, which is returned here as `result`.
    UsageError for what cannot run elsewhere, ResourceError when the cluster does not take the job.
    """
    _check_request(config, job)
    client = _connect(job.address)
    address = client.get_address()
    name = job.submission_id or f"{verb}-{secrets.token_hex(8)}"
    # -P: nothing is imported from the folder where the cluster was started.
    words = ["python", "-P", "-m", "cifake_ray", verb, *list_options(config), *flags]
    upload = {"working_dir": job.working_dir} if job.working_dir is not None else {}
    request = {
        "entrypoint": shlex.join(words),
        "runtime_env": {"env_vars": job.variables, **upload},
        "submission_id": name,
    }
    try:
        _ask(PATIENCE_S, client.submit_job, **request)
    except REFUSED as error:
        raise ResourceError(f"the cluster does not take the job: {error}") from error
    except LOST as error:
        raise ResourceError(
            f"the cluster does not answer ({error}); job {name} may run: check with `ray job status"
            f" {name} --address {address}`"
        ) from error
    result = {"command": "submit", "verb": verb, "submission_id": name, "address": address}
    try:
        log(f"submit: job {name}, on the dashboard {address}/#/jobs/{name}")
        log(f"submit: `ray job stop {name} --address {address}` ends it")
        if not job.wait:
            log(f"submit: `ray job logs {name} --follow --address {address}` shows it")
            return {**result, "status": str(JobStatus.PENDING)}, ExitCode.OK
        job_log = _JobLog(show_log)
        details = _follow(client, name, job_log)
    except KeyboardInterrupt as interrupt:
        raise type(interrupt)(
            f"not waiting any longer: job {name} continues; `ray job stop {name} --address"
            f" {address}` ends it"
        ) from None
    code = _read_code(details)
    job_result = {"result": job_log.find_result()} if "--json" in flags else {}
    return {**result, "status": str(details.status), **job_result}, code


def _check_request(config: Any, job: SubmitConfig) -> None:
    """Raise UsageError for paths of this machine, and for secrets that the cluster would show."""
    check_remote_paths(config, list_built_ins())
    values = [getattr(config, field.name) for field in fields(config)]
    words = [word for value in values for word in (value if isinstance(value, tuple) else (value,))]
    for word in filter(lambda word: isinstance(word, str), words):
        refuse_credentials(word)
        if job.working_dir is None and not Path(word).is_absolute() and os.path.isfile(word):
            raise UsageError(
                f"{word} is a file here: a job runs elsewhere; give a URI or an absolute path that"
                " every node sees, or --working-dir"
            )
    for value in job.variables.values():
        refuse_credentials(value)
    checkout = job.working_dir
    if checkout is not None and not (Path(checkout) / "cifake_ray" / "__main__.py").is_file():
        raise UsageError(f"--working-dir {checkout}: no checkout of cifake_ray is there")


def _connect(address: str | None) -> JobSubmissionClient:
    """Return a client of the Jobs API at `address`, or at the address in Ray's variables."""
    found = {"--address": address} | {n: os.environ.get(n) for n in (ADDRESS, "RAY_ADDRESS")}
    name, address = next(((n, v) for n, v in found.items() if v), ("--address", ""))
    check_endpoint(address, name, JOBS_API)
    os.environ[ADDRESS] = address
    try:
        client: JobSubmissionClient = _ask(ANSWER_S, JobSubmissionClient, address)
    except AuthenticationError as error:
        raise ResourceError(
            f"{address} refuses the token ({str(error).splitlines()[0]}); {TOKEN_REMEDY}"
        ) from error
    except (RuntimeError, OSError) as error:
        raise ResourceError(
            f"no Jobs API answers at {address} ({str(error).splitlines()[0]}); is the head up, with"
            " ray[default] installed, and its port 8265 forwarded?"
        ) from error
    return client


def _ask(timeout_s: float, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Return the result of `function`. TimeoutError after `timeout_s`, while its thread runs on."""
    with ThreadPool(1) as pool:  # of daemon threads, which keep no process alive
        try:
            return pool.apply_async(function, args, options).get(timeout_s)
        except PoolTimeout:
            raise TimeoutError(f"no answer in {timeout_s:.0f} s") from None


class _JobLog:
    """Shows the log of a job line by line, each line once."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self.show, self.text, self.num_shown = show, "", 0

    def update(self, text: str, is_whole: bool = False) -> None:
        """Show what is new in `text`, the log from its beginning; a last line once it is whole."""
        end = len(text) if is_whole else text.rfind("\n") + 1
        if end > self.num_shown:
            for line in text[self.num_shown : end].removesuffix("\n").split("\n"):
                self.show(line)
            self.text, self.num_shown = text, end

    async def tail(self, client: JobSubmissionClient, name: str) -> None:
        """Follow the log for `TAIL_S`, or until the job ends or the connection is lost."""
        text = ""  # Ray sends a log from its beginning, also when it is followed again
        with suppress(*LOST):  # some proxies block the websocket of the log
            async with asyncio.timeout(TAIL_S):
                async for more in client.tail_job_logs(name):
                    text += more
                    self.update(text)

    def find_result(self) -> dict[str, Any] | None:
        """Return the last line that is the result of a command."""
        for line in reversed(self.text.splitlines()):
            with suppress(ValueError):
                found = json.loads(line)
                if isinstance(found, dict) and "exit_code" in found:
                    return found
        return None


def _follow(client: JobSubmissionClient, name: str, job_log: _JobLog) -> JobDetails:
    """Show the log of a job until it has ended, and return its details.

    ResourceError when the head has not answered for PATIENCE_S.
    """
    lost_s = None
    while True:
        asyncio.run(job_log.tail(client, name))
        try:
            details: JobDetails = _ask(ANSWER_S, client.get_job_info, name)
            lost_s = None
            if details.status.is_terminal():
                with suppress(*LOST):
                    job_log.update(_ask(PATIENCE_S, client.get_job_logs, name), is_whole=True)
                return details
        except LOST as error:
            lost_s = lost_s or time.monotonic()
            if time.monotonic() - lost_s > PATIENCE_S:
                raise ResourceError(
                    f"the cluster has not answered for {PATIENCE_S:.0f} s ({error}); job {name} may"
                    " still run: run the same command again to resume"
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
