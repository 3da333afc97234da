"""Derive the options of a command from a config dataclass.

Help, defaults, `CIFAKE_RAY_*` variables and `--config` keys all come from its fields. Precedence is
click's own: `--recipe` < `--config FILE.yaml` < `CIFAKE_RAY_*` < flags.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from cifake_ray.command import OUTPUT_PANEL
from cifake_ray.config import (
    LAST_PANELS,
    VERBS,
    Augmentation,
    Doc,
    DoctorConfig,
    SubmitConfig,
    TrainConfig,
    doc_of,
    find_panel,
    hint_of,
)
from cifake_ray.console import LogFormat, choose_log_format, log
from cifake_ray.errors import UsageError, suggest_word
from cifake_ray.storage.presets.yaml_presets import RECIPES, find_preset, read_recipe

PREFIX = "CIFAKE_RAY_"
# Of a project file; `submit` and `doctor` have options of a verb or a store besides.
SECTIONS: dict[str, type] = {**VERBS, "submit": SubmitConfig, "doctor": DoctorConfig}
LOG_FORMAT = "log_format"  # an option of every verb that is no field of its config
METAVARS = {int: "N", float: "X", bool: ""}


def load_config_file(context: typer.Context, path: Path | None) -> Path | None:
    """Use a YAML mapping as defaults of the command. BadParameter for unknown keys."""
    if path is not None:
        context.meta["config"] = _read_values(context, path)
        _set_defaults(context)
    return path


def load_recipe(context: typer.Context, name: str | None) -> str | None:
    """Use a recipe, built-in or a file, as defaults; `--config` takes precedence.

    BadParameter when there is no such recipe.
    """
    if name is not None:
        context.meta["recipe"] = name
        _set_defaults(context)
    return name


def _set_defaults(context: typer.Context) -> None:
    """Set the defaults to the file's values over those of the recipe, which the file may name."""
    values = dict(context.meta.get("config", {}))
    parameters = {parameter.name: parameter for parameter in context.command.params}
    if "recipe" in parameters and parameters["recipe"].is_eager:  # of train; tune's is another
        name = context.meta.get("recipe") or values.get("recipe")
        values.pop("recipe", None)
        if name is not None:
            try:
                path = find_preset(str(name), RECIPES)
            except ValueError as error:
                raise typer.BadParameter(str(error)) from error
            recipe = _read_values(context, path)
            context.meta["recipe_in_use"] = name
            context.meta["set_by_recipe"] = recipe.keys() - values.keys()
            values = {**recipe, **values}
    for key, value in values.items():
        if not getattr(parameters[key], "multiple", False):
            if isinstance(value, list):  # a text option would take it as "['a', 'b']"
                raise typer.BadParameter(f"{key}: give one value, not a list")
        elif not isinstance(value, list | None):
            if isinstance(value, dict):
                raise typer.BadParameter(f"{key}: give a list, such as [a, b]")
            values[key] = [value]
    context.default_map = values


def _is_of_recipe(context: typer.Context, error: UsageError) -> bool:
    """Whether an error begins with an option that the recipe has set, so that nobody typed it."""
    option = re.match(r"--([a-z-]+)", str(error))
    name = option[1].replace("-", "_") if option else ""
    source = context.get_parameter_source(name)
    is_default = source is not None and source.name == "DEFAULT_MAP"
    return is_default and name in context.meta.get("set_by_recipe", ())


def _read_values(context: typer.Context, path: Path) -> dict[str, Any]:
    """Return the values for the command: those of its section over those above all sections.

    BadParameter for an unknown key, also in the sections of other verbs.
    """
    verb = context.command.name or ""
    known = {parameter.name for parameter in context.command.params}
    known -= {"json_output", "debug", "config_file", "help", None}
    try:
        values = read_recipe(path)
        sections = {
            name: {str(key).replace("-", "_"): value for key, value in values.pop(name).items()}
            for name in SECTIONS
            if isinstance(values.get(name), dict)
        }
        for name, section in sections.items():
            _check_keys(section, _list_keys(name), f"{path}: section {name}", name)
        if not sections:
            _check_keys(values, known, str(path), verb)
        else:
            everywhere = set().union(*map(_list_keys, SECTIONS))
            _check_keys(values, everywhere, f"{path}: above the sections", "any verb")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    is_job = context.parent is not None and context.parent.info_name == "submit"
    for name in [verb, "submit"] if is_job else [verb]:
        section = sections.get(name, {})
        values |= {key: value for key, value in section.items() if value is not None}
    return {key: value for key, value in values.items() if key in known}


