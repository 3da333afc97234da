"""Derive the options of a command from a config dataclass.

Help, defaults, `CIFAKE_RAY_*` variables and `--config` keys all come from its fields. Precedence is
click's own: `--recipe` < `--config FILE.yaml` < `CIFAKE_RAY_*` < flags.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Annotated, Any, get_origin, get_type_hints

import typer

from cifake_ray.config import Augmentation, Config, Doc, TrainConfig, doc_of
from cifake_ray.console import LogFormat, choose_log_format
from cifake_ray.storage.presets.yaml_presets import RECIPES, find_preset, read_recipe

PREFIX = "CIFAKE_RAY_"


def load_config_file(context: typer.Context, path: Path | None) -> Path | None:
    """Use a YAML mapping as defaults of the command. BadParameter for unknown keys."""
    if path is not None:
        context.default_map = {**(context.default_map or {}), **_read_values(context, path)}
    return path


def load_recipe(context: typer.Context, name: str | None) -> str | None:
    """Use a recipe, built-in or a file, as defaults; `--config` takes precedence.

    BadParameter when there is no such recipe.
    """
    if name is not None:
        try:
            path = find_preset(name, RECIPES)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        context.default_map = {**_read_values(context, path), **(context.default_map or {})}
    return name


def _read_values(context: typer.Context, path: Path) -> dict[str, Any]:
    try:
        values = read_recipe(path)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    known = {parameter.name for parameter in context.command.params if not parameter.is_eager}
    if unknown := sorted(values.keys() - known):
        raise typer.BadParameter(
            f"{path}: {', '.join(unknown)}: no such option of `{context.command.name}`;"
            f" it has {', '.join(sorted(name for name in known if name))}"
        )
    return values


JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object")]
LogFormatOption = Annotated[
    LogFormat,
    typer.Option(
        "--log-format",
        help="Format of log lines on stderr; json: objects with time, message and numbers",
        envvar=f"{PREFIX}LOG_FORMAT",
        show_envvar=False,
        callback=choose_log_format,
    ),
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error")]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="YAML file with defaults for these options",
        is_eager=True,
        callback=load_config_file,
    ),
]
RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        help="Built-in recipe or YAML file with defaults for these options",
        is_eager=True,
        callback=load_recipe,
    ),
]


def make_command(
    config_class: type[Config], run: Callable[..., None], job_class: type | None = None
) -> Callable[..., None]:
    """Return a function whose signature is the fields of `config_class`; it calls `run(make, ...)`.

    `make()` builds the config, so its UsageError is reported as other errors are. A `job_class`
    adds its fields, replaces those of the same name, and makes `make()` return both configs.
    """
    classes = [config_class] if job_class is None else [config_class, job_class]
    owners = {field.name: (owner, field) for owner in classes for field in fields(owner)}
    docs = {name: doc_of(owner, name) for name, (owner, _) in owners.items()}
    options = {
        name: _make_option(docs[name], get_type_hints(owners[name][0])[name], owners[name][1])
        for name in sorted(owners, key=lambda name: not docs[name].positional)
    }
    options |= {
        "json_output": (JsonOption, False),
        "debug": (DebugOption, False),
        "log_format": (LogFormatOption, "text"),  # used by its callback, as the two below
        "config_file": (ConfigOption, None),
    }
    if config_class is TrainConfig:
        options["recipe"] = (RecipeOption, None)

    def command(*, json_output: bool, debug: bool, **values: Any) -> None:
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}

        def make() -> Any:
            made = [
                owner(**{name: values[name] for name in owners if owners[name][0] is owner})
                for owner in classes
            ]
            return made[0] if job_class is None else made

        run(make, json_output=json_output, debug=debug)

    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
            )
            for name, (annotation, default) in options.items()
        ]
    )
    command.__annotations__ = {name: annotation for name, (annotation, _) in options.items()}
    command.__doc__ = config_class.__doc__
    return command


def _make_option(doc: Doc, hint: Any, field: Field[Any]) -> tuple[Any, Any]:
    """Return the annotation and the default of the parameter that typer makes an option."""
    default: Any = inspect.Parameter.empty if field.default is MISSING else field.default
    if get_origin(hint) is tuple:  # typer takes no list of Literal: the config checks the words
        hint, default = list[str], list(default)
    if hint == str | Augmentation:  # on the command line it is text
        hint = str
    if doc.positional:
        return Annotated[hint, typer.Argument(help=doc.help, show_default=False)], default
    option = typer.Option(
        help=doc.help,
        envvar=PREFIX + field.name.upper(),
        show_envvar=False,
        show_default=default not in (None, []),
    )
    return Annotated[hint, option], default
