"""What every command has: help for any width of terminal, and a guess at what was misspelt."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup

from cifake_ray.errors import ExitCode, suggest_word

MAX_WIDTH = 110  # columns: longer lines are hard to read
OUTPUT_PANEL = "Output and settings"
NARROW = 72  # columns: below this the help of an option goes under its name
UsageError: type[Exception] = typer.BadParameter.__bases__[0]  # click's own is not public in typer


class Command(TyperCommand):
    """A command with our help page."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.write(format_page(self, ctx))

    def get_usage(self, ctx: Any) -> str:
        return _format_usage(self, ctx)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            parsed: list[str] = super().parse_args(ctx, args)
        except UsageError as error:
            _add_guess(error, [name for p in self.get_params(ctx) for name in _list_names(p)])
            raise
        return parsed


class Group(TyperGroup):
    """Commands below one name, with our help page."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.write(format_page(self, ctx))

    def get_usage(self, ctx: Any) -> str:
        return _format_usage(self, ctx)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:  # typer's own answer leaves out our page
            typer.echo(self.get_help(ctx))
            ctx.exit(ExitCode.USAGE)
        parsed: list[str] = super().parse_args(ctx, args)
        return parsed


def _format_usage(command: Any, ctx: Any) -> str:
    words = ["COMMAND ..."] if isinstance(command, TyperGroup) else []
    words += [
        _describe_param(p)[0] for p in command.get_params(ctx) if isinstance(p, TyperArgument)
    ]
    return f"Usage: {' '.join([ctx.command_path, '[OPTIONS]', *words])}"


def _add_guess(error: Any, names: list[str]) -> None:
    """Add `did you mean ...?` to an error about an option or one of its words."""
    if wrong := getattr(error, "option_name", None):
        error.possibilities = None  # click's own guess, which has no word for it
        error.message += suggest_word(wrong, names)
    elif " is not one of " in error.message:
        wrong, *words = re.findall(r"'([^']*)'", error.message)
        error.message = error.message.removeprefix("Value error, ").rstrip(".")
        error.message += suggest_word(wrong, words)


def _list_names(param: Any) -> list[str]:
    return [] if isinstance(param, TyperArgument) else [*param.opts, *param.secondary_opts]


def format_page(command: Any, ctx: Any) -> str:
    """Return usage, help, panels and examples, at most as wide as the terminal."""
    width = min(shutil.get_terminal_size().columns, MAX_WIDTH) - 1
    panels: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for param in command.get_params(ctx):
        if not getattr(param, "hidden", False):
            default = "Arguments" if isinstance(param, TyperArgument) else "Options"
            panel = getattr(param, "rich_help_panel", None) or default
            if param.name == "help":
                panel = OUTPUT_PANEL
            panels[panel].append(_describe_param(param))
    if isinstance(command, TyperGroup):
        for name in command.list_commands(ctx):
            child: Any = command.get_command(ctx, name)
            panel = child.rich_help_panel if isinstance(child.rich_help_panel, str) else "Commands"
            panels[panel].append((name, child.get_short_help_str(limit=500)))
    blocks = [
        textwrap.fill(text, width) for text in (_format_usage(command, ctx), command.help or "")
    ]
    blocks += [
        f"{typer.style(title, bold=True)}\n{_format_rows(rows, width)}"
        for title, rows in panels.items()
    ]
    if command.epilog:  # its line breaks stay
        blocks.append(f"{typer.style('Examples', bold=True)}\n{command.epilog}")
    return "\n\n".join(block for block in blocks if block) + "\n"


def _describe_param(param: Any) -> tuple[str, str]:
    """Return a parameter's name with its kind of value, and its help with the default."""
    if isinstance(param, TyperArgument):
        name = str(param.metavar or param.name).upper()
        return name if param.required else f"[{name}]", param.help or ""
    name = max(param.opts, key=len)
    short = "".join(f"{opt}, " for opt in param.opts if opt != name)
    if param.default is True:  # each switch has a --no- form; only here is it of use
        name = ", ".join([name, *param.secondary_opts])
    words = [] if param.is_flag else [str(param.metavar or "TEXT")]
    notes = ["required"] if param.required else []
    value = "on" if param.default is True else param.default
    if param.show_default and value is not None and value is not False and value != []:
        notes.append(f"default: {' '.join(value) if isinstance(value, list) else value}")
    note = f" [{'; '.join(notes)}]" if notes else ""
    return short + " ".join([name, *words]), (param.help or "") + note


def _format_rows(rows: Iterable[tuple[str, str]], width: int) -> str:
    """Format names and their help in two columns, in a narrow terminal one below the other."""
    rows = list(rows)
    column = min(max(len(name) for name, _ in rows), 30) + 4
    lines = []
    for name, text in rows:
        is_beside = width >= NARROW and len(name) + 4 <= column
        indent = " " * (column if width >= NARROW else 6)
        first = f"  {name}".ljust(column) if is_beside else indent
        if not is_beside:
            lines.append(f"  {name}")
        lines += textwrap.wrap(text, width, initial_indent=first, subsequent_indent=indent) or (
            [first.rstrip()] if is_beside else []
        )
    return "\n".join(lines)
