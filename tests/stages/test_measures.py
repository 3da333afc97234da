"""What evaluate measures of predictions, and what it refuses before Ray is started."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cifake_ray.config import EvaluateConfig
from cifake_ray.core.evaluation.buckets import check_slices
from cifake_ray.core.evaluation.calibration import compute_p_fake
from cifake_ray.errors import NothingToDo
from cifake_ray.stages.evaluate import examples
from cifake_ray.stages.evaluate.driver import evaluate_detector
from cifake_ray.stages.evaluate.measure import measure, measure_slices
from cifake_ray.stages.evaluate.write_report import measure_operating_points
from cifake_ray.storage.bundles.built_ins import locate_bundle
from cifake_ray.storage.bundles.bundle import BundleInfo, read_bundle_info

REAL, FAKE = 0, 1


@pytest.fixture(scope="module")
def bundle() -> BundleInfo:
    info = read_bundle_info(locate_bundle(None))
    return replace(info, calibration=replace(info.calibration, temperature=1.0))


def make_predictions(logit: list[float], label: list[int], source: list[str]) -> pa.Table:
    values = np.array(logit, np.float32)
    return pa.table(
        {
            "key": [f"{n}" for n in range(len(logit))],
            "logit": values,
            "p_fake": compute_p_fake(values, 1.0),
            "label": label,
            "source": source,
        }
    )


def find_slices(table: pa.Table, *columns: str, name: str = "source") -> dict[str, Any]:
    check_slices(columns, table.schema)
    return {found["value"]: found for found in measure_slices(table, columns, 0.4, 50)[name]}


def test_a_generator_is_ranked_against_all_real_images() -> None:
    logit = [0.0] * 30 + [2.0] * 30 + [-2.0] * 15 + [3.0] * 15
    label = [REAL] * 30 + [FAKE] * 60
    source = ["camera"] * 30 + ["good"] * 30 + ["odd"] * 30
    slices = find_slices(make_predictions(logit, label, source))
    found = [(name, found["auroc"]["value"]) for name, found in slices.items()]
    assert found == [("odd", 0.5), ("camera", 0.75), ("good", 1.0)], "worst first"
    assert {found["num_images"] for found in slices.values()} == {30}
    assert (slices["odd"]["ranked_real"], slices["odd"]["ranked_fake"]) == (30, 30)
    assert (slices["camera"]["ranked_real"], slices["camera"]["ranked_fake"]) == (30, 60)
    assert slices["odd"]["accuracy"]["value"] == 0.5, "decisions are those of its own images"


def test_images_of_one_class_alone_have_no_rank() -> None:
    slices = find_slices(make_predictions([1.0] * 60, [FAKE] * 60, ["a"] * 30 + ["b"] * 30))
    assert [found["auroc"]["reason"] for found in slices.values()] == [
        "there are no REAL images"
    ] * 2


def test_mistakes_are_those_that_accuracy_counts(bundle: BundleInfo) -> None:
    """A logit of 0, and one that is 0.5 after rounding, is called FAKE."""
    logit, label = [0.0, 0.0, -1e-9, 1.0, -1.0, -1.0], [REAL, FAKE, FAKE, REAL, FAKE, REAL]
    table = make_predictions(logit, label, [""] * 6)
    chosen = examples.choose_examples(table)
    assert chosen["Worst mistakes: REAL called FAKE"] == [3, 0], "the worst first"
    assert chosen["Worst mistakes: FAKE called REAL"] == [4]
    counted = measure(table, bundle.calibration, 0)["at_0.5"]["confusion"]
    assert counted[REAL][FAKE] + counted[FAKE][REAL] == 3


def test_examples_are_bounded_and_the_uncertain_are_nearest_to_a_half() -> None:
    logit = [n / 10 - 5 for n in range(100)]
    chosen = examples.choose_examples(make_predictions(logit, [REAL, FAKE] * 50, [""] * 100))
    assert {len(rows) for rows in chosen.values()} == {12}
    assert set(range(45, 56)) < set(chosen["Most uncertain"])
    assert len(set(chosen["Random images"])) == 12
    assert chosen["Random images"] != sorted(chosen["Random images"])


def test_operating_points_count_what_their_thresholds_call_fake() -> None:
    table = make_predictions([-1.0, 1.0, 0.5, 3.0], [REAL, REAL, FAKE, FAKE], [""] * 4)
    points = measure_operating_points(
        table, {"default": 0.5, "fpr_0.001": float(table["p_fake"][3].as_py()), "fpr_0.01": 0.5}
    )
    assert {name: point["confusion"] for name, point in points.items()} == {
        "fpr_0.01": [[1, 1], [0, 2]],
        "fpr_0.001": [[2, 0], [1, 1]],
    }
    assert list(points) == ["fpr_0.01", "fpr_0.001"]


@pytest.mark.parametrize(
    ("label", "split", "expected"),
    [
        ([None, None], None, "shards: no labelled image in the split test; give"),
        ([None, 1], "val", "no labelled image in the split val; give"),
        ([None, 1], "validation", "no labelled image in the split val; give"),
    ],
)
def test_shards_without_labels_are_named_before_anything_starts(
    tmp_path: Path, label: list[int | None], split: str | None, expected: str
) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    image = [{"bytes": b"", "path": None}] * 2
    table = {"key": ["a", "b"], "image": image, "label": label, "split": ["val", "test"]}
    pq.write_table(pa.table(table), shards / "part-00000.parquet")
    config = EvaluateConfig(shards=str(shards), out=str(tmp_path / "out"), split=split)
    said: list[str] = []
    with pytest.raises(NothingToDo, match=expected):
        evaluate_detector(
            config,
            shards,
            tmp_path / "out",
            locate_bundle(None),
            lambda _: None,
            time.monotonic(),
            said.append,
        )
    assert said == []
    assert not (tmp_path / "out").exists()
