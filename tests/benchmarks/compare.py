"""Compare trainings that differ in options: same images and seeds, a table with intervals.

    python tests/benchmarks/compare.py NAME [--source DIR] [--work DIR] [--jobs N] [--write]

NAME is a file of `tests/benchmarks/comparisons`: a number of images of CIFAKE's train split (chosen
by a hash of their names), seeds, and the options of `train` for each variant. Every variant is
trained with every seed and evaluated on the whole test split. `--jobs` trainings share the cores.
`--work` keeps finished work, from which the same command resumes.

`--write` saves the results as JSON beside the file and regenerates `cifake_ray/EXPERIMENTS.md` from
all files with results.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import yaml
from measure import find_cifake, finish_command, format_table, link_part, log, start_command
from PIL import Image, ImageEnhance
from scipy.stats import t as student

import cifake_ray
from cifake_ray.storage.io.files import write_bytes, write_json

HERE = Path(__file__).parent / "comparisons"
PAGE = Path(cifake_ray.__file__).with_name("EXPERIMENTS.md")
NUM_CORES = len(os.sched_getaffinity(0))

Row = dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """A file of `comparisons`. The other variants are compared with the first."""

    name: str
    title: str
    images: int | None  # of the train split, half of each class; None is all
    seeds: list[int]
    options: dict[str, Any]  # of `train`, for all variants
    variants: dict[str, dict[str, Any]]  # what each adds to them
    # Further test sets: the test images saved as JPEG or with changed brightness.
    conditions: dict[str, dict[str, float]] = field(default_factory=dict)
    note: str = ""  # what the results show

    @classmethod
    def read(cls, path: Path) -> Comparison:
        return cls(name=path.stem, **yaml.safe_load(path.read_text(encoding="utf-8")))

    @property
    def results_path(self) -> Path:
        return HERE / f"{self.name}.json"


def to_flags(options: dict[str, Any]) -> list[str]:
    """Return the options as flags of a command line: `--name` for true, `--no-name` for false."""
    flags = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", str(value)]
    return flags


def run(arguments: Sequence[object], log: Path) -> Row:
    return finish_command(start_command(arguments, log), arguments, log)


def prepare(comparison: Comparison, given: Path | None, work: Path) -> Path:
    """Return the shards that all trainings read; convert them first if needed."""
    shards = work / "shards"
    if not (shards / "_SUCCESS").exists():
        images = work / "images"
        if not images.exists():
            source, linking = find_cifake(given, work), work / "linking"
            link_part(source / "train", linking / "train", comparison.images)
            link_part(source / "test", linking / "test", None)
            linking.rename(images)
        log("convert")
        run(["convert", images, shards], work / "convert.log")
    return shards


def prepare_condition(shards: Path, name: str, change: dict[str, float]) -> Path:
    """Return the shards of the changed test images; make them first if needed."""
    work = shards.parent / name
    changed = work / "shards"
    if not (changed / "_SUCCESS").exists():
        log(f"test images under {name}")
        images = shards.parent / "images" / "test"
        for path in images.rglob("*.jpg"):
            target = work / "images" / "test" / path.relative_to(images)
            target.parent.mkdir(parents=True, exist_ok=True)
            with Image.open(path) as image:
                degrade(image, target, **change)
        run(["convert", work / "images", changed], work / "convert.log")
    return changed


def degrade(image: Image.Image, target: Path, brightness: float = 1.0, jpeg: int = 0) -> None:
    """Save the changed image as a JPEG of quality `jpeg`, or as PNG if that is 0."""
    changed = ImageEnhance.Brightness(image).enhance(brightness)
    if jpeg:
        changed.save(target, quality=jpeg)
    else:
        changed.save(target.with_suffix(".png"))


def measure(
    comparison: Comparison,
    variant: str,
    seed: int,
    shards: Path,
    conditions: dict[str, Path],
    jobs: int,
    turn: threading.Lock,
) -> Row:
    """Train and evaluate; return one row of the results."""
    folder = shards.parent / variant / str(seed)
    folder.mkdir(parents=True, exist_ok=True)
    options = {**comparison.options, **comparison.variants[variant], "seed": seed}
    if jobs > 1:
        options |= {"num_workers": 0, "cpus_per_worker": max(1, NUM_CORES // jobs)}
    trained = folder / "run"
    summary = run(["train", shards, trained, *to_flags(options)], folder / "train.log")
    metrics = {}
    with turn:
        for name, images in {"": shards, **conditions}.items():
            report = folder / f"report{name}"
            run(["evaluate", images, "--bundle", trained, "--out", report], folder / "evaluate.log")
            metrics[name] = json.loads((report / "metrics.json").read_text())
    plain = metrics.pop("")
    row = {
        "variant": variant,
        "seed": seed,
        "num_parameters": summary["num_parameters"],
        "train_images": summary["train_images"],
        "test_images": plain["num_images"],
        "epochs": summary["epochs"],
        "best_epoch": summary["best_epoch"],
        "train_min": round(summary["train_s"] / 60, 2),
        "num_threads": NUM_CORES // jobs,
        "val_accuracy": summary["val_accuracy"],
        "accuracy": plain["accuracy"]["value"],
        "auroc": plain["auroc"]["value"],
        "tpr_at_fpr_1pct": plain["tpr_at_fpr_1pct"]["value"],
        "conditions": {name: found["accuracy"]["value"] for name, found in metrics.items()},
    }
    log(f"{variant}, seed {seed}: {row['accuracy']:.2%} after {row['epochs']} epochs")
    return row


def find_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and half the width of its 95% t interval, None for a single value."""
    if len(values) < 2:
        return values[0], None
    width = student.ppf(0.975, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return mean(values), float(width)


def format_points(values: Sequence[float], sign: str = "") -> str:
    """Format shares as percent."""
    centre, width = find_interval([100 * value for value in values])
    return f"{centre:{sign}.2f}" + ("" if width is None else f" ± {width:.2f}")


def summarise(comparison: Comparison, rows: Sequence[Row]) -> str:
    """Return a Markdown table with a line for each variant that has rows."""
    table = []
    found = {
        variant: {row["seed"]: row for row in rows if row["variant"] == variant}
        for variant in comparison.variants
    }
    first = found[next(iter(comparison.variants))]
    for variant, by_seed in found.items():
        if not by_seed:
            continue
        chosen = list(by_seed.values())
        shared = [seed for seed in by_seed if seed in first]
        gains = [by_seed[seed]["accuracy"] - first[seed]["accuracy"] for seed in shared]
        epochs = sorted({row["epochs"] for row in chosen})
        table.append(
            {
                "variant": variant,
                "change": " ".join(to_flags(comparison.variants[variant])).replace("|", "\\|")
                or "-",
                "parameters": f"{chosen[0]['num_parameters']:,}",
                "epochs": f"{epochs[0]}" + (f"-{epochs[-1]}" if len(epochs) > 1 else ""),
                "minutes": f"{median(row['train_min'] for row in chosen):.1f}",
                "seeds": f"{len(chosen)}",
                "validation, %": format_points([row["val_accuracy"] for row in chosen]),
                "test accuracy, %": format_points([row["accuracy"] for row in chosen]),
                "vs. first": format_points(gains, "+") if gains and by_seed is not first else "-",
                "AUROC": f"{mean(row['auroc'] for row in chosen):.4f}",
                "TPR at 1% FPR, %": format_points([row["tpr_at_fpr_1pct"] for row in chosen]),
                **{
                    f"{name}, %": format_points([row["conditions"][name] for row in chosen])
                    for name in comparison.conditions
                },
            }
        )
    return format_table([list(table[0]), *(list(line.values()) for line in table)])


def render_section(comparison: Comparison, rows: Sequence[Row]) -> str:
    row = rows[0]
    common = " ".join(to_flags(comparison.options))
    threads = " or ".join(str(n) for n in sorted({row["num_threads"] for row in rows}))
    return (
        f"## {comparison.title}\n\n"
        f"{row['train_images']:,} training images, {row['test_images']:,} test images; minutes of"
        f" training on {threads} CPU thread{'s' if threads != '1' else ''}.\n\n"
        + (f"Common options: `{common}`.\n\n" if common else "")
        + f"    python tests/benchmarks/compare.py {comparison.name}\n\n"
        + f"{summarise(comparison, rows)}\n"
        + (f"\n{comparison.note.strip()}\n" if comparison.note else "")
    )


def render_page() -> str:
    """Return EXPERIMENTS.md, from all results and the sections of other scripts."""
    sections = [
        render_section(comparison, json.loads(comparison.results_path.read_text())["rows"])
        for comparison in map(Comparison.read, sorted(HERE.glob("*.yaml")))
        if comparison.results_path.exists()
    ]
    others = [path.read_text(encoding="utf-8") for path in sorted(HERE.glob("*.md"))]
    return "\n".join([HEAD, *sections, *others])


HEAD = """\
# Experiments

Each section is generated by its command with `--write`; `tests/benchmarks/comparisons` defines the
comparisons of `compare.py`.

Unless a section says otherwise, models are trained on CIFAKE's train split or a part of it, a tenth
of which is held out for validation and selects the epoch; the test images select nothing. Accuracy
is at 0.5. Means over seeds have 95% intervals (Student's t); differences from the first variant are
computed per seed. Minutes cover the training epochs (median over seeds) on shared cores: compare
them only within a table.
"""


def parse_options() -> argparse.Namespace:
    known = sorted(path.stem for path in HERE.glob("*.yaml"))
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=known)
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="train only these variants")
    parser.add_argument("--seeds", nargs="+", type=int, help="train only with these seeds")
    parser.add_argument("--source", type=Path, help="CIFAKE's folder (default: CIFAKE_TEST_DATA)")
    parser.add_argument("--work", type=Path, help="folder to keep (default: a temporary one)")
    parser.add_argument("--jobs", type=int, default=1, help="concurrent trainings")
    parser.add_argument("--write", action="store_true", help="save the results and EXPERIMENTS.md")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    comparison = Comparison.read(HERE / f"{options.name}.yaml")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the folder is removed
    with tempfile.TemporaryDirectory(prefix="cifake-compare-") as temporary:
        work = (options.work or Path(temporary)).resolve() / comparison.name
        work.mkdir(parents=True, exist_ok=True)
        shards = prepare(comparison, options.source, work)
        conditions = {
            name: prepare_condition(shards, name, change)
            for name, change in comparison.conditions.items()
        }
        turn = threading.Lock()
        with ThreadPoolExecutor(options.jobs) as pool:
            futures = [
                pool.submit(
                    measure, comparison, variant, seed, shards, conditions, options.jobs, turn
                )
                for seed in options.seeds or comparison.seeds
                for variant in options.only or comparison.variants
            ]
            rows = [future.result() for future in futures]
    if options.write:
        path = comparison.results_path
        old = json.loads(path.read_text())["rows"] if path.exists() else []
        merged = {(row["variant"], row["seed"]): row for row in (*old, *rows)}
        rows = [
            merged[key]
            for variant in comparison.variants
            for key in sorted(merged)
            if key[0] == variant
        ]
        write_json(path, {"rows": rows})
        write_bytes(PAGE, render_page().encode())
    print(summarise(comparison, rows))


if __name__ == "__main__":
    main()