def _list_keys(section: str) -> set[str]:
    names = {field.name for field in fields(SECTIONS[section])} | {LOG_FORMAT}
    return names | ({"recipe"} if section == "train" else set())


def _check_keys(values: Iterable[str], known: Iterable[Any], place: str, verb: str) -> None:
    for key in values:
        if key not in known:
            hint = suggest_word(key, known) or f"; there are {', '.join(sorted(known))}"
            raise UsageError(f"{place}: {verb} has no option {key}{hint}")


def check_variables() -> None:
    """Raise UsageError for a CIFAKE_RAY_* variable that no verb has: it would be ignored."""
    known = {PREFIX + key.upper() for section in SECTIONS for key in _list_keys(section)}
    for name in sorted(os.environ):
        if name.startswith(PREFIX) and name not in known:
            raise UsageError(
                f"{name} is set, but no option has this variable"
                + (suggest_word(name, known) or "; unset it")
            )


def format_config(verbs: Iterable[str]) -> str:
    """Return a YAML file of all options of these verbs with their defaults, for `--config`."""
    verbs = list(verbs)
    lines = [
        f"# Options of {', '.join(verbs)}, for --config FILE. Variables and flags take precedence.",
    ]
    if "train" in verbs:
        lines.append("# These lines win over those of --recipe: delete what you do not change.")
    for verb in verbs:
        lines += ["", f"{verb}:"] if len(verbs) > 1 else []
        indent = "  " * (len(verbs) > 1)
        lines += [indent + line if line else "" for line in _list_config_lines(SECTIONS[verb])]
    return "\n".join(lines) + "\n"


def _list_config_lines(config_class: type) -> list[str]:
    panels: dict[str, list[str]] = {}  # one may begin in a verb and go on in what verbs share
    for name, field in _sort_fields([config_class]).items():
        doc, hint = doc_of(config_class, name), hint_of(config_class, name)
        lines = panels.setdefault(find_panel(config_class, name)[1], [])
        lines += [f"# {line}" for line in textwrap.wrap(_describe_option(doc, hint), 96)]
        value = "..." if field.default is MISSING else json.dumps(field.default)
        lines.append(f"{'# ' * (field.default is MISSING)}{name}: {value}")
    return [line for title, lines in panels.items() for line in ("", f"# --- {title}", *lines)]


JsonOption = Annotated[
    bool,
    typer.Option(
        "--json", help="Print the result as one JSON object", rich_help_panel=OUTPUT_PANEL
    ),
]
LogFormatOption = Annotated[
    LogFormat,
    typer.Option(
        "--log-format",
        help="Format of log lines on stderr, text or json: objects with time, message and numbers",
        metavar="WORD",
        rich_help_panel=OUTPUT_PANEL,
        envvar=f"{PREFIX}LOG_FORMAT",
        show_envvar=False,
        callback=choose_log_format,
    ),
]
DebugOption = Annotated[
    bool,
    typer.Option("--debug", help="Show the traceback of an error", rich_help_panel=OUTPUT_PANEL),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="YAML file with defaults for these options, see `cifake-ray config`",
        metavar="FILE",
        rich_help_panel=OUTPUT_PANEL,
        is_eager=True,
        callback=load_config_file,
    ),
]
RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        help="Built-in recipe (fast, best, ...) or YAML file with defaults for these options",
        metavar="NAME",
        rich_help_panel=OUTPUT_PANEL,
        is_eager=True,
        callback=load_recipe,
    ),
]


