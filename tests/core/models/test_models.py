"""`cifake-ray models`: for people and for programs."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator

import pytest
from typer.testing import CliRunner

from cifake_ray.cli import app
from cifake_ray.storage.presets.model_results import read_model_results


@pytest.fixture(autouse=True)
def keep_handlers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A command owns its process; here it is a guest."""
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    yield
    signal.signal(signal.SIGTERM, handler)


def test_programs_get_rows_with_exact_numbers() -> None:
    result = CliRunner().invoke(app, ["models", "cnn", "--json"])
    record = json.loads(result.stdout)
    assert (result.exit_code, record["exit_code"]) == (0, 0)
    (row,) = record["models"]
    assert (row["model"], row["image_size"]) == ("cnn", 32)
    assert (row["num_parameters"], row["macs"]) == (39_132, 6_927_220)
    zoo = read_model_results()
    assert row["results"] == [result for result in zoo["rows"] if result["model"] == "cnn"]
    assert record["made_by"] == zoo["made_by"]


def test_people_get_a_table() -> None:
    result = CliRunner().invoke(app, ["models", "test_re*", "--image-size", "64"])
    head, first, *_ = result.stdout.splitlines()
    assert result.exit_code == 0
    assert head.split()[:4] == ["model", "input", "parameters", "MACs"]
    assert first.split()[:2] == ["test_resnet", "64"]


def test_a_pattern_that_matches_nothing_is_a_wrong_request() -> None:
    result = CliRunner().invoke(app, ["models", "nothing-of-the-kind"])
    assert result.exit_code == 2
    assert "no architecture matches" in result.stderr
