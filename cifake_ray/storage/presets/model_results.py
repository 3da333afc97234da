"""What the benchmark of the zoo measured: `zoo.json`, which comes with the package.

Floor: storage. `tests/benchmarks/zoo.py --write` makes it.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from cifake_ray.storage.io.files import read_json


def locate_zoo() -> Path:
    """Where the results lie."""
    return Path(str(files("cifake_ray") / "zoo.json"))


def read_zoo() -> dict[str, Any]:
    """`made_by`, the command, and `rows`, one for each network that was measured.

    StorageError when the file is missing or damaged.
    """
    return read_json(locate_zoo())
