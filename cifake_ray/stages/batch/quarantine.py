"""Try images one by one in a child process, because one of them may crash it.

The child is this module run by `python -m`; it imports only the decoders, so it starts in a
fraction of a second. It ends with its parent.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from types import TracebackType

from cifake_ray.core.imaging.decode import decode_image, inspect_image
from cifake_ray.errors import ImageError, ResourceError

START_TIMEOUT_S = 120.0
READY = b"ready"


class Quarantine:
    """A child process that tries images, replaced when it dies. `with` ends it."""

    def __init__(self, *, decodes: bool, timeout_s: float) -> None:
        self.decodes = decodes
        self.timeout_s = timeout_s  # for one image
        self.process: subprocess.Popen[bytes] | None = None
        self.connection: Connection | None = None

    def __enter__(self) -> Quarantine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end_child()

    def try_images(
        self, images: Sequence[bytes | ImageError], on_step: Callable[[], None]
    ) -> list[bytes | ImageError]:
        """Return the images, with a worker_crash instead of each that ends a process twice.

        ResourceError when no child can be started.
        """
        tried = []
        for image in images:
            tried.append(image if isinstance(image, ImageError) else self._try_image(image))
            on_step()
        return tried

    def _try_image(self, image: bytes) -> bytes | ImageError:
        # An image before it may be the cause of a death: try once more, in a new process.
        death = self._send_image(image) and self._send_image(image)
        return image if death is None else ImageError("worker_crash", death)

    def _send_image(self, image: bytes) -> str | None:
        """Return None when the child survives the image, else how it died."""
        connection = self.connection or self._start_child()
        try:
            connection.send_bytes(image)
            connection.recv_bytes()
        except (EOFError, OSError):
            return self._explain_death(self._end_child())
        return None

    def _start_child(self) -> Connection:
        mine, its = Pipe()
        # The child finds its packages where this process found them.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        words = [str(its.fileno()), str(self.timeout_s), "decode" if self.decodes else "inspect"]
        try:
            self.process = subprocess.Popen(
                # -P: not in the working folder, which may be that of the images.
                [sys.executable, "-P", "-m", __spec__.name, *words],
                pass_fds=[its.fileno()],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        except OSError as error:
            raise ResourceError(
                f"no process can be started to try images in ({error.strerror}); free memory or"
                " processes and run the same command again"
            ) from error
        finally:
            its.close()
        self.connection = mine
        try:
            if not mine.poll(START_TIMEOUT_S):
                raise EOFError
            mine.recv_bytes()
        except (EOFError, OSError) as error:
            code = self._end_child()
            raise ResourceError(
                f"the process to try images in did not start (exit code {code}); free memory and"
                " run the same command again"
            ) from error
        return mine

    def _end_child(self) -> int | None:
        """End the child if there is one; return its exit code, as subprocess defines it."""
        process, connection = self.process, self.connection
        self.process = self.connection = None
        if process is None or connection is None:
            return None
        connection.close()  # this ends a child that waits for images
        try:
            return process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    def _explain_death(self, code: int | None) -> str:
        if code == -signal.SIGALRM:
            return f"the decoder gave no answer within {self.timeout_s:g} s"
        if code is not None and code < 0:
            return f"the decoder died with signal {-code}"
        return f"the decoder ended its process with exit code {code}"


def serve_images(connection: Connection, *, timeout_s: float, decodes: bool) -> None:
    """Try images, as the child does, until its parent closes the connection."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, in whatever code it hangs
    connection.send_bytes(READY)
    with suppress(EOFError):
        while True:
            image = connection.recv_bytes()
            signal.setitimer(signal.ITIMER_REAL, timeout_s)
            with suppress(ImageError):
                inspect_image(image)
                if decodes:
                    decode_image(image)
            signal.setitimer(signal.ITIMER_REAL, 0)
            connection.send_bytes(READY)


if __name__ == "__main__":
    serve_images(
        Connection(int(sys.argv[1])), timeout_s=float(sys.argv[2]), decodes=sys.argv[3] == "decode"
    )
