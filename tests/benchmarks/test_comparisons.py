"""Tests of the comparisons: options given to `train`, and tables made from results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from compare import (
    HERE,
    PAGE,
    Comparison,
    degrade,
    find_interval,
    format_points,
    render_page,
    summarise,
    to_flags,
)
from PIL import Image
from typer.testing import CliRunner

from cifake_ray.cli import app

COMPARISONS = [Comparison.read(path) for path in sorted(HERE.glob("*.yaml"))]


def make_row(variant: str, seed: int, accuracy: float, **values: Any) -> dict[str, Any]:
    return {
        "variant": variant,
        "seed": seed,
        "num_parameters": 39_132,
        "train_images": 9_000,
        "test_images": 10_042,
        "epochs": 70,
        "best_epoch": 60,
        "train_min": 7.0,
        "num_threads": 1,
        "val_accuracy": 0.9,
        "accuracy": accuracy,
        "auroc": 0.97,
        "tpr_at_fpr_1pct": 0.6,
        **values,
    }


def test_options_become_flags() -> None:
    options = {"recipe": "fast", "channels_last": True, "compile": False, "lr": 0.01}
    flags = ["--recipe", "fast", "--channels-last", "--no-compile", "--lr", "0.01"]
    assert to_flags(options) == flags


@pytest.mark.parametrize("comparison", COMPARISONS, ids=lambda comparison: comparison.name)
def test_train_takes_the_options_of_every_variant(comparison: Comparison, tmp_path: Path) -> None:
    for variant, added in comparison.variants.items():
        flags = to_flags({**comparison.options, **added})
        result = CliRunner().invoke(app, ["train", str(tmp_path / "none"), "run", *flags])
        assert result.exit_code == 4, (variant, result.output)  # only the shards are missing


def test_an_interval_is_students() -> None:
    centre, width = find_interval([1.0, 2.0, 3.0])
    assert (centre, width) == (2.0, pytest.approx(4.303 * 1.0 / 3**0.5, rel=1e-3))
    assert find_interval([5.0]) == (5.0, None)
    assert format_points([0.9, 0.92, 0.94]) == "92.00 ± 4.97"
    assert format_points([0.01], "+") == "+1.00"


def test_gains_are_seed_by_seed() -> None:
    comparison = replace(COMPARISONS[0], variants={"none": {}, "more": {"lr": 0.1}, "later": {}})
    rows = [make_row("none", seed, 0.90 + seed / 100) for seed in range(3)]
    rows += [make_row("more", seed, 0.91 + seed / 100, epochs=50 + seed) for seed in range(2)]
    head, _, first, second = summarise(comparison, rows).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (head, first, second)]
    none, more = (dict(zip(cells[0], line, strict=True)) for line in cells[1:])
    assert none["vs. first"] == "-"
    assert none["seeds"] == "3"
    assert more["vs. first"] == "+1.00 ± 0.00"
    assert more["change"] == "--lr 0.1"
    assert more["epochs"] == "50-51"


def test_changed_test_images_are_darker_or_saved_again_and_stand_in_columns(tmp_path: Path) -> None:
    image = Image.new("RGB", (32, 32), (200, 100, 50))
    degrade(image, tmp_path / "dark.jpg", brightness=0.5)
    with Image.open(tmp_path / "dark.png") as dark:
        assert dark.getpixel((0, 0)) == (100, 50, 25)
    degrade(image, tmp_path / "saved.jpg", jpeg=50)
    with Image.open(tmp_path / "saved.jpg") as saved:
        assert saved.format == "JPEG"
    comparison = replace(COMPARISONS[0], variants={"none": {}}, conditions={"dark": {}})
    table = summarise(comparison, [make_row("none", 0, 0.9, conditions={"dark": 0.8})])
    assert table.splitlines()[0].rstrip("| ").endswith("dark, %")
    assert table.splitlines()[2].rstrip("| ").endswith("80.00")


def test_the_page_in_the_package_is_that_of_its_figures() -> None:
    assert PAGE.read_text(encoding="utf-8") == render_page()