def make_command(
    config_class: type, run: Callable[..., None], job_class: type | None = None
) -> Callable[..., None]:
    """Return a function whose signature is the fields of `config_class`; it calls `run(make, ...)`.

    `make()` builds the config, so its UsageError is reported as other errors are; `make(use)`
    returns what `use` makes of it. A `job_class` adds its fields, replaces those of the same name,
    and makes both configs.
    """
    classes = [config_class] if job_class is None else [config_class, job_class]
    owners = {field.name: owner for owner in classes for field in fields(owner)}
    sorted_fields = _sort_fields(classes)
    docs = {name: doc_of(owners[name], name) for name in sorted_fields}
    options = {
        name: _make_option(owners[name], sorted_fields[name])
        for name in sorted(sorted_fields, key=lambda name: not docs[name].positional)
    }
    options |= {
        "json_output": (JsonOption, False),
        "debug": (DebugOption, False),
        "log_format": (LogFormatOption, "text"),  # used by its callback, as the two below
        "config_file": (ConfigOption, None),
        "context": (typer.Context, inspect.Parameter.empty),
    }
    if config_class is TrainConfig:
        options["recipe"] = (RecipeOption, None)

    def command(*, json_output: bool, debug: bool, context: typer.Context, **values: Any) -> None:
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}

        def make(use: Callable[[Any], Any] = lambda made: made) -> Any:
            check_variables()
            if name := context.meta.get("recipe_in_use"):
                log(f"{context.command.name}: recipe {name}")
            try:
                made = [
                    owner(**{name: values[name] for name in owners if owners[name] is owner})
                    for owner in classes
                ]
                return use(made[0] if job_class is None else made)
            except UsageError as error:
                if _is_of_recipe(context, error):
                    raise UsageError(f"recipe {name}: {error}") from error
                raise

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


def _sort_fields(classes: list[type]) -> dict[str, Field[Any]]:
    """Return the fields as help shows them: a verb's own first, then how it runs, S3, the cluster.

    Of two fields of the same name the one of the last class counts.
    """
    found = {field.name: (owner, field) for owner in classes for field in fields(owner)}
    last = ("", *LAST_PANELS)  # "" stands for all panels that come before

    def rank(name: str) -> tuple[int, int, int]:
        distance, panel = find_panel(found[name][0], name)
        owner_panels = list(vars(found[name][0]).get("PANELS", {}))
        place = owner_panels.index(panel) + 1 if panel in owner_panels else 0
        return last.index(panel) if panel in last else 0, distance, place

    return {name: found[name][1] for name in sorted(found, key=rank)}


def _describe_option(doc: Doc, hint: Any) -> str:
    """Return the help of a field with the words that it takes."""
    kinds = get_args(hint) if get_origin(hint) in (UnionType, tuple) else (hint,)
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    missing = [word for word in words if word not in doc.help]
    return f"{doc.help} ({', '.join(words)})" if missing else doc.help


def _make_option(config_class: type, field: Field[Any]) -> tuple[Any, Any]:
    """Return the annotation and the default of the parameter that typer makes an option."""
    doc, hint = doc_of(config_class, field.name), hint_of(config_class, field.name)
    text = _describe_option(doc, hint)
    default: Any = inspect.Parameter.empty if field.default is MISSING else field.default
    if get_origin(hint) is tuple:  # typer takes no list of Literal: the config checks the words
        hint = list[str]
        default = default if default is inspect.Parameter.empty else list(default)
    if hint == str | Augmentation:  # on the command line it is text
        hint = str
    if doc.positional:
        return Annotated[hint, typer.Argument(help=text, show_default=False)], default
    kind = next(iter(get_args(hint)), hint) if get_origin(hint) is UnionType else hint
    option = typer.Option(
        help=text,
        metavar=METAVARS.get(kind, "WORD" if get_origin(kind) is Literal else "TEXT") or None,
        rich_help_panel=find_panel(config_class, field.name)[1],
        envvar=PREFIX + field.name.upper(),
        show_envvar=False,
        show_default=default not in (None, []),
    )
    return Annotated[hint, option], default
