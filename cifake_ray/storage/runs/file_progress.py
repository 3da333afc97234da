"""Count the files that workers have read or written, for the progress of `verify` and `export`."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass(frozen=True)
class FileProgress:
    """How many files are done, and how fast it goes."""

    done: int
    total: int
    damaged: int
    rate: float  # units per second since the start: bytes that were read, or rows written
    eta_s: float | None  # by the units that are left


@dataclass
class FileCounter:
    """Adds up files and what is in them: `num_units` in all."""

    total: int
    num_units: int
    done: int = 0
    units_done: int = 0
    started_s: float = field(default_factory=time.monotonic)

    def add(self, files: int, units: int) -> None:
        self.done += files
        self.units_done += units

    def describe(self, damaged: int = 0) -> FileProgress:
        """Return the progress now."""
        elapsed_s = time.monotonic() - self.started_s
        rate = self.units_done / elapsed_s if elapsed_s else 0.0
        left = self.num_units - self.units_done
        eta_s = left / rate if rate else None
        return FileProgress(self.done, self.total, damaged, rate, eta_s)
