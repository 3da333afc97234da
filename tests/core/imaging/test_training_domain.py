"""The domain of a detector: what its training images were, and which images are unlike them."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pytest

from cifake_ray.core.imaging.training_domain import ANY_SIDE, TrainingDomain, find_domain
from cifake_ray.core.schema import HEADER_FIELDS

PHOTOS = TrainingDomain(sides=(200, 1024), formats=("JPEG", "PNG"), jpeg_qualities=(75, 95))
Facts = tuple[int | None, int | None, str | None, int | None]


def make_rows(*facts: Facts, errors: list[str | None] | None = None) -> pa.Table:
    fields = {field.name: field.type for field in HEADER_FIELDS}
    names = ("width", "height", "format", "jpeg_quality")
    columns = {
        name: pa.array([row[place] for row in facts], fields[name])
        for place, name in enumerate(names)
    }
    return pa.table({**columns, "error": pa.array(errors or [None] * len(facts), pa.string())})


def test_it_spans_the_training_images() -> None:
    rows = make_rows((640, 480, "JPEG", 95), (200, 1024, "PNG", None), (300, 300, "JPEG", 75))
    assert find_domain(rows) == PHOTOS
    assert find_domain(rows.slice(1, 1)) == TrainingDomain(
        sides=(200, 1024), formats=("PNG",), jpeg_qualities=None
    )
    assert PHOTOS.count_unlike(rows) == {"size": 0, "format": 0, "jpeg_quality": 0, "any": 0}


@pytest.mark.parametrize(
    ("facts", "reasons"),
    [
        ((200, 1024, "JPEG", 75), []),
        ((512, 512, "PNG", None), []),
        ((199, 512, "PNG", None), ["size"]),
        ((512, 1025, "PNG", None), ["size"]),
        ((512, 512, "WEBP", None), ["format"]),
        ((512, 512, "JPEG", 74), ["jpeg_quality"]),
        ((512, 512, "JPEG", 96), ["jpeg_quality"]),
        ((32, 32, "MPO", 50), ["size", "format", "jpeg_quality"]),
    ],
)
def test_an_image_is_counted_for_all_that_tells_it_apart(facts: Facts, reasons: list[str]) -> None:
    counts = PHOTOS.count_unlike(make_rows(facts))
    assert [reason for reason in ("size", "format", "jpeg_quality") if counts[reason]] == reasons
    assert counts["any"] == bool(reasons)


def test_images_without_a_score_do_not_count() -> None:
    unlike: Facts = (32, 32, "GIF", None)
    rows = make_rows(
        unlike, unlike, (None, None, None, None), errors=[None, "nan_score", "not_an_image"]
    )
    assert PHOTOS.count_unlike(rows) == {"size": 1, "format": 1, "jpeg_quality": 0, "any": 1}
    assert PHOTOS.count_unlike(rows.slice(1))["any"] == 0


def test_a_detector_that_saw_no_jpeg_finds_the_format_strange_and_no_quality() -> None:
    domain = TrainingDomain(sides=(8, 64), formats=("PNG",), jpeg_qualities=None)
    counts = domain.count_unlike(make_rows((32, 32, "JPEG", 1), (32, 32, "JPEG", 100)))
    assert counts == {"size": 0, "format": 2, "jpeg_quality": 0, "any": 2}


@pytest.mark.parametrize(
    "domain", [PHOTOS, TrainingDomain(sides=(1, 1), formats=(), jpeg_qualities=None)]
)
def test_it_comes_back_from_json(domain: TrainingDomain) -> None:
    assert TrainingDomain.from_dict(json.loads(json.dumps(asdict(domain)))) == domain


@pytest.mark.parametrize(
    "change",
    [
        {"sides": None},
        {"sides": []},
        {"sides": [1]},
        {"sides": [64, 32]},
        {"sides": [0, 32]},
        {"sides": ["a", "b"]},
        {"formats": [1]},
        {"formats": None},
        {"jpeg_qualities": [80]},
        {"jpeg_qualities": [90, 80]},
    ],
)
def test_an_impossible_one_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError)):
        TrainingDomain.from_dict({**asdict(PHOTOS), **change})


def test_crops_are_alike_in_images_of_any_size_that_hold_one() -> None:
    crops = TrainingDomain(sides=(32, ANY_SIDE), formats=("JPEG",), jpeg_qualities=None)
    rows = make_rows((32, 60_000_000, "JPEG", 50), (31, 99, "JPEG", 50), (32, 32, "PNG", None))
    assert crops.count_unlike(rows) == {"size": 1, "format": 1, "jpeg_quality": 0, "any": 2}
