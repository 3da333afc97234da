"""How a command ends: what it prints, and what it tells the shell."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from cifake_ray.config import ConvertConfig
from cifake_ray.console import (
    ProgressLine,
    Terminated,
    choose_log_format,
    log,
    run_command,
    show_bytes,
    show_epoch,
)
from cifake_ray.errors import (
    BundleError,
    CifakeError,
    ExitCode,
    NothingToDo,
    ResourceError,
    RunMismatch,
    StorageError,
    UsageError,
)
from cifake_ray.pipeline import judge_errors
from cifake_ray.report.record_text import clean_text
from cifake_ray.stages.batch.summary import BatchSummary, Progress


@pytest.fixture(autouse=True)
def keep_handlers(monkeypatch: pytest.MonkeyPatch) -> Any:
    """run_command owns its process; here it is a guest."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@dataclass
class Ending:
    code: int
    out: str
    err: str


def end(
    capsys: pytest.CaptureFixture[str],
    outcome: BaseException | Any,
    *,
    json_output: bool = False,
    debug: bool = False,
    code: int = 0,
) -> Ending:
    """Run a body that raises or returns `outcome`."""

    def body() -> tuple[Any, int]:
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome, code

    with pytest.raises(SystemExit) as stop:
        run_command(body, json_output=json_output, debug=debug)
    out, err = capsys.readouterr()
    assert isinstance(stop.value.code, int)
    return Ending(stop.value.code, out, err)


FAILURES = [
    (CifakeError("x"), 1),
    (UsageError("x"), 2),
    (RunMismatch("x"), 2),
    (StorageError("x"), 4),
    (BundleError("x"), 4),
    (NothingToDo("x"), 5),
    (ResourceError("x"), 6),
    (KeyboardInterrupt(), 130),
    (Terminated(), 143),
]


@pytest.mark.parametrize(("failure", "code"), FAILURES, ids=lambda value: type(value).__name__)
def test_every_failure_has_its_exit_code_and_one_line(
    capsys: pytest.CaptureFixture[str], failure: BaseException, code: int
) -> None:
    ending = end(capsys, failure)
    assert ending.code == code
    assert ending.out == ""
    assert ending.err.startswith("cifake-ray: ")
    assert ending.err.count("\n") == 1


def test_an_error_is_shown_whatever_it_ends_with(capsys: pytest.CaptureFixture[str]) -> None:
    assert end(capsys, StorageError("the store says: slow down ...")).err.endswith("down ...\n")


@pytest.mark.parametrize(("failure", "code"), FAILURES, ids=lambda value: type(value).__name__)
def test_json_is_one_object_with_error_and_exit_code(
    capsys: pytest.CaptureFixture[str], failure: BaseException, code: int
) -> None:
    record = json.loads(end(capsys, failure, json_output=True).out)
    assert record["exit_code"] == code
    assert record["error"]


def test_an_interruption_says_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert "same command again" in end(capsys, KeyboardInterrupt()).err


def test_a_result_goes_to_stdout_with_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    ending = end(capsys, {"listed": 1234, "errors": {}, "rate": 0.5}, code=3)
    assert ending.code == 3
    assert ending.out == "listed  1,234\nrate    0.5\n"
    assert ending.err == ""


def test_a_result_as_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    ending = end(capsys, {"listed": 1234, "errors": {"empty": 1}}, json_output=True, code=3)
    assert ending.out.count("\n") == 1
    assert json.loads(ending.out) == {"listed": 1234, "errors": {"empty": 1}, "exit_code": 3}


