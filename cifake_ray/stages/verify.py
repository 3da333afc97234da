"""Verify an output: many large files by workers, others by threads of this process."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import closing
from functools import partial

from cifake_ray.config import WorkersConfig
from cifake_ray.storage.io.paths import AnyPath
from cifake_ray.storage.runs.file_progress import FileProgress
from cifake_ray.storage.runs.verify import (
    DamagedFile,
    OutputCheck,
    check_files,
    check_here,
    plan_check,
)

SMALL_FILES, SMALL_BYTES = 64, 10**9  # with fewer of either no process is worth its start


def verify_output(
    config: WorkersConfig,
    out: AnyPath,
    on_progress: Callable[[FileProgress], None],
    log: Callable[[str], None],
    plan: Callable[[AnyPath], OutputCheck] = plan_check,
) -> list[DamagedFile]:
    """Return the damage of a run, in the order of its files, and say what else is there.

    StorageError when it cannot be read, or has not finished though `plan` needs that;
    ResourceError when no worker can read.
    """
    check = plan(out)
    if check.foreign:
        more = f" and {len(check.foreign) - 1:,} more" * (len(check.foreign) > 1)
        log(
            f"{out}: not of this run, and left alone: {check.foreign[0]}{more}; readers of the"
            " folder may take them for rows"
        )
    is_small = len(check.names) < SMALL_FILES or check.num_bytes < SMALL_BYTES
    if is_small and config.num_workers is None:
        return check_here(check, on_progress)
    from cifake_ray.stages.batch.task_pool import open_pool  # with all that a worker imports

    with open_pool(config, config.num_workers, log) as pool:
        results = pool.map_items(partial(check_files, out), deque(check.groups))
        with closing(results):
            return check.judge(results, on_progress)
