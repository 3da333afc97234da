"""What an audit says of a balance that a person should know."""

from __future__ import annotations

from typing import Any

import pytest

from cifake_ray.config import AuditConfig
from cifake_ray.report.audit_text import choose_side, describe_verdicts, judge_audit

NO_COPIES = dict.fromkeys(
    ("groups", "images", "pairs", "pairs_across_splits", "pairs_across_classes"), 0
)


def judge(**changed: Any) -> dict[str, dict[str, Any]]:
    findings = {
        "images": 100,
        "classes": {"REAL": 50, "FAKE": 50},
        "leaks": {},
        "duplicates": dict.fromkeys(("bytes_group", "pixels_group", "near_group"), NO_COPIES),
        "matched": {"size": 0, "quality": 0},
        "balance": {},
        **changed,
    }
    found = judge_audit(findings, AuditConfig(src="my images", out="audited"))
    return {verdict["name"]: verdict for verdict in found}


def row(value: str, real: int, fake: int) -> dict[str, Any]:
    return {"value": value, "REAL": real, "FAKE": fake, "none": 0}


def test_a_class_of_one_source_is_noted() -> None:
    rows = [row("camera", 50, 0), row("sdxl", 0, 20), row("flux", 0, 30)]
    found = judge(balance={"source": rows})
    assert "All REAL come from one source" in found["sources of REAL"]["text"]
    assert "sources of FAKE" not in found


def test_a_type_that_one_class_alone_has_is_noted() -> None:
    found = judge(balance={"type": [row("art", 10, 40), row("photo", 40, 0), row("map", 0, 10)]})
    assert found["type"]["text"] == "type: 50.0% of images have a value that one class alone has."
    assert "type" not in judge(balance={"type": [row("art", 25, 24), row("photo", 25, 26)]})


def test_classes_of_other_sizes_are_noted_with_a_command_that_works() -> None:
    found = judge(classes={"REAL": 80, "FAKE": 20}, matched={"size": 40, "quality": 0})
    [command] = found["balance"]["remedies"]
    assert command == "cifake-ray convert 'my images' CLEAN --audit audited --match size"
    assert not judge(classes={"REAL": 80, "FAKE": 20})["balance"]["remedies"]


def test_a_near_copy_is_told_only_if_there_are_more_than_exact_ones() -> None:
    same = {**NO_COPIES, "images": 4, "pairs": 2}
    near = {**same, "images": 6, "pairs": 3, "pairs_across_splits": 1}
    copies = {"bytes_group": same, "pixels_group": same, "near_group": near}
    found = judge(duplicates=copies)
    assert found["bytes duplicates"]["level"] == "NOTE"
    assert "pixels duplicates" not in found
    assert found["near duplicates"]["level"] == "LEAK"


def test_a_command_is_shown_once_and_what_is_clean_in_one_line() -> None:
    one = {"name": "a", "level": "LEAK", "text": "a.", "remedies": ["mend"]}
    clean = {"name": "c", "level": "CLEAN", "text": "c", "remedies": []}
    found = describe_verdicts([one, one, clean, clean])
    assert found == ["LEAK a.", "  mend", "LEAK a.", "CLEAN c; c."]


@pytest.mark.parametrize(("median", "side"), [(10, 32), (32, 32), (500, 384), (9000, 1024)])
def test_images_are_scaled_to_a_side_that_most_have(median: float, side: int) -> None:
    assert choose_side(median) == side
