"""Kill `convert` with SIGKILL while it lists a large bucket; then let it freeze, and compare.

    python tests/benchmarks/kill_listing.py [--keys 1000000] [--out FOLDER]

The command and its workers list from the server of `listing.py`. All of them are killed at once, at
each of MOMENTS of an output of its own. Then the same command runs until its manifest is frozen,
which must be that of an undisturbed one. No object exists, so it is killed there, too. `requests`
are the listings that the server answered, of pages and of single keys: to the killed command, then
to the one that followed it. `saved` is how many more the undisturbed one took; that number varies
by a tenth with the timing of threads. On two busy cores, of a million keys:

    undisturbed            1926 requests
    nothing listed          148 requests,  0 records kept; then  2035,  -109 saved
    early in listing        634 requests,  1 records kept; then  1285,   641 saved
    late in listing        1783 requests,  3 records kept; then   750,  1176 saved
    dealing                1992 requests,  5 records kept; then     5,  1921 saved
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil
from listing import BUCKET, ServerProcess, run_server

from cifake_ray.storage.runs.list_parts import PART_ROWS
from cifake_ray.storage.runs.run import Run, read_run

LATENCY_S = 0.02
POLL_S = 0.005
TIMEOUT_S = 600.0


class State(NamedTuple):
    """How far a command has come."""

    sent: float  # keys that the server has sent to it, of all
    num_records: int  # of parts that are listed
    num_files: int  # of the manifest


MOMENTS: dict[str, Callable[[State], bool]] = {
    "nothing listed": lambda state: state.sent > 0.1,
    "early in listing": lambda state: state.num_records > 0,
    "late in listing": lambda state: state.sent > 0.9,
    "dealing": lambda state: state.num_files > 0,
}


def run_until(
    out: Path, server: ServerProcess, num_keys: int, is_time: Callable[[State], bool]
) -> int:
    """Run the command, kill all of its processes when it is time; how many requests it made."""
    first_request, first_key = server.num_requests, server.num_keys
    arguments = ["convert", f"s3://{BUCKET}/", str(out), "--num-workers", "0"]
    with tempfile.TemporaryFile("w+") as errors:
        command = psutil.Popen(
            [sys.executable, "-m", "cifake_ray", *arguments],
            env=server.make_env(),
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
        until_s = time.monotonic() + TIMEOUT_S
        try:
            while not is_time(
                State(
                    sent=(server.num_keys - first_key) / num_keys,
                    num_records=count_records(out),
                    num_files=len(list(out.glob("_manifest/*.parquet"))),
                )
            ):
                if command.poll() is not None or time.monotonic() > until_s:
                    errors.seek(0)
                    sys.exit(f"it did not come to that:\n{errors.read()[-2000:]}")
                time.sleep(POLL_S)
        finally:
            kill_tree(command)
    return server.num_requests - first_request


def count_records(out: Path) -> int:
    return len(list(out.glob("_manifest/.listing-*/*.json")))


def kill_tree(command: psutil.Popen) -> None:
    """Kill a command and all below it, from the top, so that nobody replaces who is killed."""
    tree = [command, *command.children(recursive=True)] if command.is_running() else []
    for process in tree:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(tree, timeout=TIMEOUT_S)


def freeze(out: Path, server: ServerProcess, num_keys: int) -> tuple[Run, int]:
    """Run the command until it is done with the listing; the run, and how many requests it took."""

    def is_frozen(_: State) -> bool:
        return (out / "_run.json").exists() and not list(out.glob("_manifest/.listing-*"))

    num_requests = run_until(out, server, num_keys, is_frozen)
    run = read_run(out)
    assert run is not None
    return run, num_requests


def check_kills(num_keys: int, folder: Path, server: ServerProcess) -> None:
    """Compare the manifest after a kill at each of MOMENTS with an undisturbed one."""
    whole, all_requests = freeze(folder / "undisturbed", server, num_keys)
    assert whole.manifest.num_rows == num_keys
    print(f"{'undisturbed':18s} {all_requests:8d} requests, manifest {whole.identity[:12]}")
    for moment, is_time in MOMENTS.items():
        out = folder / moment.replace(" ", "-")
        killed = run_until(out, server, num_keys, is_time)
        assert read_run(out) is None, "it was frozen before it could be killed"
        num_records = count_records(out)
        run, resumed = freeze(out, server, num_keys)
        print(
            f"{moment:18s} {killed:8d} requests, {num_records:2d} records kept; then {resumed:5d},"
            f" {all_requests - resumed:5d} saved, manifest {run.identity[:12]}",
            flush=True,
        )
        if (run.identity, run.counts) != (whole.identity, whole.counts):
            sys.exit("the manifest differs from the undisturbed one")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, default=1_000_000)
    parser.add_argument("--out", help="where there is room, 400 bytes a key")
    options = parser.parse_args()
    if options.keys < 2 * PART_ROWS:
        parser.error(f"of fewer than {2 * PART_ROWS:,} keys there is little for workers to list")
    with (
        tempfile.TemporaryDirectory(dir=options.out) as folder,
        run_server("wide", options.keys, LATENCY_S) as server,
    ):
        check_kills(options.keys, Path(folder), server)


if __name__ == "__main__":
    main()
