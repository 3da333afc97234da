"""Turns a config dataclass into the options of a command.

Floor: doors. Help, defaults, `CIFAKE_RAY_*` variables and `--config` keys all come from the fields,
in the order `--recipe` < `--config FILE.yaml` < `CIFAKE_RAY_*` < flags, which is click's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from cifake_ray.config import Config, Doc, TrainConfig, doc_of
from cifake_ray.storage.recipes import RECIPES, find_boxed, read_recipe

PREFIX = "CIFAKE_RAY_"


def load_config_file(context: typer.Context, path: Path | None) -> Path | None:
    """Make a YAML mapping the defaults of the command. BadParameter for keys it does not have."""
    if path is not None:
        context.default_map = {**(context.default_map or {}), **_read_values(context, path)}
    return path


def load_recipe(context: typer.Context, name: str | None) -> str | None:
    """The same with a file of that name, or with a recipe in the box; `--config` goes before it.

    BadParameter when there is neither.
    """
    if name is not None:
        try:
            path = find_boxed(name, RECIPES)
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


JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error")]
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
        help="Recipe in the box, or a YAML file of one: defaults for these options",
        is_eager=True,
        callback=load_recipe,
    ),
]


def make_command(config_class: type[Config], run: Callable[..., None]) -> Callable[..., None]:
    """A function whose signature is the fields of `config_class`; it calls `run(make, ...)`.

    `make()` builds the config, so that its ValueError is reported where all errors are.
    """
    hints = get_type_hints(config_class)
    parameters = []
    for field in sorted(
        fields(config_class), key=lambda f: not doc_of(config_class, f.name).positional
    ):
        parameters.append(
            _make_parameter(
                field.name, hints[field.name], field.default, doc_of(config_class, field.name)
            )
        )
    recipe = [("recipe", RecipeOption, None)] if config_class is TrainConfig else []
    for name, annotation, default in (
        ("json_output", JsonOption, False),
        ("debug", DebugOption, False),
        ("config_file", ConfigOption, None),
        *recipe,
    ):
        parameters.append(
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
            )
        )

    def command(*, json_output: bool, debug: bool, config_file: Path | None, **values: Any) -> None:
        for name, _, _ in recipe:
            values.pop(name)  # its callback has made it defaults
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        run(lambda: config_class(**values), json_output=json_output, debug=debug)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__doc__ = config_class.__doc__
    return command


def _make_parameter(name: str, hint: Any, default: Any, doc: Doc) -> inspect.Parameter:
    if hint == tuple[str, ...]:
        hint, default = list[str], list(default)
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
