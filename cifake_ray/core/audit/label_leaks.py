"""Measure how well labels follow from facts that have nothing to do with what an image shows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from cifake_ray.core.schema import FAKE, LABEL_NAMES, PIXEL_STATISTICS, REAL

NUM_FOLDS = 5
MIN_IMAGES = 10  # of each class
MAX_CATEGORIES = 200  # of a feature; the rarer ones count as one
LEAK_AUROC = 0.52  # a group whose interval lies above it gives the label away

# Groups of features: what is in the file's header, alone and together, and what is not.
HEADER_GROUPS = {
    "format": ("format", "num_frames"),
    "size": ("width", "height", "aspect", "pixels"),
    "mode": ("mode",),
    "JPEG quality": ("jpeg_quality",),
    "quantisation": ("quantization",),
    "subsampling": ("subsampling", "is_progressive"),
    "metadata": ("exif_bytes", "xmp_bytes", "icc_bytes", "text_bytes"),
}
HEADER = tuple(name for names in HEADER_GROUPS.values() for name in names)
BYTES = ("size_bytes", "bytes_per_pixel")
NAME = ("extension", "prefix", "pattern", "length", "num_digits", "first_number", "last_number")
GROUPS: dict[str, tuple[str, ...]] = {
    **HEADER_GROUPS,
    "header": HEADER,
    "bytes": BYTES,
    "zero-pixel null": HEADER + BYTES,
    "name": NAME,
    "pixel statistics": PIXEL_STATISTICS,
    "pixel statistics, linear": PIXEL_STATISTICS,
    "everything": HEADER + BYTES + NAME + PIXEL_STATISTICS,
}

_NUMBER = re.compile(r"\d+")
_WORD = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True)
class Leak:
    """How well a simple classifier tells the classes apart by one group of features."""

    auroc: float  # the mean over the folds, as accuracy
    low: float  # 95% interval
    high: float
    accuracy: float  # mean of both classes, at 0.5
    constant: str | None = None  # the one value that all images have, if there is nothing to tell

    @property
    def is_leak(self) -> bool:
        return self.low > LEAK_AUROC


def measure_leaks(rows: pa.Table, seed: int) -> dict[str, Leak]:
    """Return the leak of each of GROUPS in rows of AUDIT_FIELDS, all with a label.

    The classifiers are gradient-boosted trees, or logistic regression where the name says linear,
    tested by stratified cross-validation. {} with fewer than MIN_IMAGES of a class.
    """
    labels = rows.column("label").to_numpy()
    if min((labels == REAL).sum(), (labels == FAKE).sum()) < MIN_IMAGES:
        return {}
    features = derive_features(rows)
    return {
        name: _measure_group({n: features[n] for n in names}, labels, seed, name.endswith("linear"))
        for name, names in GROUPS.items()
    }


def derive_features(rows: pa.Table) -> dict[str, pa.Array]:
    """Return all features by name: strings are categories, others numbers, null where unknown."""
    found = {name: rows.column(name).combine_chunks() for name in rows.column_names}
    width, height = found["width"].cast("float64"), found["height"].cast("float64")
    pixels = pc.multiply(width, height)
    names = describe_names(rows.column("key").to_pylist())
    return {
        **found,
        **names,
        "aspect": pc.divide(width, height),
        "pixels": pixels,
        "bytes_per_pixel": pc.divide(found["size_bytes"].cast("float64"), pixels),
    }


def find_typical(rows: pa.Table) -> dict[str, dict[str, str]]:
    """Return, for groups of one value an image, the most frequent one of each class with its share.

    Such as {"format": {"REAL": "JPEG (98.0%)", "FAKE": "PNG (61.3%)"}, ...}.
    """
    found: dict[str, dict[str, str]] = {}
    for label, class_name in enumerate(LABEL_NAMES):
        some = rows.filter(pc.equal(rows.column("label"), label))
        sides = (some.column(name).cast("string") for name in ("width", "height"))
        shown = {"size": pc.binary_join_element_wise(*sides, "x")}
        names = ("format", "mode", "JPEG quality", "quantisation", "subsampling")
        shown |= {name: some.column(HEADER_GROUPS[name][0]).cast("string") for name in names}
        has_any = pc.or_(
            pc.greater(some.column("exif_bytes"), 0), pc.greater(some.column("icc_bytes"), 0)
        )
        shown["metadata"] = pc.if_else(has_any, "EXIF or ICC", "neither EXIF nor ICC")
        for name, values in shown.items():
            counts = pc.value_counts(values.fill_null("none")).to_pylist()
            top = max(counts, key=lambda row: (row["counts"], row["values"]), default=None)
            share = f"{top['values']} ({top['counts'] / some.num_rows:.1%})" if top else "none"
            found.setdefault(name, {})[class_name] = share
    return found


def describe_names(keys: Sequence[str]) -> dict[str, pa.Array]:
    """Return the NAME features of the last component of each key; folders often are the labels."""
    rows = []
    for key in keys:
        name = key.rpartition("/")[2]
        stem, dot, extension = name.rpartition(".")
        stem, extension = (stem, extension.lower()) if dot else (name, "")
        numbers = _NUMBER.findall(stem)
        rows.append(
            (
                extension[:8],
                _NUMBER.split(stem, maxsplit=1)[0][:24],
                _WORD.sub("a", _NUMBER.sub("0", stem))[:24],
                len(stem),
                sum(map(len, numbers)),
                float(numbers[0][:15]) if numbers else None,
                float(numbers[-1][:15]) if numbers else None,
            )
        )
    return {
        name: pa.array(column) for name, column in zip(NAME, zip(*rows, strict=True), strict=True)
    }


def _measure_group(
    features: dict[str, pa.Array], labels: np.ndarray, seed: int, is_linear: bool
) -> Leak:
    varying = {name: v for name, v in features.items() if pc.count_distinct(v, "all").as_py() > 1}
    if not varying:
        first = {name: values[0].as_py() for name, values in features.items()}
        return Leak(0.5, 0.5, 0.5, 0.5, constant=_describe_constant(first))
    is_category = [pa.types.is_string(values.type) for values in varying.values()]
    matrix = np.column_stack([_encode(values) for values in varying.values()])
    if is_linear:
        classifier = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced"))
    else:
        classifier = HistGradientBoostingClassifier(
            max_iter=60,
            max_leaf_nodes=15,
            class_weight="balanced",
            categorical_features=is_category,
            early_stopping=False,
            random_state=seed,
        )
    folds = StratifiedKFold(NUM_FOLDS, shuffle=True, random_state=seed)
    scoring = ("roc_auc", "balanced_accuracy")
    with threadpool_limits(1):  # on busy cores threads that wait for each other are slower
        scores = cross_validate(classifier, matrix, labels, cv=folds, scoring=scoring)
    auroc = float(scores["test_roc_auc"].mean())
    margin = 1.96 * estimate_auroc_error(auroc, int((labels == REAL).sum()), int(labels.sum()))
    accuracy = float(scores["test_balanced_accuracy"].mean())
    return Leak(auroc, max(auroc - margin, 0.0), min(auroc + margin, 1.0), accuracy)


def _describe_constant(values: dict[str, object]) -> str:
    """Return the values that all images have of the features of a group, in words."""
    name, first = next(iter(values.items()))
    if name == "width":
        return f"{first}x{values['height']}"
    if name == "exif_bytes":
        return "the same amount" if any(values.values()) else "none"
    return "none" if first is None else str(first)


def _encode(values: pa.Array) -> np.ndarray:
    """Return float64[N]: numbers as they are, strings as the rank of how often they occur."""
    if not pa.types.is_string(values.type):
        return np.asarray(values.cast("float64").to_numpy(zero_copy_only=False))
    _, codes, counts = np.unique(
        values.fill_null("").to_numpy(zero_copy_only=False).astype(str),
        return_inverse=True,
        return_counts=True,
    )
    ranks = np.argsort(np.argsort(-counts, kind="stable"))
    return np.minimum(ranks[codes], MAX_CATEGORIES).astype(float)


def estimate_auroc_error(auroc: float, num_real: int, num_fake: int) -> float:
    """Return the standard error of an AUROC. Source: Hanley & McNeil, Radiology 143 (1982)."""
    q1, q2 = auroc / (2 - auroc), 2 * auroc**2 / (1 + auroc)
    variance = auroc * (1 - auroc)
    variance += (num_fake - 1) * (q1 - auroc**2) + (num_real - 1) * (q2 - auroc**2)
    return float(np.sqrt(max(variance, 0) / (num_real * num_fake)))
