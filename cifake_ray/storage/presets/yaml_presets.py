"""Read recipes and search spaces from YAML files, built-in or other.

The command line reads them too, so nothing heavy is imported.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from cifake_ray.errors import UsageError, suggest_word
from cifake_ray.storage.io.regular_file import read_regular

PACKAGE = Path(__file__).parents[2]
RECIPES, SEARCHES = PACKAGE / "recipes", PACKAGE / "searches"
EVERYTHING = "everything"
MAX_YAML_BYTES = 2**20
MAX_YAML_NODES = 10_000
# What PyYAML raises for the text behind an explicit tag, and for very deep nesting.
CONSTRUCTION_ERRORS = (ArithmeticError, AttributeError, LookupError, RecursionError, ValueError)
EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")


def parse_mapping(data: bytes, name: str) -> dict[str, Any]:
    """Parse a YAML mapping; dashes in its names become underscores.

    UsageError, which begins with `name`, for anything else.
    """
    import yaml

    if len(data) > MAX_YAML_BYTES:
        raise UsageError(f"{name}: {len(data):,} bytes; options take {MAX_YAML_BYTES:,} at most")
    try:
        values = yaml.load(data, _make_loader())
    except (*CONSTRUCTION_ERRORS, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"{name}: not readable as YAML ({reason})") from error
    if values is None:  # comments only
        values = {}
    if not isinstance(values, dict):
        raise UsageError(f"{name}: holds no mapping; write one `name: value` a line")
    renamed = [str(key).replace("-", "_") for key in values]
    if twice := [key for key in renamed if renamed.count(key) > 1]:
        raise UsageError(f"{name}: {twice[0]} is there twice; delete one of them")
    return dict(zip(renamed, values.values(), strict=True))


@cache
def _make_loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """Read 1e-3 as a number, as YAML 1.2 does, and a date as text; PyYAML reads 1.1.

        What no person writes by hand is refused: a name that is twice in a mapping, a value within
        itself, and aliases that stand for more than MAX_YAML_NODES values.
        """

        def get_single_data(self) -> Any:
            node = self.get_single_node()
            if node is None:
                return None
            if _check_node(node, {}) > MAX_YAML_NODES:
                raise ValueError(f"its aliases stand for more than {MAX_YAML_NODES:,} values")
            return self.construct_document(node)

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+.0123456789"))
    Loader.yaml_implicit_resolvers = {
        first: [pair for pair in pairs if not pair[0].endswith(":timestamp")]
        for first, pairs in Loader.yaml_implicit_resolvers.items()
    }
    return Loader


def _check_node(node: Any, sizes: dict[int, int]) -> int:
    """Return how many values a node stands for; `sizes` has the nodes that were counted before.

    ValueError for a node within itself, and for a name that is twice in a mapping.
    """
    if id(node) in sizes:
        if sizes[id(node)] == 0:
            raise ValueError("an alias stands within what it stands for")
        return sizes[id(node)]
    sizes[id(node)] = 0
    children = [] if isinstance(node.value, str) else node.value
    if node.id == "mapping":
        names = [key.value for key, _ in children if isinstance(key.value, str)]
        if twice := {name for name in names if names.count(name) > 1} - {"<<"}:
            raise ValueError(f"{min(twice)!r} is there twice; delete one of them")
        children = [child for pair in children for child in pair]
    sizes[id(node)] = 1 + sum(_check_node(child, sizes) for child in children)
    return sizes[id(node)]


def read_mapping(path: Path) -> dict[str, Any]:
    """Parse a file as `parse_mapping` does. UsageError when it cannot be read."""
    try:
        data = read_regular(path, MAX_YAML_BYTES)
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
