"""Compare the false-positive rate that `decide` promises with the one that held, per source.

    python tests/benchmarks/held_out_fpr.py SCORES [--target-fpr 0.05] [--seed 0]

SCORES is the output of score for labelled images of several sources. Thresholds are chosen from
some REAL images by the command itself (`--real KEYS`, with and without `--by source`) and held on
others: the other half of each source; a source that gave none; the split `test`, if there is one.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from measure import format_table

from cifake_ray.config import DecideConfig
from cifake_ray.core.evaluation.fit_policy import measure_interval
from cifake_ray.core.schema import FAKE, REAL
from cifake_ray.errors import UsageError
from cifake_ray.storage.runs.decisions import decide_scores

Flags = np.ndarray


class HeldOut:
    """Decides all scores by the REAL images that are chosen."""

    def __init__(self, scores: Path, target_fpr: float) -> None:
        table = pq.read_table(scores / "scores", columns=["key", "label", "source", "split"])
        self.scores, self.target_fpr = scores, target_fpr
        self.key, self.label, self.source, self.split = (
            np.array(column.to_pylist(), object) for column in table.columns
        )
        self.is_real = self.label == REAL
        self.sources = sorted(set(self.source[self.is_real]) - {None})

    def decide(self, chosen: Flags, by: str | None) -> np.ndarray:
        """The verdict of every key, with thresholds from the chosen images."""
        with tempfile.TemporaryDirectory() as folder:
            keys, out = Path(folder) / "keys.parquet", Path(folder) / "out"
            pq.write_table(pa.table({"key": self.key[chosen]}), keys)
            config = DecideConfig(
                src=str(self.scores),
                out=str(out),
                target_fpr=self.target_fpr,
                real=str(keys),
                by=by,
            )
            decide_scores(config, out, self.scores, print)
            decided = pq.read_table(out / "decisions", columns=["key", "verdict"])
        verdict_of = dict(zip(*(column.to_pylist() for column in decided.columns), strict=True))
        return np.array([verdict_of[key] for key in self.key])

    def describe(self, held: Flags, verdicts: np.ndarray) -> list[str]:
        """REAL images called FAKE among those held out, and those that are unsure."""
        count, hits = int(held.sum()), int((verdicts[held] == "FAKE").sum())
        low, high = measure_interval(hits, count, 0.95)
        unsure = (verdicts[held] == "unsure").mean()
        broken = " (not kept)" if low > self.target_fpr else ""
        return [f"{hits / count:.1%} ({low:.1%}-{high:.1%}){broken}", f"{unsure:.0%}"]

    def print_table(self, title: str, cases: list[tuple[Flags, dict[str, Flags]]]) -> None:
        """One row a source that is held out: by one threshold, and by those of sources."""
        rows, found, is_fake = [], [], self.label == FAKE
        for chosen, held_out in cases:
            decided = [self.decide(chosen, by) for by in (None, "source")]
            found.append([(verdicts[is_fake] == "FAKE").mean() for verdicts in decided])
            for name, held in held_out.items():
                cells = [cell for verdicts in decided for cell in self.describe(held, verdicts)]
                rows.append([name, f"{held.sum():,}", f"{self.target_fpr:.1%}", *cells])
        names = ["source", "REAL held out", "promised", "one threshold", "unsure"]
        print(f"\n{title}\n\n{format_table([[*names, '--by source', 'unsure'], *rows])}")
        pooled, by_source = np.mean(found, axis=0)
        print(f"\nFAKE called FAKE: {pooled:.1%} by one threshold, {by_source:.1%} by source")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scores", type=Path)
    parser.add_argument("--target-fpr", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    held = HeldOut(options.scores, options.target_fpr)
    rng = np.random.default_rng(options.seed)
    is_real, source = held.is_real, held.source
    first = np.zeros(len(is_real), bool)
    for name in held.sources:
        rows = rng.permutation(np.flatnonzero(is_real & (source == name)))
        first[rows[: len(rows) // 2]] = True
    other = is_real & ~first
    halves = {name: other & (source == name) for name in held.sources}
    held.print_table("The other half of each source", [(first, halves)])
    left_out = [
        (is_real & (source != name), {name: is_real & (source == name)}) for name in held.sources
    ]
    held.print_table("Sources that gave no REAL image: all others did", left_out)
    if {"train", "test"} <= set(held.split):
        in_test = is_real & (held.split == "test")
        tests = {
            n: in_test & (source == n) for n in held.sources if (in_test & (source == n)).any()
        }
        held.print_table("Sources of test, by REAL images of train", [(is_real & ~in_test, tests)])


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        raise SystemExit(str(error)) from error
