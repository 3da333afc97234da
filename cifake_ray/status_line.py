"""The line that says what a command is doing: in place on a terminal, else every few seconds.

All output of a command passes here, so that the line is never glued to another one. A thread
repeats the line while nothing else is printed.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

FIRST_S = 0.8  # a command that ends sooner shows no line
PLAIN_INTERVAL_S = 4.0  # between two lines of progress where there is no terminal
REPEAT_S = 4.7  # of silence: then what is being done is said again
TERMINAL_INTERVAL_S = 0.2
NOISE = "(raylet)"  # Ray's messages about lost workers, which are retried, and in its logs
CLEAR = "\r\x1b[K"


class StatusLine:
    """What is being done, as texts from the fullest to the shortest."""

    def __init__(self) -> None:
        self.texts: Sequence[str] = ()
        self.since_s = 0.0  # when it was set
        self.shown_s = 0.0  # when anything was printed last
        self.is_new = False  # it says what begins now, and has not been shown
        self.is_open = False  # the cursor is behind the line on a terminal
        self.lock = threading.RLock()

    def set(self, *texts: str, at_once: bool = False) -> None:
        """Set what is being done; show it if the line is there already, or else `at_once`."""
        with self.lock:
            self.texts, self.since_s = texts, time.monotonic()
            self.is_new = texts[0].endswith("...")
            if self.is_open or at_once:
                self.draw()

    def write(self, text: str, stream: TextIO, end: str = "\n") -> None:
        """Print below what was printed before; after a broken pipe (`| head`) discard output."""
        stream = stream.stream if isinstance(stream, _ForeignOutput) else stream
        with self.lock:
            try:
                if self.is_open:
                    print(CLEAR, end="", file=_find_stderr(), flush=True)
                    self.is_open = False
                print(text, end=end, file=stream, flush=True)
            except BrokenPipeError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            self.shown_s = time.monotonic()

    def draw(self) -> None:
        """Show the line in place, as much of it as is room for."""
        width = shutil.get_terminal_size().columns - 1
        with self.lock:
            texts = [self._add_age(text) for text in self.texts]
            text = next((t for t in texts if len(t) <= width), self.texts[-1][:width])
            self.write(text, sys.stderr, end="")
            self.is_open = True

    def _add_age(self, text: str) -> str:
        age_s = round(time.monotonic() - self.since_s)
        if text.endswith("..."):
            return f"{text} {age_s} s" if age_s else text
        return f"{text}, {age_s} s ago" if age_s >= PLAIN_INTERVAL_S else text

    def tick(self) -> None:
        """Show the line if nothing else was printed for a while."""
        with self.lock:
            if not self.texts:
                return
            now_s = time.monotonic()
            silent_s = now_s - self.shown_s
            if sys.stderr.isatty():
                if self.is_open or silent_s >= FIRST_S:
                    self.draw()
            elif silent_s >= REPEAT_S or (
                self.is_new and min(silent_s, now_s - self.since_s) >= FIRST_S
            ):
                self.is_new = False
                self.write(self._add_age(self.texts[0]), sys.stderr)

    @contextmanager
    def keep_alive(self) -> Iterator[None]:
        """Repeat the line while a command runs, and keep others' output off it."""
        ended = threading.Event()
        self.set("cifake-ray: starting ...")
        self.shown_s = time.monotonic()
        interval_s = 5 * TERMINAL_INTERVAL_S if sys.stderr.isatty() else TERMINAL_INTERVAL_S

        def repeat() -> None:
            while not ended.wait(interval_s):
                self.tick()

        stderr = sys.stderr
        own = _open_again(stderr)
        sys.stderr = _ForeignOutput(own, self)
        self.is_open = False
        thread = threading.Thread(target=repeat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            sys.stderr = stderr
            if own is not stderr:
                own.close()
            self.texts = ()


def _open_again(stderr: TextIO) -> TextIO:
    """Return a stream of its own to the terminal: Ray's native output is held back in the other."""
    try:
        return os.fdopen(os.dup(stderr.fileno()), "w", encoding=stderr.encoding, errors="replace")
    except OSError:  # not a file, such as in a test
        return stderr


def _find_stderr() -> TextIO:
    return sys.stderr.stream if isinstance(sys.stderr, _ForeignOutput) else sys.stderr


class _ForeignOutput:
    """stderr for whatever else prints, such as Ray: by whole lines, and without its noise."""

    def __init__(self, stream: TextIO, status: StatusLine) -> None:
        self.stream, self.status, self.begun = stream, status, ""

    def write(self, text: str) -> int:
        *lines, self.begun = (self.begun + text).split("\n")
        for line in lines:
            if NOISE not in line:
                self.status.write(line, self.stream)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
