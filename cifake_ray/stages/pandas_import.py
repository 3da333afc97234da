"""Keep pandas out of a process that has no use for it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType

import pyarrow as pa


class _NoPandas(MetaPathFinder):
    """Finds no pandas."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> None:
        if name == "pandas":
            raise ModuleNotFoundError(name=name)


def leave_out_pandas() -> None:
    """Have pyarrow find no pandas, which it would import for its first array: that takes 0.2 s.

    It looks once in a process, so as to know a DataFrame when it is given one. So this is for
    processes that are only ours; other libraries may still import pandas.
    """
    finder = _NoPandas()
    sys.meta_path.insert(0, finder)
    pa.array([0])
    sys.meta_path.remove(finder)
