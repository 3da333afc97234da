"""Recipes and search spaces: YAML files in the box, or a person's own.

Floor: storage. Command lines read them too, so nothing heavy is imported.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1]
RECIPES, SEARCHES = PACKAGE / "recipes", PACKAGE / "searches"
EVERYTHING = "everything"


def read_mapping(path: Path) -> dict[str, Any]:
    """A YAML mapping, its names as options have them in Python. ValueError for anything else."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: not readable as YAML ({reason})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds no mapping; write one `name: value` a line")
    return {str(name).replace("-", "_"): value for name, value in values.items()}


def find_boxed(name: str, box: Path) -> Path:
    """The file of that name, or the one in the box. ValueError when there is neither."""
    boxed = box / f"{name}.yaml"
    path = boxed if Path(name).name == name and boxed.is_file() else Path(name)
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in box.glob("*.yaml")))
        raise ValueError(f"{name}: no such file, and not among the {box.name} in the box: {known}")
    return path


def read_recipe(path: Path) -> dict[str, Any]:
    """Options of `train`. A policy of augmentation may stand in it as a mapping of its steps."""
    values = read_mapping(path)
    if isinstance(values.get("augment"), dict):
        values["augment"] = json.dumps(values["augment"])
    return values


def read_searches(names: tuple[str, ...]) -> dict[str, Any]:
    """Spaces as one; of an option in several the last one counts. `everything` is all in the box.

    ValueError when one is missing or not readable.
    """
    values: dict[str, Any] = {}
    for name in names:
        if name == EVERYTHING:
            paths = sorted(SEARCHES.glob("*.yaml"))
        else:
            paths = [find_boxed(name, SEARCHES)]
        for path in paths:
            values |= read_mapping(path)
    return values
