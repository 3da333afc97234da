"""Reads a command line as the program would, down to its config, and runs nothing."""

from __future__ import annotations

import shlex
from functools import cache
from typing import Any

import typer
from typer.testing import CliRunner

from cifake_ray.cli import VERBS
from cifake_ray.config import SubmitConfig, TuneConfig, check_remote_paths
from cifake_ray.options import make_command
from cifake_ray.storage.presets.yaml_presets import EVERYTHING, SEARCHES, find_preset

PROGRAM = ["python", "-m", "cifake_ray"]
SCRIPT = "cifake-ray"
ON_A_CLUSTER = {"audit", "convert", "train", "tune", "evaluate", "score", "pipeline"}


@cache
def parse_entrypoint(line: str) -> Any:
    """The config that an entrypoint makes. ValueError if it makes none."""
    words = shlex.split(line)
    if words[:1] == ["python"] and words[1].startswith("jobs/"):
        words = [*PROGRAM, words[1].removeprefix("jobs/").removesuffix(".py"), *words[2:]]
    if words[: len(PROGRAM)] != PROGRAM:
        raise ValueError(f"not our program: {line}")
    verb, *arguments = words[len(PROGRAM) :]
    config = parse_words(verb, arguments)
    check_remote_paths(config)
    return config


def parse_words(verb: str, arguments: list[str]) -> Any:
    """The config of `cifake-ray VERB ARGUMENTS`, or of `cifake-ray submit VERB ARGUMENTS`.

    ValueError if it makes none.
    """
    job_class = None
    if verb == "submit":
        job_class, verb, arguments = SubmitConfig, arguments[0], arguments[1:]
    if verb not in (ON_A_CLUSTER if job_class else VERBS):
        raise ValueError(f"no such verb: {verb}")
    made: list[Any] = []
    app = typer.Typer()
    app.command()(make_command(VERBS[verb], lambda make, **options: made.append(make()), job_class))
    result = CliRunner().invoke(app, arguments)
    if not made:
        raise ValueError(f"{verb}: {result.exception}: {result.output}")
    config = made[0] if job_class is None else made[0][0]
    if job_class is not None:
        check_remote_paths(config)
    if isinstance(config, TuneConfig):
        for name in config.search:
            if name != EVERYTHING:
                find_preset(name, SEARCHES)
    return config
