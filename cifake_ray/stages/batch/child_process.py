"""Start a process of this package that answers over a pipe, and end it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from cifake_ray.errors import ResourceError

START_TIMEOUT_S = 120.0
END_TIMEOUT_S = 5.0
READY = b"ready"  # what the process sends first


class ChildProcess:
    """A module run by `python -m`, with the pipe's number as its first argument.

    The process ends when the pipe is closed, so it does not outlive its parent.
    """

    def __init__(self, module: str, *words: str, env: Mapping[str, str] | None = None) -> None:
        """Start it. ResourceError when that is impossible."""
        self.connection, its = Pipe()
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the process)
        # It finds its packages where this process found them.
        path = os.pathsep.join(filter(None, sys.path))
        try:
            self.process = subprocess.Popen(
                # -P: not in the working folder, which may be that of the images.
                [sys.executable, "-P", "-m", module, str(its.fileno()), *words],
                pass_fds=[its.fileno()],
                env={**os.environ, "PYTHONPATH": path, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self.stderr,
            )
        except OSError as error:
            self.connection.close()
            self.stderr.close()
            raise ResourceError(
                f"no process can be started ({error.strerror}); free memory or processes and run"
                " the same command again"
            ) from error
        finally:
            its.close()

    def wait_ready(self) -> None:
        """Wait until it has started. ResourceError when it does not."""
        with suppress(EOFError, OSError):
            if self.connection.poll(START_TIMEOUT_S):
                self.connection.recv_bytes()
                return
        raise ResourceError(self.explain_start(self.end()))

    def explain_start(self, code: int) -> str:
        """Return the error message of a process that has ended before it was ready."""
        last = self.errors.strip().rpartition("\n")[2]
        return (
            f"a process of this command did not start (exit code {code}"
            f"{last and f'; it said {last!r}'}); free memory and run the same command again"
        )

    def end(self, timeout_s: float = END_TIMEOUT_S) -> int:
        """End the process, by force after `timeout_s`; return its exit code as subprocess does."""
        self.connection.close()
        if self.stderr.closed:
            return self.process.wait()
        try:
            self.process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
        with self.stderr:
            self.stderr.seek(0)
            self.errors = self.stderr.read().decode(errors="replace")
        return self.process.wait()


def connect_parent(arguments: list[str]) -> tuple[Connection[Any, Any], list[str]]:
    """Return, in the process, the pipe and the other arguments."""
    return Connection(int(arguments[0])), arguments[1:]
