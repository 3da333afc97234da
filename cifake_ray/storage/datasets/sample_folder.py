"""Write the sample images to disk."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from cifake_ray.config import SampleConfig
from cifake_ray.core.sample_images import generate_images, name_image
from cifake_ray.errors import UsageError
from cifake_ray.storage.io.files import check_writable
from cifake_ray.storage.io.paths import explain_os_error, resolve_local

RANGE_SIZE = 4_096  # images a process makes at a time


def write_sample(config: SampleConfig) -> Path:
    """Write the folder; files that have the right bytes already are left alone.

    UsageError when it holds other images, such as those of a sample of another size, in which an
    image may have another split.
    """
    out = resolve_local(config.out, "the sample")
    check_writable(out)
    names = {name_image(n, config.images, config.seed) for n in range(config.images)}
    found = (path.relative_to(out) for path in out.glob("*/*/*") if path.is_file())
    if others := [path for path in found if path.with_suffix("").as_posix() not in names]:
        raise UsageError(
            f"{out} holds other files, {len(others):,} such as {min(others)}; choose a new folder"
            " for the sample, or give the same settings"
        )
    starts = range(0, config.images, RANGE_SIZE)
    arguments = [(config, start, min(start + RANGE_SIZE, config.images)) for start in starts]
    if len(arguments) == 1:
        _write_range(*arguments[0])
    else:
        with ProcessPoolExecutor(os.cpu_count()) as processes:
            list(processes.map(_write_range, *zip(*arguments, strict=True)))
    return out


def _write_range(config: SampleConfig, start: int, stop: int) -> None:
    out = resolve_local(config.out, "the sample")
    folders: set[Path] = set()
    images = generate_images(
        num_images=config.images, seed=config.seed, mixed=config.mixed, start=start, stop=stop
    )
    for image in images:
        path = out / image.path
        try:
            if path.parent not in folders:
                path.parent.mkdir(parents=True, exist_ok=True)
                folders.add(path.parent)
            # An untouched file keeps its time stamp, so a conversion in progress stays valid.
            if not path.exists() or path.read_bytes() != image.data:
                path.write_bytes(image.data)
        except OSError as error:
            raise explain_os_error(error, path) from error
