"""Options of `submit`, which runs a verb as a job of a Ray cluster."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar

from cifake_ray.config.fields import Doc, check, check_endpoint, doc_of
from cifake_ray.errors import UsageError

BUNDLE_OPTIONS = ("bundle", "weights", "teacher")  # paths, or the names of built-in detectors
PATH_OPTIONS = ("out", "audit", *BUNDLE_OPTIONS)  # as all positional arguments are
SECRETS = re.compile(
    r"SECRET|PASSW|PWD|CREDENTIAL|CONNECTION_STRING|(^|_)(API)?KEY(_ID|S)?$|(^|_)TOKEN$",
    re.IGNORECASE,
)
JOBS_API = "the Jobs API of the cluster, usually at port 8265 of its head"


@dataclass(frozen=True, kw_only=True)
class SubmitConfig:
    """submit: run a verb as a job of a Ray cluster, and exit with the job's exit code."""

    PANEL: ClassVar[str] = "Job"

    address: Annotated[
        str | None, Doc("The cluster's Jobs API, such as http://HEAD:8265 (default: RAY_ADDRESS)")
    ] = None
    wait: Annotated[bool, Doc("Show the job's log and wait for its end")] = True
    submission_id: Annotated[str | None, Doc("Name of the job (default: Ray makes one)")] = None
    working_dir: Annotated[
        str | None, Doc("Checkout to upload and run (default: what the cluster has installed)")
    ] = None
    env: Annotated[
        tuple[str, ...],
        Doc("NAME=VALUE for the job; every user of the cluster can read it, so no secrets"),
    ] = ()

    def __post_init__(self) -> None:
        check_endpoint(self.address, "--address", JOBS_API)
        check(
            self.submission_id is None
            or re.fullmatch(r"[A-Za-z0-9][\w.-]{0,199}", self.submission_id, re.ASCII) is not None,
            f"--submission-id {self.submission_id}: give letters, digits, '-', '_' and '.'",
        )
        for item in self.env:
            name, equals, value = item.partition("=")
            check(
                bool(equals) and re.fullmatch(r"[A-Za-z_]\w*", name) is not None,
                f"--env {name}: give NAME=VALUE",
            )
            check(
                not SECRETS.search(name) and re.search(r"://[^/\s]*@", value) is None,
                f"--env {name}: Ray stores and shows the variables of a job; give the nodes a role"
                " (instance profile, IRSA) instead of a secret",
            )

    @property
    def variables(self) -> dict[str, str]:
        """Return the variables that `--env` sets."""
        return dict(item.split("=", 1) for item in self.env)


def check_remote_paths(config: Any, built_ins: Collection[str] = ()) -> None:
    """Raise UsageError for a path that means nothing on another machine.

    `built_ins` are names of detectors, which every machine has.
    """
    for field in fields(config):
        doc, given = doc_of(type(config), field.name), getattr(config, field.name)
        if not doc.positional and field.name not in PATH_OPTIONS:
            continue
        for value in config.teachers if field.name == "teacher" else [given]:
            is_name = value is None or (field.name in BUNDLE_OPTIONS and value in built_ins)
            if not is_name and not re.match(r"/|[a-z][a-z0-9+.-]*://", value):
                name = field.name.upper() if doc.positional else f"--{field.name.replace('_', '-')}"
                raise UsageError(
                    f"{name} is {value!r}: a job runs elsewhere; give s3://BUCKET/... or an"
                    " absolute path that every node sees"
                )
