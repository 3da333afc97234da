"""Compare the networks on CIFAKE: train, kill, resume, evaluate and score with each.

    python tests/benchmarks/model_results.py [NAME[@SIZE] ...] [--source DIR] [--full] [--write]

All steps use the `cifake-ray` commands. A balanced part of the train split and a part of the test
split are converted once. Each network is trained with `--patience`; `train` is killed with SIGKILL
after its first epoch, and the same command resumes. Then the bundle is evaluated on the test images
and scores a folder. Without names all ENTRIES that are not `slow` run: some 35 minutes on two idle
CPU cores, an hour with `--all`.

After every network `--write` merges its row into `cifake_ray/model_results.json` and regenerates
`cifake_ray/MODELS.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from measure import (
    Failure,
    find_cifake,
    finish_command,
    format_table,
    link_part,
    log,
    start_command,
)

from cifake_ray.report.models_table import format_count, format_rate
from cifake_ray.report.numbers import format_interval
from cifake_ray.storage.io.files import write_bytes, write_json
from cifake_ray.storage.presets.model_results import locate_model_results, read_model_results

SCRIPT = "python tests/benchmarks/model_results.py"
FULL_TRAIN_IMAGES, FULL_EPOCHS, FULL_BATCH_SIZE = 100_000, 10, 128
SCORED_IMAGES = 200
POLL_S = 0.05

Row = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """A network at an input size, with its training options."""

    model: str
    image_size: int
    epochs: int = 3
    lr: float = 0.001
    slow: bool = False  # runs only if named, or with --all

    @property
    def name(self) -> str:
        return f"{self.model}@{self.image_size}"


# Some networks twice: with a stem for 32 pixels (small_*), and unchanged on enlarged images.
ENTRIES = (
    Entry("cnn", 32, epochs=10, lr=0.003),
    Entry("small_cnn", 32, epochs=10, lr=0.006),
    Entry("small_cnn_residual", 32, epochs=10, lr=0.006, slow=True),
    Entry("small_lite0", 64, slow=True),
    Entry("small_resnet18", 32),
    Entry("resnet18", 32),
    Entry("resnet18", 96),
    Entry("small_resnet34", 32, epochs=2, slow=True),
    Entry("small_resnet50", 32, epochs=2),
    Entry("resnet50", 96, epochs=2),
    Entry("small_convnext_atto", 32, slow=True),
    Entry("convnext_atto", 64),
    Entry("small_vit_tiny", 32, lr=0.0005),
    Entry("vit_tiny_patch16_224", 64, lr=0.0005),
    Entry("small_vit_small", 32, epochs=2, lr=0.0005, slow=True),
    Entry("fusion", 32, epochs=2, lr=0.0005, slow=True),
    Entry("vgg16", 32, epochs=2, lr=0.0001, slow=True),
    Entry("efficientnet_b0", 64),
    Entry("tf_efficientnetv2_b0", 64),
    Entry("tf_efficientnet_lite0", 64),
    Entry("mobilenetv3_small_100", 64),
)


def choose_entries(names: Sequence[str], everything: bool) -> list[Entry]:
    """Return the entries to run: all sizes of NAME, or any NAME@SIZE."""
    if not names:
        return [entry for entry in ENTRIES if everything or not entry.slow]
    chosen = []
    for name in names:
        found = [entry for entry in ENTRIES if name in (entry.name, entry.model)]
        model, _, size = name.partition("@")
        if not found and not size.isdigit():
            known = ", ".join(entry.name for entry in ENTRIES)
            raise ValueError(f"{name}: give NAME@SIZE, or one of {known}")
        chosen += found or [Entry(model, int(size))]
    return list(dict.fromkeys(chosen))


class Bench:
    """A run of the benchmark, with its folders and commands."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options, self.work = options, work
        self.log = work / "log"
        self.shards = work / "shards"
        self.folder = work / "folder"

    def prepare(self) -> None:
        """Convert the images that all networks use."""
        source = find_cifake(self.options.source, self.work)
        images = self.work / "images"
        for split in ("train", "test"):
            wanted = None if self.options.full else getattr(self.options, f"{split}_images")
            num_images = link_part(source / split, images / split, wanted)
            setattr(self.options, f"{split}_images", num_images)
        link_part(source / "test", self.folder, SCORED_IMAGES)
        total = self.options.train_images + self.options.test_images
        # Every worker gets several shards, also of the test images.
        log("convert")
        self.finish(["convert", images, self.shards, "--shard-size", max(64, total // 16)])

    def start(self, arguments: Sequence[object]) -> subprocess.Popen[str]:
        return start_command(arguments, self.log)

    def finish(self, arguments: Sequence[object]) -> Row:
        """Return a command's JSON result. Failure if it exits with another code than 0."""
        return finish_command(self.start(arguments), arguments, self.log)

    def kill_after_first_epoch(self, arguments: Sequence[object], run: Path) -> bool:
        """Kill training after its first epoch; return whether it was killed before it ended."""
        process = self.start(arguments)
        try:
            while process.poll() is None and not (run / "history.jsonl").exists():
                time.sleep(POLL_S)
        finally:
            process.kill()
            process.communicate()
        return process.returncode == -signal.SIGKILL

    def measure(self, entry: Entry) -> Row:
        """Train, kill, resume, evaluate and score; return a row of the table."""
        options, run = self.options, self.work / "run"
        report, scores = self.work / "report", self.work / "scores"
        for folder in (run, report, scores):
            shutil.rmtree(folder, ignore_errors=True)
        epochs = options.epochs or (FULL_EPOCHS if options.full else entry.epochs)
        recipe = ["--model", entry.model, "--image-size", entry.image_size, "--epochs", epochs]
        recipe += ["--batch-size", options.batch_size, "--lr", entry.lr]
        recipe += ["--patience", options.patience, "--num-workers", options.num_workers]
        train = ["train", self.shards, run, *recipe, "--cache-dir", self.work / "cache"]
        log(f"{entry.name}: train, kill, train")
        was_killed = self.kill_after_first_epoch(train, run)
        summary = self.finish(train)
        history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
        if [row["epoch"] for row in history] != list(range(1, summary["epochs"] + 1)):
            raise Failure(f"the history is not that of {summary['epochs']} epochs in order")
        if was_killed and not summary["epochs_resumed"]:
            raise Failure("killed after an epoch, but restarted from the beginning")
        log(f"{entry.name}: evaluate, score, models --measure")
        evaluated = self.finish(["evaluate", self.shards, "--bundle", run, "--out", report])
        scored = self.finish(["score", self.folder, scores, "--bundle", run])
        for record, num_images in ((evaluated, options.test_images), (scored, SCORED_IMAGES)):
            if record["done"] != num_images:
                raise Failure(f"{record['command']}: {record['done']} of {num_images} images")
        metrics = json.loads((report / "metrics.json").read_text())
        (cost,) = self.finish(
            ["models", entry.model, "--image-size", entry.image_size, "--measure"]
        )["models"]
        if cost["problem"]:
            raise Failure(cost["problem"])
        return {
            "model": entry.model,
            "image_size": entry.image_size,
            "num_parameters": cost["num_parameters"],
            "macs": cost["macs"],
            "train_images_per_s": summary["images_per_s"],
            "score_images_per_s": cost["speed"]["score_images_per_s"],
            "is_full": options.full,
            "train_images": summary["train_images"],
            "val_images": summary["val_images"],
            "test_images": metrics["num_images"],
            "epochs": summary["epochs"],
            "epochs_asked": epochs,
            "resumed_after_epoch": summary["epochs_resumed"] if was_killed else None,
            "stopped": summary["stopped"],
            "val_accuracy": summary["val_accuracy"],
            "test_accuracy": metrics["accuracy"],
            "test_auroc": metrics["auroc"],
            "full_run_h": round(estimate_hours(summary["images_per_s"]), 2),
            "num_cpus": len(os.sched_getaffinity(0)),
            "torch": version("torch"),
            "command": self.describe_command(entry),
            "train_command": shlex.join(
                map(str, ["cifake-ray", "train", "SHARDS", "RUN", *recipe])
            ),
        }

    def describe_command(self, entry: Entry) -> str:
        """Return the command that reproduces this row."""
        options = self.options
        flags = ["--full"] if options.full else []
        for name in ("train_images", "test_images", "epochs", "batch_size", "patience"):
            value = getattr(options, name)
            if value != options.defaults[name] and not (options.full and "images" in name):
                flags += [f"--{name.replace('_', '-')}", str(value)]
        if options.num_workers != options.defaults["num_workers"]:
            flags += ["--num-workers", options.num_workers]
        return " ".join([SCRIPT, entry.name, *flags])


def estimate_hours(images_per_s: float) -> float:
    """Return the hours of FULL_EPOCHS passes over CIFAKE's train split."""
    return FULL_TRAIN_IMAGES * FULL_EPOCHS / images_per_s / 3600


def merge_rows(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """Replace old rows of the same network, size and kind of run; sort in the order of ENTRIES."""
    rows = {(r["model"], r["image_size"], r["is_full"]): r for r in (*old, *new)}
    places = {(e.model, e.image_size): place for place, e in enumerate(ENTRIES)}

    def find_place(key: tuple[str, int, bool]) -> tuple[object, ...]:
        return places.get(key[:2], len(places)), *key

    return [rows[key] for key in sorted(rows, key=find_place)]


# Column heads, and how to format their cells.
COLUMNS = {
    "model": lambda row: row["model"],
    "input": lambda row: str(row["image_size"]),
    "parameters": lambda row: format_count(row["num_parameters"]),
    "MACs": lambda row: format_count(row["macs"]),
    "training images/s": lambda row: format_rate(row["train_images_per_s"]),
    "scoring images/s": lambda row: format_rate(row["score_images_per_s"]),
    "full run, hours": lambda row: format_rate(row["full_run_h"]),
    "training images": lambda row: f"{row['train_images']:,}",
    "epochs": lambda row: f"{row['epochs']} of {row['epochs_asked']}",
    "resumed after": lambda row: format_resumed(row["resumed_after_epoch"]),
    "stopped": lambda row: row["stopped"],
    "validation": lambda row: f"{row['val_accuracy']:.1%}",
    "test accuracy (95%)": lambda row: format_interval(row["test_accuracy"], percent=True),
    "test AUROC (95%)": lambda row: format_interval(row["test_auroc"]),
}


def format_resumed(epoch: int | None) -> str:
    return "-" if epoch is None else f"epoch {epoch}"


def tabulate(rows: Sequence[Row]) -> str:
    return format_table(
        [list(COLUMNS), *([cell(row) for cell in COLUMNS.values()] for row in rows)]
    )


def render_page(rows: Sequence[Row]) -> str:
    """Return MODELS.md."""
    if not rows:
        return PAGE.format(table="Nothing has been measured yet.", commands="")
    machines = {(row["num_cpus"], row["torch"]) for row in rows}
    machine = "; ".join(f"{cpus} CPU cores, torch {torch}" for cpus, torch in sorted(machines))
    commands = "\n\n".join(f"    {row['command']}\n    {row['train_command']}" for row in rows)
    return PAGE.format(
        table=f"{tabulate(rows)}\n\nMeasured on {machine}.",
        commands=f"\n## Commands\n\nEach row's own command, and its training.\n\n{commands}\n",
    )


PAGE = (
    f"""\
# Models

Generated by `{SCRIPT} --write`. `cifake-ray models` shows costs and results.

{{table}}

All networks are trained from scratch on a balanced part of CIFAKE's train split (all of it for rows
of 90,000 images), a tenth of it held out for validation. So few images and epochs show costs and
which networks learn quickly, but little about final accuracy.

- **input**: pixels per side. CIFAKE's images have 32; larger inputs enlarge them. `small_*` have
  stems for 32 pixels; timm's own networks downsample the image in their first layers.
- **MACs**: multiply-accumulates of convolutions, matrix products and attention for one image.
- **training images/s**: over all epochs, with decoded images in memory, augmentation and optimiser.
- **scoring images/s**: the network alone on all cores, from `cifake-ray models --measure`.
- **full run**: {FULL_EPOCHS} epochs over {FULL_TRAIN_IMAGES:,} images at that training rate.
- **resumed after**: the epoch after which training was killed with SIGKILL and resumed.
- **stopped**: why training ended; `--patience` may end it early.
- **validation**: accuracy of the best epoch, on the images that selected it.
- **test**: at 0.5, on test images, which selected nothing.
"""
    + "{commands}"
)


def write_results(rows: list[Row]) -> None:
    """Write model_results.json and MODELS.md, each atomically."""
    path = locate_model_results()
    write_json(path, {"made_by": f"{SCRIPT} --write", "rows": rows})
    write_bytes(path.with_name("MODELS.md"), render_page(rows).encode())


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", nargs="*", help=", ".join(entry.name for entry in ENTRIES))
    parser.add_argument("--all", action="store_true", help="include the slow ones")
    parser.add_argument("--source", type=Path, help="CIFAKE's folder (default: CIFAKE_TEST_DATA)")
    parser.add_argument("--train-images", type=int, default=2_000)
    parser.add_argument("--test-images", type=int, default=1_000)
    parser.add_argument(
        "--full", action="store_true", help=f"whole splits, {FULL_EPOCHS} epochs; needs names"
    )
    parser.add_argument("--epochs", type=int, help="instead of those of ENTRIES")
    parser.add_argument(
        "--batch-size", type=int, help=f"default: 32, {FULL_BATCH_SIZE} with --full"
    )
    parser.add_argument("--patience", type=int, default=3)
    parser.add_argument("--num-workers", default="0", help="option of train; 0 trains without Ray")
    parser.add_argument("--workdir", type=Path, help="parent of the temporary folder")
    parser.add_argument("--json", type=Path, help="file for the rows of this run")
    parser.add_argument(
        "--write", action="store_true", help="update model_results.json and MODELS.md"
    )
    parser.add_argument("--page", action="store_true", help="only regenerate MODELS.md")
    options = parser.parse_args()
    defaults = {action.dest: action.default for action in parser._actions}
    defaults["batch_size"] = FULL_BATCH_SIZE if options.full else 32
    options.batch_size = options.batch_size or defaults["batch_size"]
    options.defaults = defaults
    if options.full and not options.name:
        parser.error("--full takes hours for most networks; give their names")
    try:
        options.entries = choose_entries(options.name, options.all)
    except ValueError as error:
        parser.error(str(error))
    return options


def main() -> None:
    options = parse_options()
    if options.page:
        write_results(read_model_results()["rows"])
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the folder is removed
    rows: list[Row] = []
    failed = []
    with tempfile.TemporaryDirectory(prefix="cifake-zoo-", dir=options.workdir) as work:
        bench = Bench(options, Path(work))
        bench.prepare()
        for entry in options.entries:
            started_s = time.perf_counter()
            try:
                row = bench.measure(entry)
            except Failure as failure:
                failed.append(entry.name)
                print(f"{entry.name} failed: {failure}", file=sys.stderr, flush=True)
                continue
            rows.append(row)
            cells = "; ".join(f"{head} {cell(row)}" for head, cell in COLUMNS.items())
            print(f"{cells}; {time.perf_counter() - started_s:.0f} s", flush=True)
            if options.json:
                options.json.write_text(json.dumps(rows, indent=2) + "\n")
            if options.write:
                write_results(merge_rows(read_model_results()["rows"], [row]))
    print(f"\n{tabulate(rows)}" if rows else "no rows")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
