"""Read recipes and search spaces from YAML files, built-in or other.

The command line reads them too, so nothing heavy is imported.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from cifake_ray.errors import UsageError, suggest_word

PACKAGE = Path(__file__).parents[2]
RECIPES, SEARCHES = PACKAGE / "recipes", PACKAGE / "searches"
EVERYTHING = "everything"
EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")


def parse_mapping(data: bytes, name: str) -> dict[str, Any]:
    """Parse a YAML mapping; dashes in its names become underscores.

    UsageError, which begins with `name`, for anything else.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Read 1e-3 as a number, as YAML 1.2 does; to PyYAML, which reads 1.1, it is text."""

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+.0123456789"))
    try:
        values = yaml.load(data, Loader)
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{name}: not readable as YAML ({reason})") from error
    if values is None:  # comments only
        values = {}
    if not isinstance(values, dict):
        raise UsageError(f"{name}: holds no mapping; write one `name: value` a line")
    return {str(key).replace("-", "_"): value for key, value in values.items()}


def read_mapping(path: Path) -> dict[str, Any]:
    """Parse a file as `parse_mapping` does. UsageError when it cannot be read."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: not readable ({error.strerror})") from error
    return parse_mapping(data, str(path))


def find_preset(name: str, folder: Path) -> Path:
    """Return the built-in file of that name in `folder`, else the path `name`.

    UsageError when neither exists.
    """
    built_in = folder / f"{name}.yaml"
    path = built_in if Path(name).name == name and built_in.is_file() else Path(name)
    if not path.is_file():
        stems = [file.stem for file in folder.glob("*.yaml")]
        known = ", ".join(sorted(stems + [EVERYTHING] * (folder == SEARCHES)))
        raise UsageError(
            f"{name}: no such file, and not among the built-in {folder.name}: {known}"
            + suggest_word(name, stems)
        )
    return path


def read_recipe(path: Path) -> dict[str, Any]:
    """Return options of `train`. An augmentation policy may be given as a mapping of its steps."""
    values = read_mapping(path)
    if isinstance(values.get("augment"), dict):
        values["augment"] = json.dumps(values["augment"])
    return values


def read_searches(names: tuple[str, ...]) -> dict[str, Any]:
    """Merge search spaces; of an option in several the last one counts.

    `everything` stands for all built-in ones. UsageError when one is missing or unreadable.
    """
    values: dict[str, Any] = {}
    for name in names:
        if name == EVERYTHING:
            paths = sorted(SEARCHES.glob("*.yaml"))
        else:
            paths = [find_preset(name, SEARCHES)]
        for path in paths:
            values |= read_mapping(path)
    return values
