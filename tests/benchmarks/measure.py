"""Runs a command in a fresh process: how long it took, what it says it did, its own peak memory."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMEOUT_S = 3600.0
SAMPLING_S = 0.05


@dataclass(frozen=True)
class Result:
    """One command, from the start of its process to the end of it."""

    images: int
    elapsed_s: float
    steady_images_per_s: float | None  # as the command itself measures it
    peak_mb: float  # resident memory of the process itself, without its children

    @property
    def images_per_s(self) -> float:
        return self.images / self.elapsed_s


def run_command(command: list[str], out: Path) -> Result:
    """Run it, read its JSON line, remove what it wrote to `out`."""
    env = {**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONWARNINGS": "ignore"}
    pipe = subprocess.PIPE
    started_s = time.perf_counter()
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env)
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


def _watch_memory(pid: int, peaks: list[float]) -> None:
    """VmHWM, which only grows, until the process ends. (getrusage would mix in its children.)"""
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
    """Images and steady rate: of a peer, of a batch verb, of train (its last epoch), of sample."""
    if record.get("command") == "train":
        last = json.loads((out / "history.jsonl").read_text().splitlines()[-1])
        return record["train_images"] * record["epochs"], last["images_per_s"]
    images = record["listed"] if "listed" in record else record["images"]
    return images, record.get("steady_images_per_s")


def link_images(source: Path, folder: Path, num_images: int) -> Path:
    """A folder with `num_images` of the source's files, evenly chosen, as hard links."""
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


def unpack_cifake(archive: Path, folder: Path) -> Path:
    with tarfile.open(archive, "r|xz") as members:
        members.extractall(folder, filter="data")
    return folder
