"""Run a command in a fresh process; measure its time, reported counts and peak memory."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

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
    driver_mb: float  # peak of the first process, or of the copy of it that does its work
    family_mb: float  # peak of all its processes together, shared pages counted once
    gap: float | None = None  # see `Answers`

    @property
    def images_per_s(self) -> float:
        return self.images / self.elapsed_s


def run_command(
    command: list[str],
    out: Path,
    measure_gap: Callable[[Path], float] | None = None,
) -> Result:
    """Run a command, read its JSON line, measure its output `out` and remove it."""
    pipe = subprocess.PIPE
    started_s = time.perf_counter()
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=ENVIRONMENT)
    peak = Peak()
    for watch in (peak.watch_driver, peak.watch_family):
        threading.Thread(target=watch, args=(process.pid,), daemon=True).start()
    try:
        output, errors = process.communicate(timeout=TIMEOUT_S)
    finally:
        peak.ended.set()
        process.kill()
    elapsed_s = time.perf_counter() - started_s
    if process.returncode:
        sys.exit(f"{' '.join(command)}\nended with {process.returncode}:\n{errors[-3000:]}")
    record = json.loads(output.splitlines()[-1])
    images, steady = _read_counts(record, out)
    gap = measure_gap(out) if measure_gap is not None else None
    shutil.rmtree(out, ignore_errors=True)
    return Result(images, elapsed_s, steady, peak.driver_mb, peak.family_mb, gap)


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


@dataclass
class Peak:
    """Peak memory of a command, in MB, watched until it ends."""

    driver_mb: float = 0.0
    family_mb: float = 0.0
    ended: threading.Event = field(default_factory=threading.Event)

    def watch_driver(self, pid: int) -> None:
        """Poll VmHWM, a peak. (getrusage would include its children.)"""
        proc = Path("/proc")
        while not self.ended.wait(SAMPLING_S):
            with suppress(OSError):
                line = (proc / str(pid) / "cmdline").read_bytes()
                children = (proc / f"{pid}/task/{pid}/children").read_text().split()
                for one in (str(pid), *children):
                    if (proc / one / "cmdline").read_bytes() == line:
                        found = re.search(r"VmHWM:\s+(\d+)", (proc / one / "status").read_text())
                        self.driver_mb = max(self.driver_mb, int(found[1]) / 1024 if found else 0)

    def watch_family(self, pid: int) -> None:
        """Add up the proportional set sizes of all its processes, in at most 3% of a core."""
        pause_s = SAMPLING_S
        while not self.ended.wait(pause_s):
            started_s = time.thread_time()
            with suppress(psutil.NoSuchProcess):
                first = psutil.Process(pid)
                sizes = map(_read_pss_mb, [first, *first.children(recursive=True)])
                self.family_mb = max(self.family_mb, sum(sizes))
            pause_s = max(0.2, 30 * (time.thread_time() - started_s))


def _read_pss_mb(process: psutil.Process) -> float:
    """Return 0 for a process that has ended."""
    try:
        rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
    except OSError:
        return 0.0
    found = re.search(r"^Pss:\s+(\d+) kB", rollup, re.MULTILINE)
    return int(found[1]) / 1024 if found else 0.0


@dataclass
class Answers:
    """What the first contender that is measured wrote, and how far others are from it."""

    source: str
    column: str  # `logit`, or `sha256`
    first: pa.Table | None = None

    def measure_gap(self, out: Path) -> float:
        """Return the largest difference of a number; infinite if rows or other values differ."""
        found = self._read(out)
        if self.first is None:
            self.first = found
        if not found.column("path").equals(self.first.column("path")):
            return math.inf
        mine, others = found.column(self.column), self.first.column(self.column)
        if not pa.types.is_floating(mine.type):
            return 0.0 if mine.equals(others) else math.inf
        return float(pc.max(pc.abs(pc.subtract(mine, others))).as_py())

    def _read(self, out: Path) -> pa.Table:
        """Read paths below the source and answers from whatever Parquet files are there."""
        root = re.escape(self.source.removeprefix("s3://"))
        kept = []
        for path in out.rglob("*.parquet"):
            names = pq.read_schema(path).names
            key = "key" if "key" in names else "path"
            if self.column not in names or path.name.startswith((".", "_")):
                continue
            table = pq.read_table(path, columns=[key, self.column]).rename_columns(["path", "x"])
            below = pc.replace_substring_regex(table["path"], f"^(file://|s3://)?{root}/", "")
            value = table["x"].cast(pa.float32() if self.column == "logit" else pa.binary())
            kept.append(pa.table({"path": below.cast(pa.string()), self.column: value}))
        return pa.concat_tables(kept).sort_by("path").combine_chunks()


def _read_counts(record: dict[str, Any], out: Path) -> tuple[int, float | None]:
    """Return images, and the steady rate where the command tells one (of train the last epoch)."""
    if record.get("command") == "train":
        last = json.loads((out / "history.jsonl").read_text().splitlines()[-1])
        return record["train_images"] * record["epochs"], last["images_per_s"]
    if record.get("command") == "tune":
        lines = (p.read_text().splitlines() for p in out.glob("trials/*/run-*/history.jsonl"))
        rows = [json.loads(line) for trial in lines for line in trial]
        return round(sum(row["images_per_s"] * row["train_s"] for row in rows)), None
    images = record["listed"] if "listed" in record else record["images"]
    return images, record.get("steady_images_per_s")


def link_images(source: Path, folder: Path, num_images: int) -> Path:
    """Hard-link `num_images` of the source's files, evenly chosen, into a folder.

    More than there are: each of them several times, by other names.
    """
    files = sorted(path for path in source.rglob("*") if path.is_file())
    seen: Path | None = None
    for index in range(num_images):
        path = files[index * len(files) // num_images]
        target = folder / path.relative_to(source)
        if path == seen:
            target = target.with_name(f"{index}-{path.name}")
        seen = path
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
