"""The command: a process that works, and a parent that sees to it that no end is silent.

Ray's native code ends a process without a word when Ray's own processes are gone, as after a signal
to the whole group; an interrupt may come before there is a handler, or be lost in a library; and
memory may run out. The parent sees each of these, and imports nothing that could fail with it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import FrameType

CLEAN_UP_S = 20  # after a signal
SIGNALS = (signal.SIGINT, signal.SIGTERM)
PR_SET_PDEATHSIG = 1


def main(verb: str | None = None) -> None:
    """Run `cifake-ray`; a job file passes its verb."""
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"  # in the C locale the names of files would be no text
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    _open_standard_streams()
    try:
        os.getcwd()
    except OSError as error:  # libraries would end the process without a word
        _say(f"the working folder: {error.strerror}; change to another one", 2)
        sys.exit(2)
    on_end = _fork_worker() if sys.platform == "linux" else lambda: None
    try:
        from cifake_ray import cli

        cli.main(verb, on_end)
    finally:  # an error that nobody expected: Python shows it
        on_end()


def _open_standard_streams() -> None:
    """Open what was closed (`>&-`): the next file would get its number, and whatever is printed."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            os.set_inheritable(number, True)
            setattr(sys, name, open(number, "w" if number else "r"))  # noqa: SIM115


def _fork_worker() -> Callable[[], object]:
    """Return in a child; in the parent, end as the child does.

    The child calls what is returned once it has printed its last line.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if it is ignored, no end can be waited for
    ends, said = os.pipe()
    parent = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    child = os.fork()
    if child:
        os.close(said)
        sys.exit(_wait_for_worker(child, ends))
    import ctypes

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    os.close(ends)
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as in the background of a shell
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    return partial(os.write, said, b".")


def _wait_for_worker(child: int, ends: int) -> int:
    """Return the child's exit code. Pass signals on; say what the child could not say."""
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        os.kill(child, number)
        signal.alarm(CLEAN_UP_S)

    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, pass_on)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # it keeps its number
    signal.pthread_sigmask(signal.SIG_BLOCK, (*SIGNALS, signal.SIGALRM))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.set_blocking(ends, False)
    with suppress(BlockingIOError):
        if os.read(ends, 1):
            return code
    if received:
        code, error = 128 + received[0], "interrupted"
    elif code < 0:
        memory = "; is memory short?" if code == -signal.SIGKILL else ""
        code, error = 128 - code, f"ended by {signal.Signals(-code).name}{memory}"
    else:
        code, error = code or 1, "ended by Ray, whose own processes are gone; is memory short?"
    _say(f"{error}; run the same command again to resume", code)
    return code


def _say(error: str, code: int) -> None:
    with suppress(OSError):  # nobody reads it any more
        if "--json" in sys.argv:
            os.write(1, f"{json.dumps({'error': error, 'exit_code': code})}\n".encode())
        os.write(2, f"cifake-ray: {error}\n".encode())


if __name__ == "__main__":
    if not sys.flags.safe_path:
        del sys.path[0]  # the working folder: a `numpy.py` among the images would be imported
    main()
