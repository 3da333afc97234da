"""The rows of the wild table: seeds of one name share a line, and crops and cells are applied."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from wild_rows import format_column, load_score

from cifake_ray.api import load_detector


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("AUROC wild", [0.8123], "0.812"),
        ("AUROC wild", [0.8, 0.9, 0.7], "0.800 (0.700-0.900)"),
        ("TPR", [0.5, 0.7], "60% (50%-70%)"),
    ],
)
def test_seeds_are_shown_as_their_mean_and_range(
    name: str, values: list[float], expected: str
) -> None:
    assert format_column(name, values) == expected


def test_a_score_is_that_of_its_crops_and_its_cell() -> None:
    buffer, rng = io.BytesIO(), np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (300, 300, 3), np.uint8)).save(buffer, "PNG")
    data, run = buffer.getvalue(), Path("wild")
    own = load_score(run, None, {})(data)
    assert own == load_detector("wild").predict_logit([data])[0]
    assert load_score(run, 1, {})(data) != own
    assert load_score(run, None, {"jpeg": 30})(data) != own
    assert load_score(run, None, {"brightness": 1})(data) == own
