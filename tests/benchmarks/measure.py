"""Run a command in a fresh process; measure its time, reported counts and peak memory."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMEOUT_S = 3600.0
DAY_S = 24 * 3600.0
SAMPLING_S = 0.05
ENVIRONMENT = {**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONWARNINGS": "ignore"}


@dataclass(frozen=True)
class Result:
    """Measurements of one command, over the life of its process."""

    images: int
    elapsed_s: float
    steady_images_per_s: float | None  # measured by the command itself
    peak_mb: float  # resident memory, without child processes

    @property
    def images_per_s(self) -> float:
        return self.images / self.elapsed_s


def run_command(command: list[str], out: Path) -> Result:
    """Run a command, read its JSON line, remove its output `out`."""
    pipe = subprocess.PIPE
    started_s = time.perf_counter()
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=ENVIRONMENT)
    peaks = [0.0]
    threading.Thread(target=_watch_memory, args=(process.pid, peaks), daemon=True).start()
    try:
        output, errors = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
    elapsed_s = time.perf_counter() - started_s
    if process.returncode:
        sys.exit(f"{' '.join(command)}\nended with {process.returncode}:\n{errors[-3000:]}")
    record = json.loads(output.splitlines()[-1])
    images, steady = _read_counts(record, out)
    shutil.rmtree(out, ignore_errors=True)
    return Result(images, elapsed_s, steady, peaks[-1])


class Failure(Exception):
    """A command failed or gave a wrong result."""


def start_command(arguments: Iterable[object], log: Path) -> subprocess.Popen[str]:
    """Start `cifake-ray ARGUMENTS --json`, with stderr appended to `log`."""
    command = [sys.executable, "-m", "cifake_ray", *map(str, arguments), "--json"]
    with log.open("w") as errors:
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=ENVIRONMENT
        )


def finish_command(
    process: subprocess.Popen[str], arguments: Sequence[object], log: Path
) -> dict[str, Any]:
    """Return a command's JSON result. Failure if it exits with another code than 0."""
    try:
        output, _ = process.communicate(timeout=DAY_S)
    finally:
        process.kill()
    if process.returncode:
        end = log.read_text()[-2000:]
        raise Failure(f"{arguments[0]} ended with {process.returncode}:\n{end}")
    record: dict[str, Any] = json.loads(output.splitlines()[-1])
    return record


def _watch_memory(pid: int, peaks: list[float]) -> None:
    """Poll VmHWM, a peak, until the process ends. (getrusage would include its children.)"""
    while True:
        try:
            found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        except OSError:
            return
        if found is None:  # it is a zombie
            return
        peaks.append(int(found[1]) / 1024)
        time.sleep(SAMPLING_S)


def _read_counts(record: dict[str, Any], out: Path) -> tuple[int, float | None]:
    """Return images and steady rate of a peer, a batch command, train (last epoch) or sample."""
    if record.get("command") == "train":
        last = json.loads((out / "history.jsonl").read_text().splitlines()[-1])
        return record["train_images"] * record["epochs"], last["images_per_s"]
    images = record["listed"] if "listed" in record else record["images"]
    return images, record.get("steady_images_per_s")


def link_images(source: Path, folder: Path, num_images: int) -> Path:
    """Hard-link `num_images` of the source's files, evenly chosen, into a folder."""
    files = sorted(path for path in source.rglob("*") if path.is_file())
    if len(files) < num_images:
        sys.exit(f"{source} has {len(files):,} images, {num_images:,} are needed; lower --images")
    for index in range(num_images):
        path = files[index * len(files) // num_images]
        target = folder / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, target)
        except OSError:  # another file system
            shutil.copyfile(path, target)
    return folder


def link_part(source: Path, folder: Path, num_images: int | None) -> int:
    """Link the same number of images of each of `source`'s classes, or all, into a folder.

    They are chosen by a hash of their names: CIFAKE numbers its images by ten subjects in turn, so
    every tenth file shows the same subject.
    """
    classes = [path for path in sorted(source.iterdir()) if path.is_dir()]
    num_linked = 0
    for place in classes:
        paths = sorted(
            place.iterdir(), key=lambda path: hashlib.sha256(path.name.encode()).digest()
        )
        wanted = len(paths) if num_images is None else num_images // len(classes)
        if wanted > len(paths):
            sys.exit(f"{place} has {len(paths):,} images, {wanted:,} are needed")
        (folder / place.name).mkdir(parents=True)
        for path in paths[:wanted]:
            target = folder / place.name / path.name
            try:
                os.link(path, target)
            except OSError:  # another file system
                shutil.copyfile(path, target)
        num_linked += wanted
    return num_linked


def find_cifake(source: Path | None, work: Path) -> Path:
    """Return CIFAKE's folder: as given, or unpacked from the archive in CIFAKE_TEST_DATA."""
    if source is not None:
        return source
    archive = Path(os.environ.get("CIFAKE_TEST_DATA", "")) / "cifake.tar.xz"
    if not archive.is_file():
        sys.exit("give --source, or the folder of cifake.tar.xz as CIFAKE_TEST_DATA")
    return unpack_cifake(archive, work / "cifake")


def unpack_cifake(archive: Path, folder: Path) -> Path:
    with tarfile.open(archive, "r|xz") as members:
        members.extractall(folder, filter="data")
    return folder


def format_table(lines: Sequence[Sequence[str]]) -> str:
    """Return a padded Markdown table; the first line is the head."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "| " + " | ".join(c.ljust(n) for c, n in zip(line, widths, strict=True)) + " |"
        for line in (lines[0], rule, *lines[1:])
    )


def log(message: str) -> None:
    print(time.strftime("%H:%M:%S"), message, file=sys.stderr, flush=True)
