"""Define what a cell of a grid may do to an image, and check grids."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from cifake_ray.errors import UsageError, suggest_word

# The steps of a cell, by name, in the order in which they are done.
Cell = dict[str, float | str]
Grid = dict[str, Cell]

CELL_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")  # a column of the predictions, unquoted in SQL
MAX_CELLS = 100
MAX_TEXT = 100  # characters


class Step(NamedTuple):
    """The values that a step takes, and the one at which it changes nothing."""

    low: float
    high: float
    neutral: float
    is_whole: bool = False


STEPS = {
    "jpeg": Step(1, 100, 100, is_whole=True),  # quality; 4:2:0
    "webp": Step(1, 100, 100, is_whole=True),  # quality; lossy
    "blur": Step(0, 50, 0),  # deviation of a Gaussian, pixels
    "noise": Step(0, 255, 0),  # deviation of Gaussian noise, grey levels of 255
    "rescale": Step(0.01, 1, 1),  # to this share of the sides and back
    "resize": Step(0.01, 8, 1),  # to this multiple of the sides
    "max_side": Step(8, 16_383, 16_383, is_whole=True),  # shrunk to this longest side, pixels
    "crop": Step(0.05, 1, 1),  # the centre, share of the sides
    "brightness": Step(0, 10, 1),  # factor of the HSV value
    "contrast": Step(0, 10, 1),  # factor of the distance to the mean grey
    "saturation": Step(0, 10, 1),  # factor of the distance to each pixel's grey; 0 is grey
    "logo": Step(0.05, 1, 0),  # a disc with a triangle in the upper right, share of the short side
}
TEXT = "text"  # a step too: written in the lower left


def parse_grid(values: Mapping[str, Any]) -> Grid:
    """Return a grid from what its YAML holds. UsageError for an unknown step or a wrong value."""
    grid: Grid = {}
    for name, steps in values.items():
        if not CELL_NAME.fullmatch(name) or name == "clean":
            raise UsageError(
                f"cell {name!r}: give it a name of small letters, digits and _, at most 40; `clean`"
                " is always measured"
            )
        if not isinstance(steps, Mapping) or not steps:
            raise UsageError(f"cell {name}: holds no steps; write {name}: {{jpeg: 75}}")
        renamed = {str(step).replace("-", "_"): value for step, value in steps.items()}
        grid[name] = {step: _check_step(name, step, value) for step, value in renamed.items()}
    if not 0 < len(grid) <= MAX_CELLS:
        raise UsageError(f"{len(grid)} cells; give 1 to {MAX_CELLS}, one `name: {{jpeg: 75}}` each")
    return grid


def _check_step(cell: str, name: str, value: Any) -> float | str:
    """Return the value of a step; one written as 50.0 is that written as 50."""
    if name == TEXT:
        if isinstance(value, str) and 0 < len(value) <= MAX_TEXT and value.isprintable():
            return value
        raise UsageError(f"cell {cell}: text is {value!r}; give 1 to {MAX_TEXT} printable letters")
    if name not in STEPS:
        known = [*STEPS, TEXT]
        hint = suggest_word(name, known) or f"; there are {', '.join(known)}"
        raise UsageError(f"cell {cell}: no step {name!r}{hint}")
    low, high, _, is_whole = STEPS[name]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or (is_whole and value != int(value)):
        kind = "a whole number, " if is_whole else ""
        raise UsageError(f"cell {cell}: {name} is {value!r}; give {kind}{low:g} to {high:g}")
    return int(value) if value == int(value) else float(value)


def describe_cell(cell: Cell) -> str:
    """Return the steps in words: `max_side 768, jpeg 60`."""
    return ", ".join(f"{name} {value}" for name, value in cell.items())


def name_column(cell: str) -> str:
    """Return the column of the predictions that holds the logits of a cell."""
    return f"logit_{cell}"
