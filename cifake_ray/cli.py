"""The `cifake-ray` command: parse the options of a verb, run it, print its result.

Stages are imported inside their command, so that `--help` needs neither torch nor Ray.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import typer

from cifake_ray.config import VERBS, Config, SubmitConfig
from cifake_ray.console import get_log_format, log, run_command, show_line
from cifake_ray.errors import ExitCode
from cifake_ray.options import DebugOption, JsonOption, make_command

STARTED_S = time.time()

app = typer.Typer(
    help="Tells AI-generated images from real ones, in bulk, on Ray.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _run_verb(make_config: Any, *, json_output: bool, debug: bool) -> None:
    def body() -> tuple[Any, int]:
        config = make_config()
        from cifake_ray.pipeline import run_verb

        return run_verb(config, STARTED_S)

    run_command(body, json_output=json_output, debug=debug)


def _describe(config_class: type[Config]) -> str:
    doc = (config_class.__doc__ or "").partition(": ")[2]
    return doc[:1].upper() + doc[1:]


for _name, _class in VERBS.items():
    app.command(name=_name, help=_describe(_class))(make_command(_class, _run_verb))

submit = typer.Typer(
    help="Run a verb as a job of a Ray cluster; the command ends with the job's own exit code.",
    no_args_is_help=True,
)
app.add_typer(submit, name="submit")


def _add_submission(verb: str) -> None:
    def run(make_configs: Any, *, json_output: bool, debug: bool) -> None:
        def body() -> tuple[Any, int]:
            config, job = make_configs()
            from cifake_ray.stages.submit import submit_job

            flags = ["--json"] * json_output + ["--debug"] * debug
            flags += ["--log-format", "json"] * (get_log_format() == "json")
            log_to = sys.stderr if json_output else sys.stdout
            return submit_job(config, job, verb, flags, log, partial(show_line, stream=log_to))

        run_command(body, json_output=json_output, debug=debug)

    submit.command(name=verb, help=_describe(VERBS[verb]))(
        make_command(VERBS[verb], run, SubmitConfig)
    )


for _name in ("convert", "train", "tune", "evaluate", "score", "pipeline"):
    _add_submission(_name)


@app.command()
def demo(
    out: Annotated[str, typer.Option(help="Folder for everything the demo makes")] = "demo",
    images: Annotated[int, typer.Option(help="Images in the sample")] = 3000,
    seed: Annotated[int, typer.Option(help="Same seed, same result")] = 0,
    json_output: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Run everything on a small sample: convert, train, evaluate, score and a report."""
    from cifake_ray.pipeline import run_demo

    run_command(
        lambda: run_demo(out, images=images, seed=seed), json_output=json_output, debug=debug
    )


@app.command()
def models(
    pattern: Annotated[
        str | None,
        typer.Argument(
            help="Include timm's that match this glob (default: ours and a selection of timm's)"
        ),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(help="Side of the input in pixels (default: each one's own)", min=1),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time training and scoring on this machine")
    ] = False,
    json_output: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """List the architectures that `--model` takes, with their cost and their results on CIFAKE."""

    def body() -> tuple[Any, int]:
        from cifake_ray.core.training.model_cost import list_models
        from cifake_ray.stages.malloc import keep_freed_memory
        from cifake_ray.storage.presets.model_results import read_model_results

        keep_freed_memory()  # as the workers of train and score do
        zoo = read_model_results()
        rows = list_models(pattern, zoo["rows"], image_size=image_size, measure=measure, log=log)
        return {"models": rows, "made_by": zoo["made_by"]}, ExitCode.OK

    def show(catalogue: dict[str, Any]) -> str:
        from cifake_ray.report.models_table import format_models_table

        return format_models_table(catalogue)

    run_command(body, json_output=json_output, debug=debug, show=show)


@app.command()
def doctor(json_output: JsonOption = False, debug: DebugOption = False) -> None:
    """Check this machine: versions, cores, GPUs, memory, disk, Ray and the built-in detector."""

    def body() -> tuple[Any, int]:
        from cifake_ray.stages.doctor import examine_machine

        return examine_machine()

    run_command(body, json_output=json_output, debug=debug)


@app.command()
def version(json_output: JsonOption = False, debug: DebugOption = False) -> None:
    """Print the versions of this program and of its main dependencies."""

    def body() -> tuple[Any, int]:
        from importlib.metadata import version as find_version

        names = ("cifake-ray", "ray", "torch", "torchvision", "timm", "pyarrow")
        return {name: find_version(name) for name in names}, ExitCode.OK

    run_command(body, json_output=json_output, debug=debug)


def main(verb: str | None = None, on_end: Callable[[], object] = lambda: None) -> None:
    """Run `cifake-ray`, or one verb; call `on_end` after its last line."""
    try:
        app([verb, *sys.argv[1:]] if verb else None, prog_name="cifake-ray")
    except SystemExit as end:
        # Everything is printed and Ray is stopped. An orderly exit would wait for a thread that
        # still lists a source, and about 3% of them are aborted by a library's threads (code 134).
        sys.stdout.flush()
        sys.stderr.flush()
        on_end()
        os._exit(int(end.code or 0))
