"""Export scores to a folder of files, written by workers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

from cifake_ray.config import ExportConfig
from cifake_ray.storage.io.paths import AnyPath
from cifake_ray.storage.runs.export_folder import (
    ExportPart,
    FolderExport,
    WrittenPart,
    open_export,
)
from cifake_ray.storage.runs.file_progress import FileCounter, FileProgress

FEW_FILES = 2  # so many are written before a process has started


def export_folder(
    config: ExportConfig,
    scores: AnyPath,
    target: AnyPath,
    on_progress: Callable[[FileProgress], None],
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Write the scores of a run to the files of a folder, or keep those that are there.

    Return the summary. UsageError, RunMismatch or StorageError when that is impossible.
    """
    export = open_export(scores, target, config)
    if (summary := export.find_result()) is not None:
        log(f"export: finished {summary['finished_at']}; --overwrite writes it again")
        return {name: summary[name] for name in ("command", "out", "rows", "left_out", "files")}
    counter = FileCounter(len(export.parts), sum(part.rows for part in export.parts))
    written = []
    with ExitStack() as stack:
        for part, file in _write_parts(export, config, stack, log):
            written.append(file)
            counter.add(1, part.rows)
            on_progress(counter.describe())
    return export.finish(written)


def _write_parts(
    export: FolderExport, config: ExportConfig, stack: ExitStack, log: Callable[[str], None]
) -> Iterator[tuple[ExportPart, WrittenPart]]:
    write = export.writer.write_part
    if len(export.parts) <= FEW_FILES and config.num_workers is None:
        return map(write, export.parts)
    from cifake_ray.stages.batch.task_pool import open_pool  # with all that a worker imports

    pool = stack.enter_context(open_pool(config, config.num_workers, log))
    return stack.enter_context(closing(pool.map_items(write, deque(export.parts))))
