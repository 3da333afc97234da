"""The `cifake-ray` command: parse the options of a verb, run it, print its result.

Stages are imported inside their command, so that `--help` needs neither torch nor Ray.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version as find_version
from typing import Annotated, Any, TypeVar

import typer

from cifake_ray.command import Command, Group
from cifake_ray.config import VERBS, DoctorConfig, StoreConfig, SubmitConfig
from cifake_ray.console import get_log_format, log, run_command, show_line
from cifake_ray.errors import ExitCode, UsageError, suggest_word
from cifake_ray.options import SECTIONS, DebugOption, JsonOption, format_config, make_command
from cifake_ray.report.record_text import format_checks

Function = TypeVar("Function", bound=Callable[..., Any])
STARTED_S = time.monotonic()

EXAMPLES = {  # of each command, without `cifake-ray`
    "": ("demo", "score PHOTOS SCORES", "train --help"),
    "sample": ("sample images --images 500",),
    "audit": ("audit CIFAKE audited", "audit shards audited --sample 100000"),
    "convert": (
        "convert CIFAKE shards",
        "convert CIFAKE shards --audit audited --dedupe bytes --reencode jpeg:90",
        "convert photos.csv shards --include '*.jpg' --dry-run",
        "convert s3://photos/2026 s3://shards/2026 --num-workers 8",
    ),
    "train": (
        "train shards run --recipe fast",
        "train shards run --model resnet18 --image-size 64 --epochs 20",
        "train shards run --weights folder --freeze-epochs 2 --device cuda",
        "train shards runs --leave-one-source-out",
    ),
    "tune": (
        "tune shards search --trials 16",
        "tune shards search --search early-stopping --search mine.yaml --scheduler asha",
    ),
    "evaluate": (
        "evaluate shards --bundle run --out report",
        "evaluate shards --split validation --out report",
        "evaluate scores.csv --out report --slice size --slice image_type",
    ),
    "score": (
        "score photos scores",
        "score photos scores --bundle run --target-fpr 0.01",
        "score s3://photos/2026 s3://scores/2026 --s3-profile work",
    ),
    "compare": (
        "compare report-a report-b --out compare.html",
        "compare cnn=seed0 cnn=seed1 resnet=seed2 resnet=seed3 --out table.tex",
    ),
    "decide": (
        "decide scores decisions --target-fpr 0.01 --by source",
        "decide scores decisions --real my-photos.txt --settled verdicts.csv",
    ),
    "pipeline": ("pipeline CIFAKE out --epochs 8",),
    "verify": ("verify scores",),
    "repair": ("repair scores",),
    "export": (
        "export scores scores.csv",
        "export scores tasks.json --format label-studio --sort margin --top 50 --by source",
        "export run model.onnx",
    ),
    "review": ("review scores", "review scores page.html --decisions decisions"),
    "submit": ("submit score s3://photos s3://scores --address http://HEAD:8265",),
    "demo": ("demo", "demo --out elsewhere --images 1000"),
    "models": ("models", "models 'resnet*' --image-size 64 --measure"),
    "cache": ("cache", "cache --clear"),
    "doctor": ("doctor", "doctor --ray --store s3://photos/2026"),
    "config": ("config score > score.yaml", "config convert train score > project.yaml"),
    "version": ("version --json",),
}


def _list_examples(name: str, prefix: str = "cifake-ray") -> str:
    return "\n".join(f"  {prefix} {example}" for example in EXAMPLES[name])


app = typer.Typer(
    cls=Group,
    help="Tells AI-generated images from real ones, in bulk, on Ray.",
    epilog=_list_examples(""),
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(value: bool) -> None:
    if value:
        show_line(f"cifake-ray {find_version('cifake-ray')}")
        raise typer.Exit


@app.callback()
def _take_version(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version", is_eager=True, callback=_print_version),
    ] = False,
) -> None:
    pass


def _add_command(name: str) -> Callable[[Function], Function]:
    return app.command(name=name, cls=Command, epilog=_list_examples(name))


def _run_verb(make_config: Any, *, json_output: bool, debug: bool) -> None:
    def run(config: Any) -> tuple[Any, int]:
        from cifake_ray.pipeline import run_verb

        return run_verb(config, STARTED_S)

    run_command(lambda: make_config(run), json_output=json_output, debug=debug)


def _describe(config_class: type) -> str:
    doc = (config_class.__doc__ or "").partition(": ")[2]
    return doc[:1].upper() + doc[1:]


for _name, _class in VERBS.items():
    app.command(name=_name, cls=Command, help=_describe(_class), epilog=_list_examples(_name))(
        make_command(_class, _run_verb)
    )

submit = typer.Typer(
    cls=Group,
    epilog=_list_examples("submit"),
    help="Run a verb as a job of a Ray cluster; the command ends with the job's own exit code.",
)
app.add_typer(submit, name="submit")


def _add_submission(verb: str) -> None:
    def run(make_configs: Any, *, json_output: bool, debug: bool) -> None:
        def body() -> tuple[Any, int]:
            config, job = make_configs()
            log("submit: waiting for the cluster ...")
            from cifake_ray.stages.submit import submit_job

            flags = ["--json"] * json_output + ["--debug"] * debug
            flags += ["--log-format", "json"] * (get_log_format() == "json")
            return submit_job(config, job, verb, flags, log, partial(show_line, stream=sys.stdout))

        run_command(body, json_output=json_output, debug=debug)

    examples = _list_examples(verb, "cifake-ray submit")
    submit.command(name=verb, cls=Command, help=_describe(VERBS[verb]), epilog=examples)(
        make_command(VERBS[verb], run, SubmitConfig)
    )


for _name in ("audit", "convert", "train", "tune", "evaluate", "score", "pipeline"):
    _add_submission(_name)


@_add_command("demo")
def demo(
    out: Annotated[str, typer.Option(help="Folder for everything the demo makes")] = "demo",
    images: Annotated[int, typer.Option(help="Images in the sample", metavar="N")] = 3000,
    seed: Annotated[int, typer.Option(help="Same seed, same result", metavar="N")] = 0,
    json_output: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Run everything on a small sample: convert, train, evaluate, score and a report."""
    from cifake_ray.pipeline import run_demo

    run_command(
        lambda: run_demo(out, images=images, seed=seed), json_output=json_output, debug=debug
    )