def test_json_stands_alone_on_stdout_whatever_a_library_prints(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ray's driver prints what its raylets report, whatever `log_to_driver` says."""

    def body() -> tuple[dict[str, int], int]:
        print("(raylet) Task failed.")
        return {"done": 1}, 0

    with pytest.raises(SystemExit):
        run_command(body, json_output=True, debug=False)
    ending = capsys.readouterr()
    assert json.loads(ending.out) == {"done": 1, "exit_code": 0}
    assert ending.err == "(raylet) Task failed.\n"


def test_a_dataclass_is_a_result(capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads(end(capsys, Ending(1, "a", "b"), json_output=True).out)
    assert record == {"code": 1, "out": "a", "err": "b", "exit_code": 0}


def test_the_traceback_is_shown_only_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Traceback" not in end(capsys, StorageError("x")).err
    assert "Traceback" in end(capsys, StorageError("x"), debug=True).err
    assert "Traceback" in end(capsys, UsageError("x"), debug=True).err


@pytest.mark.parametrize(("max_error_rate", "code"), [(0.2, 0), (0.05, 3)])
def test_the_exit_code_of_too_many_errors_comes_with_a_line(
    capsys: pytest.CaptureFixture[str], max_error_rate: float, code: int
) -> None:
    counts = dict.fromkeys((f.name for f in fields(BatchSummary)), 0)
    errors = {"not_an_image": 90, "truncated": 10}
    summary = BatchSummary(
        **{**counts, "command": "score", "out": "OUT", "listed": 1200, "failed": 100},  # type: ignore[arg-type]
    )
    config = ConvertConfig(src="s", out="o", max_error_rate=max_error_rate)
    assert judge_errors(replace(summary, errors=errors), config) == code
    said = capsys.readouterr().err
    assert bool(said) == bool(code)
    if code:
        assert "100 of 1,200 images failed (90 not_an_image, 10 truncated)" in said
        assert "--max-error-rate 0.05: exit code 3" in said


HOSTILE = "a\x1b]0;title\x07\x1b[2J\r\nb\x9bc\x7f\u202egpj\u2028\x00"


def is_harmless(text: str) -> bool:
    return all(c.isprintable() for c in text.removesuffix("\n"))


def test_control_characters_never_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert is_harmless(end(capsys, StorageError(HOSTILE)).err)
    for value in (HOSTILE, {HOSTILE: 1}, {"x": HOSTILE}, [HOSTILE]):
        assert is_harmless(end(capsys, {"key": value}).out)
    log(HOSTILE)
    assert is_harmless(capsys.readouterr().err)
    assert clean_text("caf\u00e9 \U0001f9ff ok") == "caf\u00e9 \U0001f9ff ok"
    assert clean_text("\x1b\udcff") == "\\x1b\\udcff"


@pytest.mark.parametrize("kind", [StorageError, UsageError])
def test_control_characters_of_a_traceback_never_reach_the_terminal(
    capsys: pytest.CaptureFixture[str], kind: type[Exception]
) -> None:
    ending = end(capsys, kind(HOSTILE), debug=True)
    assert "Traceback" in ending.err
    assert all(is_harmless(line) for line in ending.err.split("\n"))


def test_control_characters_never_reach_the_terminal_as_json_either(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for outcome in ({"key": HOSTILE}, StorageError(HOSTILE)):
        ending = end(capsys, outcome, json_output=True)
        assert is_harmless(ending.out)
        assert HOSTILE in json.loads(ending.out).values()


# --- in a process of its own ---------------------------------------------------------------------

RUN = """
import os, signal, sys, time
from cifake_ray.console import run_command
from cifake_ray.errors import StorageError
def body():
    {body}
    return {{"key": "value"}}, 0
run_command(body, json_output={json_output}, debug={debug})
"""


def run_body(
    body: str, *, json_output: bool = False, debug: bool = False
) -> subprocess.CompletedProcess[bytes]:
    script = RUN.format(body=body, json_output=json_output, debug=debug)
    return subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        timeout=60,
        check=False,
        # in the background of a shell SIGINT is ignored, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_ends_the_command_cleanly_with_its_code(number: str, code: int) -> None:
    process = run_body(f"os.kill(os.getpid(), signal.{number}); time.sleep(30)", json_output=True)
    assert process.returncode == code
    assert json.loads(process.stdout)["exit_code"] == code
    assert b"Traceback" not in process.stderr


def test_a_library_that_exits_on_a_signal_is_interrupted() -> None:
    """Ray does while it starts."""
    body = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(15)); os.kill(os.getpid(), 15)"
    process = run_body(body, json_output=True)
    assert process.returncode == json.loads(process.stdout)["exit_code"] == ExitCode.TERMINATED
    assert process.stderr.count(b"\n") == 1


@pytest.mark.parametrize("failure", ["OSError('gone')", "UsageError('gone')"])
@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_failure_that_a_signal_led_to_is_an_interrupt(
    failure: str, number: str, code: int
) -> None:
    """A library takes the signal, loses it, and fails since its other processes have ended."""
    process = run_body(
        f"from cifake_ray.errors import UsageError; signal.signal(signal.{number}, lambda *_: 0);"
        f" os.kill(os.getpid(), signal.{number}); raise {failure}",
        json_output=True,
    )
    assert process.returncode == code, process.stderr
    assert json.loads(process.stdout)["exit_code"] == code
    assert process.stderr == b"cifake-ray: interrupted; run the same command again to resume\n"


def test_the_clean_up_of_the_body_runs_on_a_signal(tmp_path: Path) -> None:
    mark = tmp_path / "cleaned"
    body = (
        "from contextlib import ExitStack\n"
        "    with ExitStack() as stack:\n"
        f"        stack.callback(open, {str(mark)!r}, 'w')\n"
        "        os.kill(os.getpid(), signal.SIGTERM); time.sleep(30)"
    )
    assert run_body(body).returncode == ExitCode.TERMINATED
    assert mark.exists()


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("kind", ["RuntimeError", "ValueError"])  # of numpy, pyarrow, torch, json
def test_what_nobody_expected_ends_with_1_its_class_and_place(kind: str, debug: bool) -> None:
    process = run_body(f"raise {kind}('boom\\x1b[2J')", json_output=True, debug=debug)
    assert process.returncode == 1
    assert f"unexpected {kind}: boom".encode() in process.stderr
    assert re.search(rb"\(<string>:\d+, in body\); --debug shows", process.stderr)
    assert b"\x1b" not in process.stderr + process.stdout
    assert (b"Traceback" in process.stderr) == debug
    record = json.loads(process.stdout)
    assert record["exit_code"] == 1
    assert kind in record["error"]


@pytest.mark.parametrize("json_output", [False, True])
def test_a_path_that_is_not_utf8_can_be_named(json_output: bool) -> None:
    """Such bytes come out of the command line as lone surrogates."""
    body = "raise StorageError('bad' + os.fsdecode(b'\\xff') + ': not there')"
    process = run_body(body, json_output=json_output)
    assert process.returncode == ExitCode.STORAGE, process.stderr
    assert b"bad\\udcff: not there" in process.stderr
    if json_output:
        assert json.loads(process.stdout)["exit_code"] == ExitCode.STORAGE


# --- lines ---------------------------------------------------------------------------------------


def test_a_command_may_show_its_result_its_own_way(capsys: pytest.CaptureFixture[str]) -> None:
    for json_output, expected in ((False, "a\nb\\x1b\n"), (True, '{"n": 1, "exit_code": 0}\n')):
        with pytest.raises(SystemExit):
            run_command(
                lambda: ({"n": 1}, 0),
                json_output=json_output,
                debug=False,
                show=lambda result: "a\nb\x1b",
            )
        assert capsys.readouterr().out == expected


def make_progress(done: int, listed: int = 100) -> Progress:
    return Progress(done=done, failed=0, listed=listed, images_per_s=1234.5, eta_s=187.0)


def test_progress_shows_rate_and_time_left_now_and_then(
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = ProgressLine("score")
    for done in range(1, 100):
        line(make_progress(done))
    shown = capsys.readouterr().err.splitlines()
    assert shown == [
        "score: 1 of 100 images (1%), 0 failed, 1,234 images/s, 3:07 left",
    ]


def test_the_end_of_progress_is_always_shown(capsys: pytest.CaptureFixture[str]) -> None:
    line = ProgressLine("score")
    line(make_progress(1))
    line(Progress(done=98, failed=2, listed=100, images_per_s=10.0, eta_s=None))
    assert capsys.readouterr().err.splitlines()[-1] == (
        "score: 100 of 100 images (100%), 2 failed, 10 images/s"
    )


def test_an_epoch_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    row = {
        "epoch": 2,
        "train_loss": 0.5,
        "val_loss": 0.25,
        "val_accuracy": 0.875,
        "images_per_s": 1000.0,
        "train_s": 9.0,
        "val_s": 1.0,
    }
    show_epoch(row, 5)
    assert capsys.readouterr().err == (
        "train: epoch 2 of 5, loss 0.5000, validation loss 0.2500, accuracy 87.50%,"
        " 1,000 images/s, 0:30 left\n"
    )


@pytest.fixture
def json_log() -> Any:
    choose_log_format("json")
    yield
    choose_log_format("text")


def test_a_log_for_programs_has_an_object_in_each_line(
    capsys: pytest.CaptureFixture[str], json_log: None
) -> None:
    line = ProgressLine("score")
    line(Progress(done=3, failed=1, listed=4, images_per_s=2.0, eta_s=None))
    row = {"epoch": 1, "train_loss": 0.5, "val_loss": 0.4, "val_accuracy": 0.9}
    show_epoch({**row, "images_per_s": 10.0, "train_s": 1.0, "val_s": 1.0}, 2)
    log("a\x1b[31m name")
    progress, epoch, said = map(json.loads, capsys.readouterr().err.splitlines())
    assert (progress["verb"], progress["done"], progress["failed"]) == ("score", 3, 1)
    assert progress["message"].startswith("score: 4 of 4 images")
    assert (epoch["epoch"], epoch["val_accuracy"]) == (1, 0.9)
    assert said["message"] == "a\x1b[31m name"
    assert datetime.fromisoformat(said["time"]).tzinfo is not None


@pytest.mark.parametrize("is_terminal", [True, False])
def test_an_export_controls_no_terminal_and_is_exact_elsewhere(
    monkeypatch: pytest.MonkeyPatch, is_terminal: bool
) -> None:
    data = "key\n\x1b]0;owned\x07\x9b31m\u202egpj.exe\n".encode() + b"\xff\n"
    stdout = io.TextIOWrapper(io.BytesIO())
    monkeypatch.setattr(stdout, "isatty", lambda: is_terminal)
    monkeypatch.setattr(sys, "stdout", stdout)
    show_bytes([data])
    shown = stdout.buffer.getvalue()
    if is_terminal:
        assert all(c.isprintable() or c == "\n" for c in shown.decode())
    else:
        assert shown == data
