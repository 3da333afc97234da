"""The command's two processes: however the one that works ends, the other one says so."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

# Replaces the command by a few lines of Python.
SITE = """
import os, signal, sys, time, types
alarm = signal.alarm
signal.alarm = lambda seconds: alarm(1)
def main(verb, on_end):
    {body}
    on_end()
    os._exit(7)
cli = types.ModuleType("cifake_ray.cli")
cli.main = main
sys.modules["cifake_ray.cli"] = cli
"""
HANG = "open('ready', 'w').close(); time.sleep(60)"
IGNORE = f"signal.signal(signal.SIGTERM, signal.SIG_IGN); {HANG}"


def inherit_signals() -> None:
    """As from a program that ignores the ends of its children, and not in the background."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def start(
    folder: Path, body: str, *flags: str, prepare: Callable[[], None] = inherit_signals
) -> subprocess.Popen[str]:
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(SITE.format(body=body))
    paths = [str(folder / "site"), os.environ.get("PYTHONPATH", str(Path(__file__).parents[1]))]
    return subprocess.Popen(
        [sys.executable, "-m", "cifake_ray", "--json", *flags],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=prepare,
    )


def end(process: subprocess.Popen[str], code: int) -> str:
    """The line of a command, which is also its JSON object."""
    output, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert json.loads(output)["exit_code"] == code
    line = f"cifake-ray: {json.loads(output)['error']}\n"
    assert errors == line
    return line


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("os._exit(1)", 1, "ended by Ray, whose own processes are gone"),
        ("os._exit(0)", 1, "ended by Ray"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "SIGKILL; is memory short?"),
        ("os.abort()", 134, "SIGABRT"),
    ],
)
def test_an_end_without_a_word_is_told(tmp_path: Path, body: str, code: int, said: str) -> None:
    line = end(start(tmp_path, body), code)
    assert said in line
    assert "run the same command again" in line


def test_an_end_with_a_word_is_not_told_again(tmp_path: Path) -> None:
    output, errors = start(tmp_path, "print('said')").communicate(timeout=60)
    assert (output, errors) == ("said\n", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("is_group", [False, True])
def test_a_signal_before_there_is_a_handler_ends_it_with_its_code(
    tmp_path: Path, number: signal.Signals, is_group: bool
) -> None:
    process = start(tmp_path, HANG)
    wait_for(tmp_path / "ready")
    (os.killpg if is_group else os.kill)(process.pid, number)
    assert "interrupted" in end(process, 128 + number)


def test_a_signal_that_is_swallowed_ends_it_all_the_same(tmp_path: Path) -> None:
    process = start(tmp_path, IGNORE)
    wait_for(tmp_path / "ready")
    process.terminate()
    assert "interrupted" in end(process, 143)


def test_who_is_killed_takes_the_work_along(tmp_path: Path) -> None:
    process = start(tmp_path, f"open('pid', 'w').write(str(os.getpid())); {HANG}")
    wait_for(tmp_path / "ready")
    process.kill()
    process.communicate(timeout=60)
    worker = int((tmp_path / "pid").read_text())
    until_s = time.monotonic() + 10
    while Path(f"/proc/{worker}").exists() and is_running(worker):
        assert time.monotonic() < until_s
        time.sleep(0.01)


def test_nothing_is_imported_from_the_working_folder(tmp_path: Path) -> None:
    for name in ("numpy", "typer", "yaml"):
        (tmp_path / f"{name}.py").write_text("open('EXECUTED', 'w')")
    subprocess.run(
        [sys.executable, "-m", "cifake_ray", "version"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        check=True,
    )
    assert not (tmp_path / "EXECUTED").exists()


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_a_stream_that_is_closed_becomes_no_file(tmp_path: Path, closed: tuple[int, ...]) -> None:
    """Else what Ray's native code prints would be written into a shard."""
    body = """
    print("one", flush=True), print("two", file=sys.stderr, flush=True), sys.stdin.read()
    with open("shard", "w") as file:
        os.system("echo three; echo four >&2")
        file.write(f"{file.fileno() > 2}")
"""

    def close() -> None:
        for number in closed:
            os.close(number)

    process = start(tmp_path, body, prepare=close)
    process.communicate(timeout=60)
    assert process.returncode == 7
    assert (tmp_path / "shard").read_text() == "True"


def test_a_working_folder_that_is_gone_is_told(tmp_path: Path) -> None:
    def leave() -> None:
        os.mkdir("gone")
        os.chdir("gone")
        os.rmdir("../gone")

    line = end(start(tmp_path, "pass", prepare=leave), 2)
    assert "the working folder: No such file or directory; change to another one" in line


def test_names_of_files_are_text_in_any_locale(tmp_path: Path) -> None:
    variables = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    ended = subprocess.run(
        [sys.executable, "-m", "cifake_ray", "score", "b\u00e4ume", "out", "--json"],
        cwd=tmp_path,
        env={**os.environ, **variables, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        check=False,
    )
    assert json.loads(ended.stdout)["error"].startswith(f"{tmp_path}/b\u00e4ume: no such file")


def wait_for(path: Path) -> None:
    until_s = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < until_s
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
