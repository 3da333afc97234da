"""Derive the options of a command from a config dataclass.

Help, defaults, `CIFAKE_RAY_*` variables and `--config` keys all come from the fields,
in the order `--recipe` < `--config FILE.yaml` < `CIFAKE_RAY_*` < flags, which is click's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
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
    """Use a recipe, a file or a built-in one, as defaults; `--config` takes precedence.

    BadParameter when there is neither.
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

    `make()` builds the config, so that its UsageError is reported where all errors are. With a
    `job_class` its fields are added, those of the same name replaced, and `make()` builds both.
    """
    classes = [config_class] if job_class is None else [job_class, config_class]
    owners = {field.name: owner for owner in reversed(classes) for field in fields(owner)}
    parameters = []
    for name, owner in sorted(
        owners.items(), key=lambda item: not doc_of(item[1], item[0]).positional
    ):
        default = next(field.default for field in fields(owner) if field.name == name)
        parameters.append(
            _make_parameter(name, get_type_hints(owner)[name], default, doc_of(owner, name))
        )
    recipe = [("recipe", RecipeOption, None)] if config_class is TrainConfig else []
    for name, annotation, default in (
        ("json_output", JsonOption, False),
        ("debug", DebugOption, False),
        ("log_format", LogFormatOption, "text"),
        ("config_file", ConfigOption, None),
        *recipe,
    ):
        parameters.append(
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
            )
        )

    handled = ("log_format", "config_file", *(name for name, _, _ in recipe))  # by callbacks

    def command(*, json_output: bool, debug: bool, **values: Any) -> None:
        values = {name: value for name, value in values.items() if name not in handled}
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}

        def make() -> Any:
            made = [
                owner(**{name: values[name] for name in values if owners[name] is owner})
                for owner in reversed(classes)
            ]
            return made[0] if job_class is None else made

        run(make, json_output=json_output, debug=debug)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__doc__ = config_class.__doc__
    return command


def _make_parameter(name: str, hint: Any, default: Any, doc: Doc) -> inspect.Parameter:
    if get_origin(hint) is tuple:  # typer takes no list of Literal: the config checks the words
        hint, default = list[str], list(default)
    if hint == str | Augmentation:  # the command line has its text
        hint = str
    if doc.positional:
        info: Any = typer.Argument(help=doc.help, show_default=False)
    else:
        info = typer.Option(
            help=doc.help,
            envvar=PREFIX + name.upper(),
            show_envvar=False,
            show_default=default not in (None, []),
        )
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if default is MISSING else default,
        annotation=Annotated[hint, info],
    )
