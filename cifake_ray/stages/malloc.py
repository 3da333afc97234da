"""Memory settings of worker processes."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc, malloc.h
MAX_CHUNK_BYTES = 2**30


def keep_freed_memory() -> None:
    """Let glibc reuse large buffers instead of giving them back to the system at every free.

    A network's activations are freed and allocated again with each batch. If they are mapped again
    each time, every page faults: with the baseline cnn that took over half of the CPU time.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl has none
        mallopt(M_MMAP_THRESHOLD, MAX_CHUNK_BYTES)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
