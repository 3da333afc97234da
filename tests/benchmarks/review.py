"""Make runs with made-up scores; measure `review` and `export` on them: seconds, peak memory.

    python tests/benchmarks/review.py FOLDER --images DIR [--rows 100000 1000000] [--measure-only]

FOLDER/scores-N gets a run of N rows in the format of `score`: 200 sources, labels, 0.5% errors;
their images are files of DIR, again and again. Memory should not grow from the first N to the
second.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).parents[1]))

from score_run import draw_logits, write_score_run

from cifake_ray.core.schema import MANIFEST_FIELDS

BATCH_ROWS = 16_384
COMMANDS = {
    "review": ["review", "SCORES", "page.html", "--overwrite"],
    "export --top 100": ["export", "SCORES", "x.csv", "--sort", "margin", "--top", "100"],
    "export --sort": ["export", "SCORES", "x.csv", "--sort", "p_fake desc"],
}


def list_rows(folder: Path, num_rows: int) -> Iterator[pa.RecordBatch]:
    """Yield rows of a listing: made-up keys, real files."""
    files = [path for path in sorted(folder.rglob("*.*")) if path.is_file()][:20_000]
    names = [str(path.relative_to(folder)) for path in files]
    stats = [path.stat() for path in files]
    for start in range(0, num_rows, BATCH_ROWS):
        numbers = range(start, min(start + BATCH_ROWS, num_rows))
        which = [n % len(files) for n in numbers]
        label = [n // 7 % 2 for n in numbers]
        columns = {
            "key": [f"{['REAL', 'FAKE'][n // 7 % 2]}/s{n % 200}/{n:08d}.jpg" for n in numbers],
            "location": [names[w] for w in which],
            "row": pa.nulls(len(which), pa.int64()),
            "size_bytes": [stats[w].st_size for w in which],
            "mtime_ns": [stats[w].st_mtime_ns for w in which],
            "etag": pa.nulls(len(which), pa.string()),
            "label": label,
            "split": pa.nulls(len(which), pa.string()),
            "source": [f"s{n % 200}" for n in numbers],
            "error": pa.nulls(len(which), pa.string()),
        }
        yield pa.RecordBatch.from_pydict(columns, schema=pa.schema(MANIFEST_FIELDS))


def make_logits(rows: pa.Table) -> np.ndarray:
    logit = draw_logits(rows)
    logit[::200] = np.nan
    return logit


def measure(words: list[str], folder: Path) -> tuple[float, float]:
    """Return seconds and the peak memory in MiB of a command."""
    started_s = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "cifake_ray", *words], cwd=folder, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, words
    return time.monotonic() - started_s, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--measure-only", action="store_true")
    arguments = parser.parse_args()
    for num_rows in arguments.rows:
        out = arguments.folder / f"scores-{num_rows}"
        if not arguments.measure_only:
            batches = list_rows(arguments.images, num_rows)
            write_score_run(str(arguments.images), out, batches=batches, make_logits=make_logits)
            continue
        for name, words in COMMANDS.items():
            words = [str(out) if word == "SCORES" else word for word in words]
            (arguments.folder / "x.csv").unlink(missing_ok=True)
            seconds, peak = measure(words, arguments.folder)
            print(f"{num_rows:>10,} rows  {name:<18} {seconds:6.1f} s  {peak:6.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