@_add_command("models")
def models(
    pattern: Annotated[
        str | None,
        typer.Argument(
            help="Include timm's that match this glob (default: ours and a selection of timm's)"
        ),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            help="Side of the input in pixels (default: each one's own)", min=1, metavar="N"
        ),
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


@_add_command("cache")
def cache(
    cache_dir: Annotated[
        str | None, typer.Option(help="Folder for decoded images (default: that of train)")
    ] = None,
    clear: Annotated[
        bool, typer.Option("--clear", help="Remove all that this user may remove")
    ] = False,
    json_output: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show the decoded images that train keeps: their size, last use and shards."""

    def body() -> tuple[Any, int]:
        from cifake_ray.storage.datasets.cache_entries import list_entries, remove_entries
        from cifake_ray.storage.datasets.pixel_cache import locate_cache

        folder = locate_cache(cache_dir)
        entries = list_entries(folder)
        if clear:
            entries = [entry for entry in entries if entry.is_ours]
            remove_entries(entries)
        rows = [{**vars(entry), "path": str(entry.path)} for entry in entries]
        return {"folder": str(folder), "removed": clear, "entries": rows}, ExitCode.OK

    def show(found: dict[str, Any]) -> str:
        from cifake_ray.report.cache_table import format_cache

        return format_cache(found)

    run_command(body, json_output=json_output, debug=debug, show=show)


def _examine(make_configs: Any, *, json_output: bool, debug: bool) -> None:
    def body() -> tuple[Any, int]:
        config, store = make_configs()
        log("doctor: looking at this machine")
        from cifake_ray.stages.doctor import examine_machine

        return examine_machine(config, store, log)

    run_command(body, json_output=json_output, debug=debug, show=format_checks)


app.command(
    name="doctor", cls=Command, help=_describe(DoctorConfig), epilog=_list_examples("doctor")
)(make_command(DoctorConfig, _examine, StoreConfig))


@_add_command("config")
def config(
    verbs: Annotated[
        list[str], typer.Argument(help="Verbs; of several, each gets a section", metavar="VERB...")
    ],
) -> None:
    """Print a YAML file of all options of a verb with their defaults, for `--config`."""

    def body() -> tuple[Any, int]:
        for verb in verbs:
            if verb not in SECTIONS:
                raise UsageError(
                    f"{verb}: no such verb{suggest_word(verb, SECTIONS)}; there are"
                    f" {', '.join(SECTIONS)}"
                )
        return {"config": format_config(verbs)}, ExitCode.OK

    run_command(body, json_output=False, debug=False, show=lambda found: found["config"].rstrip())


@_add_command("version")
def version(json_output: JsonOption = False, debug: DebugOption = False) -> None:
    """Print the versions of this program and of its main dependencies."""

    def body() -> tuple[Any, int]:
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
