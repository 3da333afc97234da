"""Find bundles: by path or URI, by the RUN that holds one, and built-in ones by name."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from cifake_ray.config import StoreConfig
from cifake_ray.storage.io.files import exists
from cifake_ray.storage.io.paths import AnyPath, resolve_path

BUILT_IN_FOLDER = Path(str(files("cifake_ray") / "bundles"))
FIRST_BUILT_IN = "cifake"  # what runs used when there was no other


def list_built_ins() -> list[str]:
    """Return the names of the detectors that ship with the package, sorted."""
    return sorted(path.parent.name for path in BUILT_IN_FOLDER.glob("*/config.json"))


def locate_bundle(uri: str | None, store: StoreConfig | None = None) -> AnyPath:
    """Return the path of a bundle from its URI, that of its RUN, or the name of a built-in one.

    A name wins over a folder that is called so, whose path is ./NAME. None is the built-in one
    that runs used when there was no other.
    """
    if uri is None or uri in list_built_ins():
        return BUILT_IN_FOLDER / (uri or FIRST_BUILT_IN)
    path = resolve_path(uri, store)
    return path / "bundle" if exists(path / "bundle" / "config.json") else path


def pin_bundle(uri: str, store: StoreConfig | None = None) -> str:
    """Return a URI that means the same in every working folder; a built-in's name stays."""
    return uri if uri in list_built_ins() else str(resolve_path(uri, store))


def name_bundle(path: AnyPath) -> str:
    """Return what `locate_bundle` finds a bundle by: the name of a built-in one, else its URI."""
    is_built_in = path.parent == BUILT_IN_FOLDER and path.name in list_built_ins()
    return path.name if is_built_in else str(path)
