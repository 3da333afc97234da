"""Read the grid of `evaluate --grid`: a built-in one, a YAML file, or its text."""

from __future__ import annotations

from cifake_ray.config import EvaluateConfig
from cifake_ray.config.grid import Grid, parse_grid
from cifake_ray.errors import UsageError
from cifake_ray.storage.io.files import read_if_exists
from cifake_ray.storage.io.paths import resolve_path
from cifake_ray.storage.presets.yaml_presets import PACKAGE, parse_mapping

GRIDS = PACKAGE / "grids"


def read_grid(config: EvaluateConfig) -> Grid | None:
    """Return the cells of `--grid`, None without it. UsageError for an unknown file or step."""
    if config.grid is None:
        return None
    name = f"--grid {config.grid[:60]}"
    built_in = [path.stem for path in GRIDS.glob("*.yaml")]
    if config.grid in built_in:
        data: bytes | None = (GRIDS / f"{config.grid}.yaml").read_bytes()
    elif config.grid.startswith("{"):
        data = config.grid.encode()
    else:
        data = read_if_exists(resolve_path(config.grid, config.store))
    if data is None:
        raise UsageError(f"{name}: no such file, and the built-in grids are {', '.join(built_in)}")
    try:
        return parse_grid(parse_mapping(data, name))
    except UsageError as error:
        raise UsageError(
            str(error) if str(error).startswith(name) else f"{name}: {error}"
        ) from None
