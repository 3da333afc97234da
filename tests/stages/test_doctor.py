"""doctor: what it finds, what it calls a problem, and that it does not start Ray unasked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import ray
from typer.testing import CliRunner

from cifake_ray import cli
from cifake_ray.report.record_text import format_checks
from cifake_ray.stages import doctor


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("doctor started Ray"))


def examine(*arguments: str) -> tuple[int, dict[str, object]]:
    result = CliRunner().invoke(cli.app, ["doctor", "--json", *arguments])
    record = json.loads(result.stdout.splitlines()[-1])
    assert result.exit_code == record["exit_code"]
    return result.exit_code, record


def test_a_good_machine_has_no_problems(tmp_path: Path) -> None:
    code, found = examine("--out", str(tmp_path / "new" / "folder"))
    assert (code, found["problems"]) == (0, [])
    names = {"memory_gb", "memory_free_gb", "cpus", "gpus", "built_in_detector", "exit_code"}
    disks = {f"{name}_disk_free_gb" for name in ("temporary", "cache", "output")}
    assert names | disks <= set(found)
    assert all(" " not in name for name in found)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--store", "s3://b/x", "--s3-profile", "no-such"), "store: s3://b/x: The config profile"),
        (("--store", "/no/such/folder"), "no such file or folder; check the path"),
        (("--out", "/proc/self/x"), "/proc/self/x: "),
        (("--out", "s3://b/x"), "--store checks a bucket"),
    ],
)
def test_a_problem_is_one_line_with_its_remedy(arguments: tuple[str, ...], words: str) -> None:
    code, found = examine(*arguments)
    assert code == 1
    (problem,) = found["problems"]  # type: ignore[misc]
    assert words in problem


def test_little_memory_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "_measure_memory", lambda: (2.0, 0.3))
    code, found = examine("--out", str(tmp_path))
    assert (code, found["problems"]) == (
        1,
        ["memory: 0.3 GB are free; end other programs, or give --num-workers 1"],
    )


def test_what_is_good_has_a_tick_and_what_is_not_a_cross() -> None:
    found = {"cpus": 2, "gpus": [], "disk_free_gb": 1.5, "problems": ["x: full\x1b; free some"]}
    assert format_checks(found).splitlines() == [
        "\u2713 cpus          2",
        "\u2713 gpus          none",
        "\u2713 disk free gb  1.5",
        "\u2717 x: full\\x1b; free some",
    ]
