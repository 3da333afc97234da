"""Score thousands of damaged files: `score` must account for every one of them.

    python tests/benchmarks/mutate.py --images 10000 --seed 0 --src FOLDER --src ANOTHER

Takes real images (from FOLDERs, else the sample of mixed formats), damages each in one of the ways
below, scores them in a separate process and prints the outcomes. Exits with 1 unless every file has
exactly one row, with a score or a known error.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from cifake_ray.config import SampleConfig
from cifake_ray.core.schema import IMAGE_ERRORS
from cifake_ray.storage.datasets.sample_folder import write_sample

NUM_ORIGINALS = 2000  # most files read into memory
MAX_ORIGINAL_BYTES = 2 * 2**20
HEADER_BYTES = 512  # most fields that parsers trust
SUFFIXES = (".jpg", ".png", ".webp", ".gif", ".txt", "", ".JPEG")
TIMEOUT_S = 3600
NUMBERS = (0, 1, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**32 - 1)
DamagedFile = Callable[[bytes, bytes, np.random.Generator], bytes]


def flip_bytes(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    return _flip(data, len(data), rng)


def flip_header(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    return _flip(data, min(len(data), HEADER_BYTES), rng)


def _flip(data: bytes, end: int, rng: np.random.Generator) -> bytes:
    changed = bytearray(data)
    for place in rng.integers(0, end, rng.integers(1, 20)):
        changed[place] = rng.integers(256)
    return bytes(changed)


def set_number(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """Overwrite a number of the header (a width, length or count) with an extreme value."""
    value = NUMBERS[rng.integers(len(NUMBERS))]
    size = 2 if value < 2**16 and rng.random() < 0.5 else 4
    place = int(rng.integers(0, min(len(data), HEADER_BYTES)))
    number = value.to_bytes(size, "big" if rng.random() < 0.5 else "little")
    return data[:place] + number + data[place + size :]


def cut(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    return data[: rng.integers(0, len(data))]


def cut_middle(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    start, end = sorted(rng.integers(0, len(data), 2))
    return data[:start] + data[end:]


def insert(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    place = int(rng.integers(0, len(data)))
    return data[:place] + rng.bytes(rng.integers(1, 5000)) + data[place:]


def splice(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    return data[: rng.integers(0, len(data))] + other[rng.integers(0, len(other)) :]


def blank(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """Blank a block, as if the disk had never written it."""
    start = int(rng.integers(0, len(data)))
    return data[:start] + bytes(4096) + data[start + 4096 :]


def replace(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    kinds = (b"", b"<!DOCTYPE html>" * 9, b"\0" * 100, rng.bytes(1000), data[:3], b"P6\n9 9\n255\n")
    return kinds[rng.integers(len(kinds))]


def leave(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    return data


DAMAGES: tuple[DamagedFile, ...] = (
    flip_bytes,
    flip_header,
    set_number,
    cut,
    cut_middle,
    insert,
    splice,
    blank,
    replace,
    leave,
)


def read_originals(folders: list[Path], rng: np.random.Generator) -> list[bytes]:
    """Read up to NUM_ORIGINALS files, the same number from each folder where possible."""
    originals = []
    for folder in folders:
        paths = sorted(p for p in folder.rglob("*") if p.is_file())
        rng.shuffle(paths)  # type: ignore[arg-type]
        small = (p for p in paths if 0 < p.stat().st_size <= MAX_ORIGINAL_BYTES)
        originals += [p.read_bytes() for p in islice(small, NUM_ORIGINALS // len(folders))]
    if not originals:
        sys.exit(f"no file of at most {MAX_ORIGINAL_BYTES} bytes in {', '.join(map(str, folders))}")
    return originals


def write_damaged(folder: Path, originals: list[bytes], images: int, seed: int) -> Counter[str]:
    """Write damaged files below REAL and FAKE; return their number per kind of damage."""
    rng = np.random.default_rng(seed)
    counts: Counter[str] = Counter()
    for name in ("REAL", "FAKE"):
        (folder / name).mkdir(parents=True)
    for number in range(images):
        damage = DAMAGES[rng.integers(len(DAMAGES))]
        data, other = (originals[rng.integers(len(originals))] for _ in range(2))
        for _ in range(rng.integers(1, 4) if damage is not leave else 1):
            data = damage(data or b"\0", other, rng)
        suffix = SUFFIXES[rng.integers(len(SUFFIXES))]
        (folder / ("REAL", "FAKE")[number % 2] / f"{number:05}{suffix}").write_bytes(data)
        counts[damage.__name__] += 1
    return counts


def find_wrongs(out: Path, folder: Path, record: dict[str, object], images: int) -> list[str]:
    """Return the inconsistencies between summary, rows and files."""
    wrongs = []
    keys = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    parts = sorted((out / "scores").glob("part-*.parquet"))
    columns = ["key", "p_fake", "error", "error_detail"]
    rows = [row for part in parts for row in pq.read_table(part, columns=columns).to_pylist()]
    if len(rows) != images or {row["key"] for row in rows} != keys:
        wrongs.append(f"{len(rows)} rows of {len({r['key'] for r in rows})} keys, not {images}")
    errors = Counter(row["error"] for row in rows if row["error"] is not None)
    if any((row["p_fake"] is None) == (row["error"] is None) for row in rows):
        wrongs.append("a row has a score and an error, or neither")
    if unknown := set(errors) - set(IMAGE_ERRORS):
        wrongs.append(f"errors outside the closed list: {unknown}")
    said = {name: record.get(name) for name in ("listed", "done", "failed", "errors")}
    failed = errors.total()
    found = {"listed": images, "done": images - failed, "failed": failed, "errors": dict(errors)}
    if said != found:
        wrongs.append(f"the summary says {said}, the rows say {found}")
    return wrongs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--src", type=Path, action="append", help="folder of real images")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folders = options.src
        if not folders:
            sample = SampleConfig(out=f"{scratch}/sample", images=300, mixed=True)
            folders = [write_sample(sample)]
        originals = read_originals(folders, np.random.default_rng(options.seed))
        folder, out = Path(scratch) / "images", Path(scratch) / "scores"
        ways = write_damaged(folder, originals, options.images, options.seed)
        print(f"{options.images} files of {len(originals)} originals: {dict(ways)}", flush=True)
        started_s = time.perf_counter()
        process = subprocess.run(
            [sys.executable, "-m", "cifake_ray", "score", str(folder), str(out), "--json"],
            capture_output=True,
            text=True,
            errors="backslashreplace",
            timeout=TIMEOUT_S,
            check=False,
            env={**os.environ, "RAY_AUTH_MODE": "disabled"},
        )
        elapsed_s = time.perf_counter() - started_s
        record = json.loads(process.stdout.splitlines()[-1]) if process.stdout else {}
        wrongs = find_wrongs(out, folder, record, options.images)
    errors = record.get("errors", {})
    print(f"exit code        {process.returncode}")
    for name in ("listed", "done", "failed"):
        print(f"{name:16} {record.get(name, 0):,}")
    for name, count in sorted(errors.items(), key=lambda item: -item[1]):
        print(f"  {name:18} {count:6,}  {count / options.images:6.1%}")
    lost = len(re.findall(r"(?i)worker (?:died|crashed)|SIGSEGV|actor died", process.stderr))
    print(f"worker crashes   {errors.get('worker_crash', 0)} rows, {lost} lines of stderr")
    print(f"elapsed          {elapsed_s:.1f} s, {options.images / elapsed_s:,.0f} files/s")
    if process.returncode not in (0, 3):
        wrongs.append(f"exit code {process.returncode}: {process.stderr[-2000:]}")
    for wrong in wrongs:
        print(f"WRONG: {wrong}")
    sys.exit(bool(wrongs))


if __name__ == "__main__":
    main()
