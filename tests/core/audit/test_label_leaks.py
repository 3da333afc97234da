"""Facts that give the label away are found, and others are not accused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import roc_auc_score

from cifake_ray.core.audit.label_leaks import (
    GROUPS,
    describe_names,
    estimate_auroc_error,
    find_typical,
    measure_leaks,
)
from cifake_ray.core.schema import AUDIT_FIELDS, PIXEL_STATISTICS


def make_rows(num_rows: int = 400, **changed: Any) -> pa.Table:
    """Rows in which nothing depends on the label, but what `changed` replaces."""
    rng = np.random.default_rng(0)
    columns: dict[str, Any] = {field.name: [None] * num_rows for field in AUDIT_FIELDS}
    columns |= {
        "key": [
            f"{'REAL' if n % 2 else 'FAKE'}/{rng.integers(10**6):06}.jpg" for n in range(num_rows)
        ],
        "label": [1 - n % 2 for n in range(num_rows)],
        "width": rng.choice([256, 512, 1024], num_rows).tolist(),
        "height": [512] * num_rows,
        "format": ["JPEG"] * num_rows,
        "mode": ["RGB"] * num_rows,
        "jpeg_quality": rng.choice([75, 90], num_rows).tolist(),
        "quantization": rng.choice(["a", "b"], num_rows).tolist(),
        "subsampling": ["4:2:0"] * num_rows,
        "size_bytes": rng.integers(10_000, 20_000, num_rows).tolist(),
        **{f"{name}_bytes": [0] * num_rows for name in ("exif", "xmp", "icc", "text")},
        **{name: rng.random(num_rows).tolist() for name in PIXEL_STATISTICS},
        **changed,
    }
    return pa.table({f.name: pa.array(columns[f.name], f.type) for f in AUDIT_FIELDS})


def test_nothing_is_found_where_there_is_nothing() -> None:
    leaks = measure_leaks(make_rows(), 0)
    assert list(leaks) == list(GROUPS)
    assert [name for name, leak in leaks.items() if leak.is_leak] == []
    assert leaks["format"].constant == "JPEG"
    assert leaks["metadata"].constant == "none"
    assert leaks["size"].low < 0.5 < leaks["size"].high
    assert leaks == measure_leaks(make_rows(), 0)  # the same seed


def test_a_constant_is_told_in_words() -> None:
    leaks = measure_leaks(make_rows(width=[512] * 400, icc_bytes=[9] * 400), 0)
    assert leaks["size"].constant == "512x512"
    assert leaks["metadata"].constant == "the same amount"


@pytest.mark.parametrize(
    ("changed", "group"),
    [
        ({"format": ["PNG" if n % 2 else "JPEG" for n in range(400)]}, "format"),
        ({"width": [256 if n % 2 else 257 for n in range(400)]}, "size"),
        ({"jpeg_quality": [90 if n % 2 else None for n in range(400)]}, "JPEG quality"),
        ({"quantization": [f"{n % 2}{n % 7}" for n in range(400)]}, "quantisation"),
        ({"exif_bytes": [9 * (n % 2) for n in range(400)]}, "metadata"),
        ({"key": [f"{n:04}.jpg" if n % 2 else f"a ({n}).jpg" for n in range(400)]}, "name"),
    ],
)
def test_what_gives_the_label_away_is_named_alone(changed: Any, group: str) -> None:
    leaks = measure_leaks(make_rows(**changed), 0)
    assert leaks[group].auroc == pytest.approx(1.0, abs=1e-6)
    assert leaks[group].accuracy == pytest.approx(1.0, abs=1e-6)
    combined = {"everything"} if group == "name" else {"header", "zero-pixel null", "everything"}
    assert {name for name, leak in leaks.items() if leak.is_leak} == {group, *combined}


def test_too_few_images_of_a_class_are_not_measured() -> None:
    rows = make_rows(40)
    assert measure_leaks(rows.filter(pa.array([n % 2 == 0 for n in range(40)])), 0) == {}


def test_names_are_described_without_their_folders() -> None:
    found = describe_names(["train/FAKE/1000 (10).JPG", "x/REAL/IMG_0042.tar.gz", "no-number", ""])
    rows = {name: column.to_pylist() for name, column in found.items()}
    assert rows["extension"] == ["jpg", "gz", "", ""]
    assert rows["prefix"] == ["", "IMG_", "no-number", ""]
    assert rows["pattern"] == ["0 (0)", "a_0.a", "a-a", ""]
    assert rows["first_number"] == [1000, 42, None, None]
    assert rows["last_number"] == [10, 42, None, None]


def test_a_number_of_any_length_is_no_error() -> None:
    assert describe_names(["9" * 5000 + ".jpg"])["num_digits"].to_pylist() == [5000]


def test_the_error_of_an_auroc_is_that_of_resampling() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 150)
    scores = [roc_auc_score(labels, rng.normal(labels, 1)) for _ in range(400)]
    expected = estimate_auroc_error(float(np.mean(scores)), 150, 150)
    assert np.std(scores) == pytest.approx(expected, rel=0.15)


def test_typical_values_are_those_of_each_class() -> None:
    formats = ["PNG" if n % 2 else ("JPEG", "WEBP")[n % 8 == 0] for n in range(400)]
    typical = find_typical(make_rows(format=formats))
    assert typical["format"] == {"REAL": "PNG (100.0%)", "FAKE": "JPEG (75.0%)"}
