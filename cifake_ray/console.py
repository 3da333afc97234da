"""Print the output of the commands, and end each one with its exit code.

Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, redirect_stdout, suppress
from dataclasses import asdict, dataclass, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from textwrap import fill
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, TextIO

from cifake_ray.errors import CifakeError, ExitCode
from cifake_ray.report.record_text import clean_text, format_record, format_time
from cifake_ray.status_line import PLAIN_INTERVAL_S, TERMINAL_INTERVAL_S, StatusLine

if TYPE_CHECKING:
    from cifake_ray.stages.batch.summary import Progress

LogFormat = Literal["text", "json"]
_log_format: LogFormat = "text"

SAME_SIGNAL_S = 1.0  # a signal to a group of processes comes twice, the second time from a parent
SIGNALS = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED = "interrupted; run the same command again to resume"
_status = StatusLine()


class Terminated(KeyboardInterrupt):
    """Raised on SIGTERM, which is handled like Ctrl-C."""


def run_command(
    body: Callable[[], tuple[Any, int]],
    *,
    json_output: bool,
    debug: bool,
    show: Callable[[Any], str] | None = None,
) -> None:
    """Run a command's body, print its result, and exit with its code.

    `show` formats the result as text; the default is `format_result`. A body that has printed
    its result itself returns None.
    """

    signalled_s = math.inf

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal signalled_s
        if signalled_s == math.inf:
            signalled_s = time.monotonic()
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt
        if time.monotonic() - signalled_s > SAME_SIGNAL_S:  # a second one ends the clean-up too
            os._exit(128 + number)

    def on_unexpected(kind: type[BaseException], failure: BaseException, trace: Any) -> None:
        if debug:
            _show_traceback(failure)
        frame = traceback.extract_tb(trace)[-1]
        message = (
            f"unexpected {kind.__name__}: {failure} ({Path(frame.filename).name}:{frame.lineno}, in"
            f" {frame.name}); --debug shows the whole traceback"
        )
        log(f"cifake-ray: {message}")
        if json_output:
            _put(_encode({"error": message, "exit_code": int(ExitCode.UNEXPECTED)}), sys.stdout)

    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as in the background of a shell
            signal.signal(number, on_signal)
    sys.excepthook = on_unexpected
    error = ""
    result: Any = None
    try:
        apart = redirect_stdout(sys.stderr) if json_output else nullcontext()  # Ray prints errors
        status = _status.keep_alive() if _log_format == "text" else nullcontext()
        with apart, status, _LostSignals():
            result, code = body()
    except CifakeError as failure:
        error, code = str(failure), failure.exit_code
        if debug:
            _show_traceback(failure)
    except KeyboardInterrupt as failure:
        terminated = isinstance(failure, Terminated)
        code = ExitCode.TERMINATED if terminated else ExitCode.INTERRUPTED
        error = str(failure) or INTERRUPTED
    except SystemExit:  # while Ray starts, SIGTERM is its own
        signalled_s = time.monotonic()
        code, error = ExitCode.TERMINATED, INTERRUPTED
    if json_output and (error or result is not None):
        record = {"error": error} if error else _to_record(result)
        _put(_encode({**record, "exit_code": int(code)}), sys.stdout)
    if error:
        _say(f"cifake-ray: {error}")  # whatever it ends with
    elif not json_output and result is not None:
        text = show(result) if show else format_result(_to_record(result))
        _put("\n".join(map(clean_text, text.split("\n"))), sys.stdout)
    sys.exit(int(code))


class _LostSignals:
    """Raise an interrupt instead of a failure that it led to.

    A library may take the signal and lose it, as Ray can while it starts. Python writes the number
    of each signal to this pipe, whoever's handler takes it.
    """

    def __enter__(self) -> None:
        self.numbers, written = os.pipe()
        for end in (self.numbers, written):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(written, warn_on_full_buffer=False)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        if isinstance(error, Exception):
            with suppress(BlockingIOError):
                for number in os.read(self.numbers, 4096):
                    if number in SIGNALS:
                        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def _put(text: str, stream: TextIO) -> None:
    _status.write(text, stream)


def _encode(record: dict[str, Any]) -> str:
    """Encode as one line of ASCII JSON, without any control character (DEL included)."""
    return json.dumps(record).replace("\x7f", "\\u007f")


def _show_traceback(failure: BaseException) -> None:
    for line in "".join(traceback.format_exception(failure)).splitlines():
        _say(line)


def _to_record(result: Any) -> dict[str, Any]:
    if is_dataclass(result) and not isinstance(result, type):
        return asdict(result)
    return dict(result)


def format_result(record: dict[str, Any]) -> str:
    """Format a result as sentences, and what they do not say as `name  value` lines.

    On a terminal lines end where a word does.
    """
    from cifake_ray.report.summary_text import split_summary

    sentences, rest = split_summary(record)
    lines = [clean_text(sentence) for sentence in sentences]
    lines += format_record(rest).splitlines() if rest else []
    return "\n".join(_fit_line(line, sys.stdout) for line in lines)


def _fit_line(line: str, stream: TextIO) -> str:
    """Break a line between words where a terminal would break it anywhere."""
    columns = shutil.get_terminal_size().columns
    if len(line) <= columns or not stream.isatty():
        return line
    return fill(
        line, columns, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def choose_log_format(log_format: LogFormat) -> LogFormat:
    """Set the format of `log`."""
    global _log_format
    _log_format = log_format
    return log_format


def log(message: str, **fields: Any) -> None:
    """Write a line to stderr: the message, or with `--log-format json` also `fields`.

    A message that ends with `...` says what begins now: it is shown while it lasts, and not written
    if that is soon over.
    """
    if message.endswith("..."):
        _status.set(clean_text(message))
    else:
        _say(message, **fields)


def _say(message: str, **fields: Any) -> None:
    if _log_format == "json":
        time_utc = datetime.now(UTC).isoformat(timespec="milliseconds")
        _put(_encode({"time": time_utc, "message": message, **fields}), sys.stderr)
    else:
        _put(_fit_line(clean_text(message), sys.stderr), sys.stderr)


def get_log_format() -> LogFormat:
    """Return the format of `log`."""
    return _log_format


def show_line(line: str, stream: TextIO | None = None) -> None:
    """Print one line of a result, by default to stdout."""
    _put(clean_text(line), stream or sys.stdout)


def show_bytes(chunks: Iterable[bytes]) -> None:
    """Write a result to stdout; after a broken pipe (`| head`) no more is made.

    It is written as it is, but for a terminal, which control characters of a key could control.
    """
    try:
        for chunk in chunks:
            if sys.stdout.isatty():
                lines = chunk.decode("utf-8", "backslashreplace").split("\n")
                chunk = "\n".join(map(clean_text, lines)).encode()
            sys.stdout.buffer.write(chunk)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Repeated:
    """Show progress now and then: in place on a terminal, else as a line every 5 s."""

    shown_s = 0.0

    def show(self, texts: Sequence[str], *, is_last: bool = False, **fields: Any) -> None:
        """Show `texts`, which say the same with ever fewer words, unless it was just shown."""
        is_terminal = sys.stderr.isatty() and _log_format == "text"
        interval_s = TERMINAL_INTERVAL_S if is_terminal else PLAIN_INTERVAL_S
        if time.monotonic() - self.shown_s < interval_s and not is_last:
            return
        self.shown_s = time.monotonic()
        is_in_place = is_terminal and not is_last
        _status.set(*texts, at_once=is_in_place)
        if not is_in_place:
            log(texts[0], **fields)


def drop_parts(head: str, short_head: str, parts: Sequence[str]) -> list[str]:
    """Return `head` with all parts, with ever fewer of them (the first go first), and alone."""
    parts = [part for part in parts if part]
    texts = [", ".join([head, *parts[n:]]) for n in range(len(parts) + 1)]
    return [*texts, short_head]


@dataclass
class ProgressLine(Repeated):
    """Show the progress of a batch with its rate and the time left."""

    verb: str = ""

    def __call__(self, progress: Progress) -> None:
        done = progress.done + progress.failed
        share = f"{done / progress.listed:.0%}"
        parts = (
            f"{progress.failed:,} failed",
            f"{progress.images_per_s:,.0f} images/s",
            "" if progress.eta_s is None else f"{format_time(progress.eta_s)} left",
        )
        texts = drop_parts(
            f"{self.verb}: {done:,} of {progress.listed:,} images ({share})",
            f"{self.verb}: {done:,}/{progress.listed:,}",
            parts,
        )
        is_last = done == progress.listed
        self.show(texts, is_last=is_last, verb=self.verb, **asdict(progress))
        if is_last:
            _status.set(f"{self.verb}: finishing ...")


class StepLine(Repeated):
    """Show the progress within an epoch of training."""

    def __call__(self, row: dict[str, Any]) -> None:
        head = f"train: epoch {row['epoch']} of {row['epochs']}"
        parts = (
            f"loss {row['loss']:.4f}",
            f"{row['images_per_s']:,.0f} images/s",
            f"{format_time(row['eta_s'])} left",
        )
        batch = f"batch {row['batch']:,} of {row['batches']:,}"
        self.show(drop_parts(f"{head}, {batch}", head, parts), **row)


def show_epoch(row: dict[str, Any], epochs: int) -> None:
    """Log a finished epoch of training."""
    left = (epochs - row["epoch"]) * (row["train_s"] + row["val_s"])
    log(
        f"train: epoch {row['epoch']} of {epochs}, loss {row['train_loss']:.4f}, validation loss"
        f" {row['val_loss']:.4f}, accuracy {row['val_accuracy']:.2%},"
        f" {row['images_per_s']:,.0f} images/s, {format_time(left)} left",
        **row,
    )
    if row["epoch"] < epochs:
        _status.set(f"train: epoch {row['epoch'] + 1} of {epochs} ...")
