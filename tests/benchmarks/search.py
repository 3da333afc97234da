"""Compare ASHA with random search on the same trials, and measure the overhead of a search.

    python tests/benchmarks/search.py [--source DIR] [--work DIR] [--write]

16 trials of `augmentation` and `early-stopping` train on 8,000 images of CIFAKE's train split and
are validated on 2,000 others. Random search trains all trials to the end; ASHA stops weak ones. For
the overhead, four trials run as a search of one trial at a time and as plain calls of `train`.

`--write` saves the section beside the comparisons and regenerates `cifake_ray/EXPERIMENTS.md`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from compare import HERE, PAGE, Row, render_page, run, to_flags
from measure import find_cifake, format_table, link_part, log

from cifake_ray.config import POLICIES
from cifake_ray.core.search.space import to_train_options
from cifake_ray.core.search.trial_table import format_value
from cifake_ray.storage.io.files import write_bytes
from cifake_ray.storage.presets.yaml_presets import RECIPES
from cifake_ray.storage.runs.tune_run import TuneRun

NUM_IMAGES, EPOCHS, TRIALS, SEED = 10_000, 6, 16, 0
SPACES = ("--search", "augmentation", "--search", "early-stopping")
NUM_COSTED, COSTED_EPOCHS = 4, 2


def search(name: str, shards: Path, options: dict[str, Any]) -> Row:
    """Run a search, or read a finished one; return a row of the first table."""
    folder = shards.parent / name
    summary = run(
        ["tune", shards, folder, *SPACES, *to_flags(options)], shards.parent / f"{name}.log"
    )
    log(f"{name}: {summary['best']:.4f} after {summary['steps']:,} steps")
    return {"name": name, **summary}


def train_plainly(shards: Path, searched: Path, recipe: Path) -> list[tuple[float, float]]:
    """Repeat a search's trials with `train`; return total and epoch seconds of each."""
    times = []
    for trial in TuneRun(searched).read_trials():
        chosen = to_train_options(trial.chosen, POLICIES["shift"])
        options = {
            "recipe": recipe,
            **{name: value for name, value in chosen.items() if value is not None},
            "epochs": COSTED_EPOCHS,
            "seed": SEED,
            "num_workers": 0,
            "cpus_per_worker": 1,
        }
        folder = shards.parent / f"plain-{trial.number}"
        log(f"train: trial {trial.number}")
        summary = run(["train", shards, folder, *to_flags(options)], folder.with_suffix(".log"))
        epochs = map(json.loads, (folder / "history.jsonl").read_text().splitlines())
        times.append((summary["elapsed_s"], sum(row["train_s"] + row["val_s"] for row in epochs)))
    return times


def render_section(rows: Sequence[Row], searched: Row, plain: list[tuple[float, float]]) -> str:
    lines = [["search", "best validation accuracy", "best trial", "epochs", "steps", "minutes"]]
    for row in rows:
        lines.append(
            [
                row["name"],
                f"{row['best']:.2%}",
                f"{row['best_trial']}",
                f"{row['epochs']} of {row['epochs_planned']}",
                f"{row['steps']:,}",
                f"{row['elapsed_s'] / 60:.1f}",
            ]
        )
    start_s = median(elapsed - epochs for elapsed, epochs in plain)
    plain_s, epochs_s = (sum(times) for times in zip(*plain, strict=True))
    ends = "; ".join(
        f"{row['name']}: "
        + ", ".join(f"{end} {count}" for end, count in sorted(row["ends"].items()))
        for row in rows
    )
    chosen = ", ".join(f"{name} {format_value(v)}" for name, v in rows[0]["chosen"].items())
    return SECTION.format(
        table=format_table(lines),
        ends=ends,
        chosen=chosen,
        plain=f"{plain_s:.0f}",
        epochs=f"{epochs_s:.0f}",
        start=f"{start_s:.0f}",
        searched=f"{searched['elapsed_s']:.0f}",
        more=f"{searched['elapsed_s'] / plain_s - 1:+.1%}",
    )


SECTION = f"""\
## ASHA against random search

The same {TRIALS} trials of `augmentation` and `early-stopping` for both, trained on 8,000 images of
the train split for at most {EPOCHS} epochs and validated on 2,000 others. Recipe `fast`, one trial
per core.

    python tests/benchmarks/search.py

{{table}}

How trials ended: {{ends}}. Trials with `ema_decay` look bad after the first epoch, whatever their
final result: with the default `--grace-epochs 1`, ASHA stopped the best trial of random search.

The best trial of random search: {{chosen}}.

Overhead: {NUM_COSTED} trials of {COSTED_EPOCHS} epochs take {{plain}} s as {NUM_COSTED} calls of
`train`, one after another: {{epochs}} s in epochs, and {{start}} s per call (median) to start and
end. A search of one trial at a time takes {{searched}} s: {{more}}.
"""


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--source", type=Path, help="CIFAKE's folder (default: CIFAKE_TEST_DATA)")
    parser.add_argument("--work", type=Path, help="folder to keep (default: a temporary one)")
    parser.add_argument("--write", action="store_true", help="update EXPERIMENTS.md")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    with tempfile.TemporaryDirectory(prefix="cifake-search-") as temporary:
        work = (options.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        images, shards, recipe = work / "images", work / "shards", work / "recipe.yaml"
        if not images.exists():
            link_part(find_cifake(options.source, work) / "train", images, NUM_IMAGES)
        run(["convert", images, shards], work / "convert.log")
        fast = (RECIPES / "fast.yaml").read_text(encoding="utf-8")
        recipe.write_text(f"{fast}val_fraction: 0.2\n", encoding="utf-8")
        common = {"recipe": recipe, "seed": SEED, "trials": TRIALS, "epochs": EPOCHS}
        rows = [
            search("random", shards, {**common, "scheduler": "none"}),
            search("asha", shards, {**common, "scheduler": "asha"}),
        ]
        costed = {"trials": NUM_COSTED, "epochs": COSTED_EPOCHS, "scheduler": "none"}
        searched = search("costed", shards, {**common, **costed, "max_concurrent": 1})
        plain = train_plainly(shards, work / "costed", recipe)
    section = render_section(rows, searched, plain)
    if options.write:
        write_bytes(HERE / "search.md", section.encode())
        write_bytes(PAGE, render_page().encode())
    print(section)


if __name__ == "__main__":
    main()
