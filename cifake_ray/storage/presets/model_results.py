"""Read the benchmark of architectures, `model_results.json`, which comes with the package.

`tests/benchmarks/model_results.py --write` makes it.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from cifake_ray.storage.io.files import read_json


def locate_model_results() -> Path:
    """Return the path of the results."""
    return Path(str(files("cifake_ray") / "model_results.json"))


def read_model_results() -> dict[str, Any]:
    """Return `made_by`, the command, and `rows`, one for each measured network.

    StorageError when the file is missing or damaged.
    """
    return read_json(locate_model_results())
