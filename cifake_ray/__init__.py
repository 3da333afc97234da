"""Tells AI-generated images from real ones, in bulk, on Ray.

`convert`, `train`, `evaluate` and `score` run the commands of the same names; `load_detector`
returns a detector for single images. `cifake_ray.api` documents them; it is imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cifake_ray.version import __version__

if TYPE_CHECKING:
    from cifake_ray.api import LoadedDetector, convert, evaluate, load_detector, score, train

__all__ = [
    "LoadedDetector",
    "__version__",
    "convert",
    "evaluate",
    "load_detector",
    "score",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("cifake_ray.api"), name)


def __dir__() -> list[str]:
    return __all__
