"""Show how many files of an output have been read or written."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from cifake_ray.console import Repeated, drop_parts
from cifake_ray.report.record_text import format_size, format_time

if TYPE_CHECKING:
    from cifake_ray.storage.runs.file_progress import FileProgress


def format_speed(bytes_per_s: float) -> str:
    """Format bytes per second as `1.3 GB/s`."""
    return f"{format_size(round(bytes_per_s))}/s"


@dataclass
class FilesLine(Repeated):
    """Show the progress of a command with its rate and the time left, unless it is soon over."""

    verb: str
    format_rate: Callable[[float], str]
    shown_s: float = field(default_factory=time.monotonic)

    def __call__(self, progress: FileProgress) -> None:
        parts = (
            f"{progress.damaged:,} damaged" if progress.damaged else "",
            self.format_rate(progress.rate),
            "" if progress.eta_s is None else f"{format_time(progress.eta_s)} left",
        )
        texts = drop_parts(
            f"{self.verb}: {progress.done:,} of {progress.total:,} files"
            f" ({progress.done / progress.total:.0%})",
            f"{self.verb}: {progress.done:,}/{progress.total:,}",
            parts,
        )
        self.show(texts, verb=self.verb, **asdict(progress))
