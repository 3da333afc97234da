"""Help: every option by its whole name in a terminal of any width, in panels, with examples."""

from __future__ import annotations

import re
from typing import Any

import pytest
import typer
from typer.core import TyperGroup
from typer.testing import CliRunner

from cifake_ray import cli


def list_commands() -> dict[str, Any]:
    group: Any = typer.main.get_command(cli.app)
    found = {"": group}
    for name, command in group.commands.items():
        found[name] = command
        if isinstance(command, TyperGroup):
            found |= {f"{name} {child}": c for child, c in command.commands.items()}
    return found


def read_help(name: str, width: int, flag: str = "--help") -> str:
    result = CliRunner().invoke(cli.app, [*name.split(), flag], env={"COLUMNS": str(width)})
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("width", [40, 60, 80, 200])
@pytest.mark.parametrize("name", list_commands())
def test_help_fits_the_terminal_and_cuts_no_name(name: str, width: int) -> None:
    page = read_help(name, width)
    body, _, examples = page.partition("\nExamples\n")
    assert max(map(len, body.splitlines())) < width
    assert "\u2026" not in page
    for param in list_commands()[name].params:
        for option in param.opts:
            assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", page, re.IGNORECASE)
    assert f"  cifake-ray {name}".rstrip() in examples
    assert not re.search(r"<\w+>|\{\w+\}|no-s3-anonymous", page)


@pytest.mark.parametrize("name", ["", "submit"])
def test_a_command_without_words_shows_its_help(name: str) -> None:
    result = CliRunner().invoke(cli.app, name.split(), env={"COLUMNS": "80"})
    assert (result.exit_code, result.output.strip()) == (2, read_help(name, 80).strip())


def test_short_help_is_the_same() -> None:
    assert read_help("score", 80, "-h") == read_help("score", 80)


@pytest.mark.parametrize("verb", ["score", "train", "submit convert"])
def test_what_a_verb_does_comes_first_and_where_it_runs_last(verb: str) -> None:
    titles = re.findall(r"^[A-Z]\w.*$", read_help(verb, 80), re.MULTILINE)
    assert titles[2] == "Arguments"
    last = ["Run", "S3", "Cluster", "Output and settings", "Examples"]
    assert titles[-5:] == last
    assert len(titles) > 8 or verb != "train"


def test_the_version_is_an_option() -> None:
    result = CliRunner().invoke(cli.app, ["--version"])
    assert (result.exit_code, result.output.split()[0]) == (0, "cifake-ray")
