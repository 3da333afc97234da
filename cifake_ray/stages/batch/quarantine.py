"""Try images one by one in a child process, because one of them may crash it.

The child is this module run by `python -m`; it imports only the decoders, so it starts in a
fraction of a second. It ends with its parent.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection

from cifake_ray.core.imaging.decode import decode_image, inspect_image
from cifake_ray.errors import ImageError
from cifake_ray.stages.batch.child_process import READY, ChildProcess, connect_parent


class Quarantine:
    """A child process that tries images, replaced when it dies. `with` ends it."""

    def __init__(self, *, decodes: bool, timeout_s: float) -> None:
        self.decodes = decodes
        self.timeout_s = timeout_s  # for one image
        self.child: ChildProcess | None = None

    def __enter__(self) -> Quarantine:
        return self

    def __exit__(self, *error: object) -> None:
        self._end_child()

    def try_images(
        self, images: Sequence[bytes | ImageError], on_step: Callable[[], None] = lambda: None
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
        child = self.child or self._start_child()
        try:
            child.connection.send_bytes(image)
            child.connection.recv_bytes()
        except (EOFError, OSError):
            return self._explain_death(self._end_child())
        return None

    def _start_child(self) -> ChildProcess:
        what = "decode" if self.decodes else "inspect"
        self.child = ChildProcess(__spec__.name, str(self.timeout_s), what)
        self.child.wait_ready()
        return self.child

    def _end_child(self) -> int | None:
        """End the child if there is one; return its exit code, as subprocess defines it."""
        child, self.child = self.child, None
        return child.end() if child else None

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
    parent, (timeout_s, what) = connect_parent(sys.argv[1:])
    serve_images(parent, timeout_s=float(timeout_s), decodes=what == "decode")
