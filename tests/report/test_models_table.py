"""The list of architectures on a terminal."""

from __future__ import annotations

from typing import Any

import pytest

from cifake_ray.report.models_table import (
    align_table,
    format_count,
    format_models_table,
    format_rate,
)

SPEED = {
    "train_images_per_s": 12.34,
    "score_images_per_s": 1234.5,
    "batch_size": 8,
    "device": "cpu",
    "num_threads": 2,
    "dtype": "float32",
}


def make_row(model: str, **values: Any) -> dict[str, Any]:
    return {
        "model": model,
        "about": "timm, 224x224",
        "image_size": 224,
        "num_parameters": 11_177_538,
        "macs": 1_813_562_368,
        "speed": None,
        "problem": None,
        "results": [],
        **values,
    }


def make_result(image_size: int, accuracy: float) -> dict[str, Any]:
    interval = {"value": accuracy, "low": accuracy - 0.01, "high": accuracy + 0.01}
    return {
        "image_size": image_size,
        "macs": 335_000_000,
        "test_accuracy": interval,
        "train_images": 1_800,
        "epochs": 3,
    }


def show(*rows: dict[str, Any]) -> list[str]:
    return format_models_table({"models": rows, "made_by": "python zoo.py"}).splitlines()


def test_numbers_stand_below_each_other() -> None:
    head, first, second, *_ = show(make_row("resnet18"), make_row("vgg", num_parameters=1_000))
    assert head.split() == ["model", "input", "parameters", "MACs"]
    assert first.split() == ["resnet18", "224", "11.2", "M", "1.81", "G"]
    for name, text in (("parameters", "11.2 M"), ("MACs", "1.81 G"), ("input", "224")):
        end = head.index(name) + len(name)
        assert first[:end].endswith(text)
    assert second[: head.index("parameters") + len("parameters")].endswith("1.00 k")


def test_results_at_other_sizes_have_lines_of_their_own() -> None:
    results = [make_result(96, 0.9), make_result(224, 0.8), make_result(224, 0.7)]
    row = make_row("resnet18", results=results)
    head, first, second, third, other, *notes = show(row, make_row("resnet50"))
    assert "accuracy" in head
    assert first.split()[:2] == ["resnet18", "224"]
    assert "80.0% (79.0-81.0)" in first
    assert first.endswith("1,800 images, 3 epochs")
    assert second.split()[:3] == ["96", "335", "M"]
    assert "90.0%" in second
    assert third.split()[0] == "224"
    assert "70.0%" in third
    assert other.split()[-1] == "-"
    assert any("`python zoo.py`" in note for note in notes)


def test_rates_are_shown_where_they_were_measured() -> None:
    lines = show(make_row("resnet18", speed=SPEED), make_row("large", problem="too large"))
    assert lines[0].split()[-3:] == ["train/s", "score/s", "batch"]
    assert lines[1].split()[-3:] == ["12.3", "1,234", "8"]
    assert lines[2].split()[-3:] == ["-", "-", "-"]
    assert any("cpu, 2 threads, float32" in line for line in lines)
    assert "large: too large" in lines


def test_a_long_list_says_why_it_is_bare() -> None:
    rows = [make_row(f"net{n}", num_parameters=None, macs=None) for n in range(60)]
    lines = show(*rows)
    assert lines[0].split() == ["model", "input"]
    assert lines[60].split() == ["net59", "224"]
    assert lines[-1] == "60 match: too many to count parameters and MACs."


def test_what_failed_is_not_called_too_many() -> None:
    lines = show(make_row("cnn", num_parameters=None, macs=None, problem="takes 32 only"))
    assert lines[-1] == "cnn: takes 32 only"
    assert not any("too many" in line for line in lines)


def test_our_own_are_explained_and_those_of_timm_are_not() -> None:
    lines = show(make_row("cnn", about="3 convolutions"), make_row("resnet18"))
    assert lines[-1].split(maxsplit=1) == ["cnn", "3 convolutions"]


def test_no_line_ends_in_blanks() -> None:
    assert align_table(("a", "b"), [("long", ""), ("x", "1")], "<<") == "a     b\nlong\nx     1"


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (None, "-"),
        (7, "7"),
        (999, "999"),
        (1_000, "1.00 k"),
        (39_132, "39.1 k"),
        (999_499, "999 k"),
        (999_600, "1.00 M"),
        (555_418_624, "555 M"),
        (9_996_000_000, "10.0 G"),
        (2_500_000_000_000, "2.50 T"),
    ],
)
def test_counts_have_three_digits_and_a_unit(number: int | None, text: str) -> None:
    assert format_count(number) == text


def test_rates_have_a_digit_where_it_counts() -> None:
    assert [format_rate(rate) for rate in (4.56, 99.9, 100.4, 12345.6)] == [
        "4.6",
        "99.9",
        "100",
        "12,346",
    ]
