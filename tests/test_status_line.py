"""The line that says what is being done: soon, often enough, never glued, never too wide."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import time
from contextlib import redirect_stderr
from pathlib import Path

import pytest

from cifake_ray import console, status_line
from cifake_ray.console import (
    ProgressLine,
    StepLine,
    choose_log_format,
    log,
    run_command,
)
from cifake_ray.report.record_text import format_record
from cifake_ray.stages.batch.summary import Progress
from cifake_ray.status_line import StatusLine

CLEAR = status_line.CLEAR


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of all times."""
    for name in ("FIRST_S", "REPEAT_S", "TERMINAL_INTERVAL_S"):
        monkeypatch.setattr(status_line, name, getattr(status_line, name) / 10)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(seconds: float, *messages: str) -> None:
    def body() -> tuple[dict[str, str], int]:
        for message in messages:
            log(message)
            time.sleep(seconds)
        return {"command": "x"}, 0

    with pytest.raises(SystemExit):
        run_command(body, json_output=True, debug=False)


def test_a_long_command_says_what_it_does_again_and_again(
    capsys: pytest.CaptureFixture[str], quick: None
) -> None:
    run(1.0, "score: starting Ray ...", "score: starting workers ...")
    out, err = capsys.readouterr()
    assert out == '{"command": "x", "exit_code": 0}\n'
    lines = err.splitlines()
    assert lines[0] == "score: starting Ray ..."
    assert "score: starting Ray ... 1 s" in lines or len(lines) > 3
    assert lines[-1].startswith("score: starting workers ...")
    assert 4 <= len(lines) <= 8


def test_a_short_command_says_nothing(capsys: pytest.CaptureFixture[str], quick: None) -> None:
    run(0.0, "score: starting Ray ...")
    assert capsys.readouterr().err == ""


def test_a_log_for_programs_has_no_such_lines(
    capsys: pytest.CaptureFixture[str], quick: None
) -> None:
    choose_log_format("json")
    try:
        run(0.8, "score: starting Ray ...")
    finally:
        choose_log_format("text")
    assert capsys.readouterr().err == ""


def test_on_a_terminal_the_line_stays_in_its_place(quick: None) -> None:
    with redirect_stderr(Terminal()) as terminal:
        run(0.5, "score: starting Ray ...", "a warning", "score: starting workers ...")
    shown = terminal.getvalue()
    assert shown.count("\n") == 1
    assert re.search(re.escape(CLEAR) + "a warning\n", shown)
    assert shown.endswith(CLEAR)  # nothing is left of the line


def test_what_others_print_is_not_glued_to_the_line(quick: None) -> None:
    line = StatusLine()
    with redirect_stderr(Terminal()) as terminal, line.keep_alive():
        line.set("score: 1 of 2")
        line.draw()
        print("\x1b[36m(raylet)\x1b[0m Task MapWorker.submit failed.", file=sys.stderr)
        print("half a ", end="", file=sys.stderr)
        print("line", file=sys.stderr)
    shown = terminal.getvalue()
    assert "raylet" not in shown
    assert f"{CLEAR}half a line\n" in shown


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_progress_fits_the_terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(console, "_status", StatusLine())
    progress = Progress(
        done=1_234_567, failed=89, listed=9_876_543, images_per_s=12_345.6, eta_s=98_765.0
    )
    row = {"epoch": 3, "epochs": 80, "batch": 1200, "batches": 3510, "loss": 0.5}
    with redirect_stderr(Terminal()) as terminal:
        ProgressLine("evaluate")(progress)
        StepLine()({**row, "images_per_s": 12_345.0, "eta_s": 98_765.0})
    shown = [text for text in terminal.getvalue().split(CLEAR) if text]
    assert max(map(len, shown)) < columns
    assert "evaluate: 1,234,656" in shown[0]
    assert "train: epoch 3 of 80" in shown[1]
    if columns == 200:
        assert "89 failed, 12,346 images/s, 27:26:05 left" in shown[0]
        assert shown[1].endswith(
            "batch 1,200 of 3,510, loss 0.5000, 12,345 images/s, 27:26:05 left"
        )


def test_sizes_are_for_people() -> None:
    record = {"a_bytes": 12, "b_bytes": 122_926_001, "c_bytes": 5 * 10**15}
    assert [line.split("  ")[-1] for line in format_record(record).splitlines()] == [
        "12 bytes",
        "122.9 MB",
        "5,000.0 TB",
    ]


def test_a_closed_pipe_ends_no_command(tmp_path: object) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        StatusLine().write("x" * 100_000, stream)


def test_the_line_is_seen_while_native_output_is_held_back(tmp_path: Path) -> None:
    """As it is while Ray starts: the file behind stderr is another one."""
    script = """
import os, time
from cifake_ray.console import log, run_command
def body():
    terminal, held = os.dup(2), os.open("held", os.O_CREAT | os.O_WRONLY)
    log("starting Ray ...")
    os.dup2(held, 2)
    time.sleep(2)
    os.dup2(terminal, 2)
    return {"command": "x"}, 0
run_command(body, json_output=False, debug=False)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stderr.startswith("starting Ray ...")
