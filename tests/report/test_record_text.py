"""Records as lines of text: times, sizes, words for values."""

from __future__ import annotations

import pytest

from cifake_ray.report.record_text import format_record, format_time


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (0.4, "0:00"),
        (7, "0:07"),
        (59.6, "1:00"),
        (187, "3:07"),
        (3599.6, "1:00:00"),
        (3723, "1:02:03"),
        (90_000, "25:00:00"),
    ],
)
def test_times_are_read_at_a_glance(seconds: float, text: str) -> None:
    assert format_time(seconds) == text


def test_values_are_written_for_people() -> None:
    record = {"yes": True, "none": None, "n": 1_000_000, "f": 0.25, "whole": 3.0, "d": {"a": 1}}
    lines = [line.split(maxsplit=1) for line in format_record(record).splitlines()]
    assert lines == [
        ["yes", "yes"],
        ["none", "-"],
        ["n", "1,000,000"],
        ["f", "0.25"],
        ["whole", "3"],
        ["d", "a 1"],
    ]
