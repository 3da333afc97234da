"""Kill convert and score with SIGKILL at seeded random moments, then finish and compare.

    python tests/benchmarks/kill_points.py --kills 50 --images 3000

Each round starts a command, kills its driver at a random moment (but not Ray's own processes),
sometimes kills the rerun too, and then lets it finish. Every row is compared with an undisturbed
run. `tests/faults/test_kill.py` does the same with a few kills.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

SHARD_SIZE = "100"


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "cifake_ray", *arguments, "--json"],
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def finish(arguments: list[str]) -> dict[str, Any]:
    process = start(arguments)
    output, _ = process.communicate(timeout=600)
    if process.returncode:
        sys.exit(f"{' '.join(arguments)} ended with {process.returncode}: {output}")
    record: dict[str, Any] = json.loads(output)
    return record


def read_rows(out: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in sorted(out.glob("*/part-*"))])


def compare(whole: pa.Table, rows: pa.Table) -> Counter[str]:
    """Count lost and duplicated keys, and rows that differ in any column."""
    expected = {row["key"]: row for row in whole.to_pylist()}
    counts = Counter(rows.column("key").to_pylist())
    verdict: Counter[str] = Counter()
    verdict["lost"] = len(expected.keys() - counts.keys())
    verdict["doubled"] = sum(counts.values()) - len(counts)
    verdict["differing"] = sum(row != expected.get(row["key"]) for row in rows.to_pylist())
    return verdict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = folder / "images"
        finish(["sample", str(images), "--images", str(options.images)])
        commands = {
            verb: [verb, str(images), str(folder / f"{verb}-out"), "--shard-size", SHARD_SIZE]
            for verb in ("convert", "score")
        }
        whole, elapsed_s = {}, {}
        for verb, arguments in commands.items():
            elapsed_s[verb] = finish(arguments)["elapsed_s"]
            whole[verb] = read_rows(Path(arguments[2]))
            shutil.rmtree(arguments[2])
        total: Counter[str] = Counter()
        kills = 0
        while kills < options.kills:
            verb = rng.choice(list(commands))
            out = Path(commands[verb][2])
            for _ in range(min(rng.choice((1, 1, 2, 3)), options.kills - kills)):
                process = start(commands[verb])
                time.sleep(rng.random() * elapsed_s[verb])
                process.kill()
                process.communicate()
                was_alive = process.returncode < 0
                kills += was_alive
                total["kills"] += was_alive
                total["kills with shards done and shards to do"] += was_alive and (
                    0 < len(list(out.glob("*/part-*"))) < whole[verb].num_rows // int(SHARD_SIZE)
                )
            summary = finish(commands[verb])
            total["rounds"] += 1
            total["shards resumed"] += summary["shards_resumed"]
            total += compare(whole[verb], read_rows(out))
            left = [path.name for path in out.rglob(".writing-*")] + [
                path.name for path in out.glob("_attempts/*")
            ]
            total["files left behind"] += len(left)
            shutil.rmtree(out)
            print(f"{kills} kills: {dict(total)}", flush=True)
        for name in ("lost", "doubled", "differing"):
            print(f"{name}: {total[name]}")
        if total["lost"] or total["doubled"] or total["differing"]:
            sys.exit("a killed run differs from the undisturbed one")


if __name__ == "__main__":
    main()
