"""Interrupt the verbs at seeded random moments, as a terminal or a service manager does.

    python tests/benchmarks/interrupts.py --interrupts 100 --verbs train tune

The signal goes to the whole process group: SIGINT (Ctrl-C) and SIGTERM in turn. Each interrupted
command must end with 130 or 143, one line that says how to resume, and one JSON object.
`tests/faults/test_signals.py` does the same with a few interrupts.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

VERBS = ["convert", "score", "evaluate", "train", "tune"]
SIGNALS = (signal.SIGINT, signal.SIGTERM)
END_S = 30.0  # an interrupted command may take that long to end


def start_group(command: list[str], env: dict[str, str], errors: Path) -> subprocess.Popen[str]:
    """Start a command in a process group of its own; what it says goes to a file.

    Not to a pipe, which Ray's processes would hold open for a second longer.
    """
    with open(errors, "w") as stderr:
        return subprocess.Popen(
            [sys.executable, "-m", "cifake_ray", *command, "--json"],
            env=env,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
            # In the background of a shell SIGINT is ignored, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )


def wait_for_handler(process: subprocess.Popen[str]) -> None:
    """Wait until the command takes signals itself; before that it is Python that starts."""
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        masks = [line.split() for line in status.read_text().splitlines()]
        taken = sum(int(mask[1], 16) for mask in masks if mask[0] in ("SigBlk:", "SigCgt:"))
        if taken >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.01)


def find_fault(process: subprocess.Popen[str], errors: Path, number: signal.Signals) -> str | None:
    """Wait for the end of an interrupted command; return what is wrong with it, if anything."""
    try:
        output, _ = process.communicate(timeout=END_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return f"no end within {END_S:g} s"
    said, code = errors.read_text(), process.returncode
    if code != 128 + number:
        return f"exit code {code}; it said {said[-500:]!r}"
    if said.count("run the same command again") != 1 or "Traceback" in said:
        return f"it said {said[-2000:]!r}"
    if [json.loads(line)["exit_code"] for line in output.splitlines()] != [code]:
        return f"it printed {output!r}"
    return None


def make_commands(folder: Path, num_images: int) -> dict[str, list[str]]:
    images, shards, cache = (str(folder / name) for name in ("images", "shards", "cache"))
    run_verb(["sample", images, "--images", str(num_images)])
    run_verb(["convert", images, shards, "--shard-size", "20"])
    training = ["--epochs", "500", "--cache-dir", cache]
    return {
        "convert": ["convert", images, "OUT", "--shard-size", "20"],
        "score": ["score", images, "OUT", "--shard-size", "20"],
        "evaluate": ["evaluate", shards, "--out", "OUT", "--shard-size", "20"],
        "train": ["train", shards, "OUT", *training],
        "tune": ["tune", shards, "OUT", *training, "--trials", "4"],
    }


def run_verb(words: list[str]) -> None:
    subprocess.run(
        [sys.executable, "-m", "cifake_ray", *words, "--json"],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--verbs", nargs="+", choices=VERBS, default=VERBS)
    parser.add_argument("--interrupts", type=int, default=100, help="for each verb")
    parser.add_argument("--images", type=int, default=2_000)
    parser.add_argument("--within-s", type=float, default=15.0, help="of the start")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    env = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    total: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        commands = make_commands(folder, options.images)
        for verb in options.verbs:
            interrupts = 0
            while interrupts < options.interrupts:
                number = SIGNALS[interrupts % 2]
                delay_s = rng.uniform(0, options.within_s)
                words = [str(folder / "out") if word == "OUT" else word for word in commands[verb]]
                process = start_group(words, env, folder / "errors")
                wait_for_handler(process)
                time.sleep(delay_s)
                if process.poll() is None:
                    os.killpg(process.pid, number)
                    interrupts += 1
                    fault = find_fault(process, folder / "errors", number)
                    total[f"{verb}: {'faults' if fault else 'right'}"] += 1
                    if fault:
                        print(f"{verb} {number.name} after {delay_s:.2f} s: {fault}", flush=True)
                elif process.wait():
                    sys.exit(f"{verb} failed by itself: {(folder / 'errors').read_text()}")
                shutil.rmtree(folder / "out", ignore_errors=True)
            print(dict(total), flush=True)
    if any("faults" in name for name in total):
        sys.exit("an interrupted command ended in another way than promised")


if __name__ == "__main__":
    main()
